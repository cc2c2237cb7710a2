"""A resume on other rows than those that the run began with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedrounds.deployments.cli import main
from fedrounds.fl_components.account import Account
from fedrounds.fl_components.config import parse_config
from fedrounds.fl_components.errors import ConfigError, RunConflict
from fedrounds.fl_components.server import stages
from fedrounds.fl_components.server.assembly import assemble
from fedrounds.fl_components.server.opening import open_run
from fedrounds.fl_components.server.reproducibility import second_load
from fedrounds.fl_components.server.row_digests import data_facts, digest_key
from fedrounds.fl_components.store import Store
from fedrounds.flows.round import walk
from tests.fl_components.server import wards
from tests.fl_components.server.wards import FIELDS, WARDS

PLAIN = FIELDS | {"population": "plain", "data": WARDS, "privacy": {"kind": "none"}}

Wards = dict[str, tuple[Any, ...]]


def labels_turned(found: Wards) -> Wards:
    x, y, *rest = found["ward-1"]
    return found | {"ward-1": (x, ~y, *rest)}


def one_bit(found: Wards) -> Wards:
    found["ward-1"][0][0, 0] = np.nextafter(found["ward-1"][0][0, 0], np.float32(9))
    return found


def rows_in_another_order(found: Wards) -> Wards:
    x, y, *rest = found["ward-1"]
    return found | {"ward-1": (x[::-1].copy(), y[::-1].copy(), *rest)}


def another_test_row(found: Wards) -> Wards:
    found["ward-1"][2][0] += 1
    return found


def clients_in_another_order(found: Wards) -> Wards:
    return dict(reversed(found.items()))


def renamed(found: Wards) -> Wards:
    return {name.replace("ward-1", "ward-x"): ward for name, ward in found.items()}


def a_row_moved(found: Wards) -> Wards:
    """From one client to its neighbour: all rows together are the same."""
    (x1, y1, *rest1), (x2, y2, *rest2) = found["ward-1"], found["ward-2"]
    moved = {"ward-1": (x1[:-1], y1[:-1], *rest1)}
    return found | moved | {"ward-2": (np.concatenate([x1[-1:], x2]), np.concatenate([y1[-1:], y2]), *rest2)}


CHANGES: dict[Callable[[Wards], Wards], str] = {
    labels_turned: "those of 1 client have changed: 'ward-1'",
    one_bit: "those of 1 client have changed: 'ward-1'",
    rows_in_another_order: "those of 1 client have changed: 'ward-1'",
    another_test_row: "those of 1 client have changed: 'ward-1'",
    a_row_moved: "those of 2 clients have changed: 'ward-1', 'ward-2'",
    renamed: "those of 1 client have changed: 'ward-x'",
    clients_in_another_order: "those of 8 clients have changed: 'ward-8', 'ward-7', 'ward-6', 'ward-5', 'ward-3' and 3",
}


@pytest.mark.parametrize(("change", "told"), CHANGES.items(), ids=lambda each: getattr(each, "__name__", ""))
def test_it_is_refused_and_names_the_clients(
    store: Store, monkeypatch: pytest.MonkeyPatch, change: Callable[[Wards], Wards], told: str
) -> None:
    config, before = parse_config(PLAIN), wards.wards
    with open_run(store, "r", config=config) as run:
        walk(stages, run, 1)
    monkeypatch.setattr(wards, "wards", lambda: change(before()))
    for given in (None, config):
        with pytest.raises(RunConflict, match="run 'r' began with other rows") as caught:
            open_run(store, "r", config=given)
        assert told in caught.value.message
        assert "`fedrounds resume r --accept-changed-data`" in str(caught.value.hint)
    assert store.run("r").committed_round == 1


def test_a_run_without_a_claim_goes_on_where_it_is_asked_to(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """And from then on with the new rows, which are compared as well."""
    before = wards.wards
    with open_run(store, "r", config=parse_config(PLAIN)) as run:
        walk(stages, run, 1)
    heard: list[str] = []
    with open_run(store, "r", accept_changed_data=True, notify=heard.append):
        assert heard == []  # nothing has changed: nothing to accept
    monkeypatch.setattr(wards, "wards", lambda: labels_turned(before()))
    with open_run(store, "r", accept_changed_data=True, notify=heard.append):
        assert heard == ["run r continues with other rows than it began with, as requested"]
    with open_run(store, "r") as run:
        walk(stages, run, 2)
    accepted = [row.content for row in store.journal("r") if row.kind == "data.accepted"]
    assert [each["round"] for each in accepted] == [2]
    monkeypatch.setattr(wards, "wards", before)
    with pytest.raises(RunConflict, match="began with other rows"):
        open_run(store, "r")
    store.verify_journal()


def test_a_run_under_a_claim_does_not_even_where_it_is_asked_to(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    before, claiming = wards.wards, PLAIN | {"privacy": FIELDS["privacy"], "data": WARDS}
    store.ledger.set_budget(Account("plain"), wards.TERMS, reason="a test", by="ada")
    with open_run(store, "r", config=parse_config(claiming)) as run:
        walk(stages, run, 1)
    monkeypatch.setattr(wards, "wards", lambda: labels_turned(before()))
    with pytest.raises(RunConflict, match="began with other rows") as caught:
        open_run(store, "r", accept_changed_data=True)
    assert "under a privacy claim a run cannot continue with other rows" in str(caught.value.hint)
    assert store.run("r").committed_round == 1


def test_a_run_that_is_complete_does_not_ask(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What views show of it is put right whatever its data have become."""
    before = wards.wards
    with open_run(store, "r", config=parse_config(PLAIN | {"rounds": 1})) as run:
        walk(stages, run, 1)
    monkeypatch.setattr(wards, "wards", lambda: labels_turned(before()))
    open_run(store, "r").close()


def test_the_digests_are_keyed(store: Store, tmp_path: Path) -> None:
    """Whoever reads the database cannot confirm a guess of the rows."""
    data = assemble(parse_config(PLAIN)).simulated.data
    mine = data_facts(data, digest_key(store))
    with Store.open(tmp_path / "other") as other:
        theirs = data_facts(data, digest_key(other))
    assert all(mine[name] != theirs[name] for name in mine)
    assert mine == data_facts(data, digest_key(store))


@pytest.mark.parametrize(
    "changes",
    [
        {
            "training": {
                "learning_rate": 0.1,
                "steps": 1,
                "privacy": {
                    "kind": "example_level",
                    "noise_multiplier": 1e5,
                    "max_grad_norm": 1.0,
                    "sampling_rate": 0.5,
                    "delta": 1e-3,
                },
            },
            "selection": {"kind": "uniform"},
            "privacy": {"kind": "none"},
        },
        {"server_optimizer": {"kind": "fedavg", "learning_rate": 1e41}},
        {"server_optimizer": {"kind": "fedavgm", "learning_rate": 1e41}},
    ],
    ids=["noise of a step", "fedavg", "fedavgm"],
)
def test_what_no_round_can_compute_is_refused_before_anybody_pays(store: Store, changes: dict[str, Any]) -> None:
    """And with its reason, which is public, though a claim withholds what comes of the data."""
    with pytest.raises(ConfigError, match=r"training.privacy.noise_multiplier|server_optimizer.learning_rate"):
        open_run(store, "r", config=parse_config(FIELDS | changes))
    assert store.runs() == [] and store.ledger.budgets() == {}


@pytest.mark.ci
def test_a_check_says_what_is_not_reproducible(tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "unordered.py").write_text(ODD)  # a name of its own: a process imports a module once
    data = {"kind": "function", "path": "unordered:load", "num_classes": 2, "arguments": {"use_set": True}}
    (tmp_path / "unordered.yaml").write_text(json.dumps({**PLAIN, "data": data}))
    assert main(["config", "check", str(tmp_path / "unordered.yaml"), "--data", "--json"]) == 0
    (difference,) = json.loads(capsys.readouterr().out)["data"]["not_reproducible"]
    assert difference.startswith("the data differ")


@pytest.mark.slow
def test_what_a_second_load_makes_of_it(tmp_path: Path) -> None:
    """As `config check --data` says it: the order of a set, and in a model the hash of a text or Python's generator."""
    (tmp_path / "odd.py").write_text(ODD)
    plain = {"kind": "function", "path": "odd:load", "num_classes": 2, "arguments": {"use_set": False}}
    federations = {
        "set": {"data": plain | {"arguments": {"use_set": True}}},
        "hash": {"data": plain, "model": {"kind": "module", "path": "odd:Hashed"}},
        "start": {"data": plain, "model": {"kind": "module", "path": "odd:start"}},
        "good": {"data": plain},
    }
    found = {}
    for name, changes in federations.items():
        config = parse_config({**PLAIN, **changes})
        with second_load(config, str(tmp_path)) as differences:
            found[name] = differences(assemble(config, str(tmp_path)))
    assert {name: [words.partition(" differ")[0] for words in each] for name, each in found.items()} == {
        "set": ["the data"],
        "hash": ["the model's outputs"],
        "start": ["the model's initial parameters"],
        "good": [],
    }


ODD = """
import random
import numpy as np, torch
from torch import nn

WARDS = ["cardiology", "surgery", "icu", "er", "geriatrics", "paediatrics", "oncology", "urology"]

def load(use_set):
    rng, found = np.random.default_rng(0), {}
    code = {ward: place for place, ward in enumerate(set(WARDS) if use_set else WARDS)}
    for hospital in range(3):
        x = np.eye(8, dtype="float32")[[code[ward] for ward in rng.choice(WARDS, size=60)]]
        found[f"h{hospital}"] = (x[10:], np.arange(50) % 2, x[:10], np.arange(10) % 2)
    return found

class Hashed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 2)
    def forward(self, x):
        return self.a(x) * (1 + hash("ward") % 997)  # another number in each process

def start():
    layer = nn.Linear(8, 2)
    with torch.no_grad():
        layer.bias.fill_(random.random())
    return layer
"""
