"""Data that are bound to a budget stay bound, whatever the configuration, the files, or the hub."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedrounds.fl_components.account import Account
from fedrounds.fl_components.config import parse_config
from fedrounds.fl_components.data import HeartDisease, Mnist
from fedrounds.fl_components.errors import ConfigError, StoreError
from fedrounds.fl_components.reports.statement import in_short, markdown, statement
from fedrounds.fl_components.server import stages
from fedrounds.fl_components.server.opening import open_run
from fedrounds.fl_components.store import BudgetTerms, Store
from fedrounds.flows.round import walk
from tests.fl_components.server import wards
from tests.fl_components.server.wards import TERMS, WARDS, Begin
from tests.support import PRIVATE

EXAMPLE_TERMS = BudgetTerms(100.0, 1e-3, "example", "zero_out", "RDP", False)
EXAMPLES = {
    "kind": "example_level",
    "noise_multiplier": 1.0,
    "max_grad_norm": 1.0,
    "sampling_rate": 0.5,
    "delta": 1e-3,
}
BY_EXAMPLE: dict[str, Any] = {
    "privacy": {"kind": "none"},
    "selection": {"kind": "uniform"},
    "training": {"learning_rate": 0.1, "steps": 1, "privacy": EXAMPLES},
}
NO_CLAIM: dict[str, Any] = {"privacy": {"kind": "none"}, "selection": {"kind": "uniform"}}


def tables(folder: Path, prefix: str = "h", pressure: float = 1.0) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    for client in range(6):
        draw = random.Random(client)
        rows = [(draw.randint(30, 80), draw.randint(100, 180), int(draw.random() < 0.5)) for _ in range(30)]
        lines = ["age,pressure,disease", *(f"{age},{value * pressure:g},{label}" for age, value, label in rows)]
        (folder / f"{prefix}{client}.csv").write_text("\n".join(lines) + "\n")
    scale = {"age": [50, 10], "pressure": [130, 20]}
    return {"kind": "tables", "folder": str(folder), "label": "disease", "classes": [0, 1], "scale": scale}


def scaled(data: dict[str, Any]) -> dict[str, Any]:
    return data | {"scale": {"age": [50, 10], "pressure": [131, 20]}}


@pytest.fixture(params=["clients", "examples"])
def bound(request: pytest.FixtureRequest, begin: Begin, store: Store, tmp_path: Path) -> dict[str, Any]:
    """The data of a run under a claim about clients, or about their examples."""
    data = tables(tmp_path / "tab")
    if request.param == "clients":
        store.ledger.set_budget(Account("x"), TERMS, reason="x", by="ada")
        begin("first", data=data, population="x").close()
    else:
        store.ledger.set_budget(Account("x").template, EXAMPLE_TERMS, reason="x", by="ada")
        begin("first", data=data, population="x", **BY_EXAMPLE).close()
    return data


class TestAnyConfiguration:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"scale": {"age": [50, 10], "pressure": [131, 20]}},
            {"columns": ["pressure", "age"]},
            {"columns": ["age"], "scale": {}},
            *(
                pytest.param(changes, marks=pytest.mark.ci)
                for changes in ({"test_fraction": 0.1}, {"seed": 1}, {"seed": 1, "public": True})
            ),
        ],
    )
    def test_no_run_without_a_claim_gets_them(
        self, begin: Begin, store: Store, bound: dict[str, Any], changes: dict[str, Any]
    ) -> None:
        data = bound | {name: value for name, value in changes.items() if name != "seed"}
        with pytest.raises(ConfigError, match="population 'x'"):
            begin("free", data=data, population="free", seed=changes.get("seed", 0), **NO_CLAIM)
        assert store.find_run("free") is None

    def test_no_other_population_gets_them(self, begin: Begin, store: Store, bound: dict[str, Any]) -> None:
        """With either claim."""
        store.ledger.set_budget(Account("y"), TERMS, reason="x", by="ada")
        store.ledger.set_budget(Account("y").template, EXAMPLE_TERMS, reason="x", by="ada")
        for claim in ({}, BY_EXAMPLE):
            with pytest.raises(ConfigError, match=r"population '[xy]'"):
                begin("other", data=scaled(bound), population="y", seed=3, **claim)

    def test_renamed_and_rescaled_clients_get_no_second_budget(
        self, begin: Begin, store: Store, bound: dict[str, Any], tmp_path: Path
    ) -> None:
        renamed = tables(tmp_path / "renamed", "g")
        in_files = tables(tmp_path / "rescaled", "g", pressure=0.1333)
        for data in (renamed, scaled(renamed), in_files):
            with pytest.raises(ConfigError):
                begin("renamed", data=data, population="free", **NO_CLAIM)
            if store.ledger.budget(Account("x").template):
                with pytest.raises(ConfigError, match=r"the examples of client 'x/g\d' are for the most part those of"):
                    begin("renamed", data=data, population="x", **BY_EXAMPLE)


def many_clients(factor: float = 1.0, offset: int = 0) -> dict[str, Any]:
    """Two patients of each of 10,001 clients."""
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(10_001, 2, 4)) * factor
    return {f"p{client + offset}": (x.tolist(), [0, 1]) for client, x in enumerate(rows)} | {
        "tested": ([[0.0] * 4], [0], [[factor] * 4], [1])
    }


@pytest.mark.ci
@pytest.mark.parametrize("arguments", [{}, {"factor": 0.1333}, {"offset": 7}], ids=["same", "rescaled", "renamed"])
def test_above_ten_thousand_clients_all_rows_together_are_recognised(
    begin: Begin, store: Store, arguments: dict[str, Any]
) -> None:
    """Clients have no fingerprints of their own then."""
    data = {"kind": "function", "path": f"{__name__}:many_clients", "num_classes": 2}
    store.ledger.set_budget(Account("x"), TERMS, reason="x", by="ada")
    begin("first", data=data, population="x").close()
    with pytest.raises(ConfigError, match="population 'x' has a privacy budget"):
        begin("free", data=data | {"arguments": arguments}, population="free", seed=1, **NO_CLAIM)
    assert store.find_run("free") is None


class TestSecondHub:
    def test_it_knows_what_is_bound_or_is_refused(self, begin: Begin, store: Store, tmp_path: Path) -> None:
        store.ledger.set_budget(Account("wards"), TERMS, reason="x", by="ada")
        begin("a", data=WARDS).close()
        config = parse_config(wards.FIELDS | {"data": WARDS, "population": "free"} | NO_CLAIM)
        database = f"sqlite:///{store.home / 'fedrounds.db'}"
        with Store.open(tmp_path / "second", database_url=database, blobs_url=str(store.home / "blobs")) as second:
            with pytest.raises(StoreError, match="was begun by the hub key"):
                open_run(second, "b", config=config)
            second.keys.trust(store.keys.signing.public.hex())
            with pytest.raises(StoreError, match="lacks the file secrets/fingerprints-"):
                open_run(second, "b", config=config)
            (file,) = (store.home / "secrets").glob("fingerprints-*.key")
            (second.home / "secrets" / file.name).write_bytes(file.read_bytes())
            with pytest.raises(ConfigError, match="population 'wards' has a privacy budget"):
                open_run(second, "b", config=config)

    def test_a_lost_key_stops_every_run(self, begin: Begin, store: Store) -> None:
        store.ledger.set_budget(Account("wards"), TERMS, reason="x", by="ada")
        begin("a", data=WARDS).close()
        (file,) = (store.home / "secrets").glob("fingerprints-*.key")
        file.unlink()
        for run_id, changes in (("a", {"data": WARDS}), ("free", NO_CLAIM)):
            with pytest.raises(StoreError, match=f"lacks the file secrets/{file.name}"):
                begin(run_id, **changes)
        assert not file.exists()


class TestRunsWithoutAClaim:
    def test_they_stay_on_the_record_of_the_data(self, begin: Begin, store: Store) -> None:
        """By the population's name, and by their rows wherever these were used; also when they are declared public."""
        for run_id, population, public in (("q1", "wards", False), ("q2", "elsewhere", False), ("q3", "open", True)):
            with begin(run_id, data=WARDS | {"public": public}, population=population, seed=5, **NO_CLAIM) as run:
                walk(stages, run, 1)
        begin("never-trained", data=WARDS, **NO_CLAIM).close()
        strangers = WARDS | {"path": f"{wards.HERE}:other_wards"}
        store.ledger.set_budget(Account("wards"), TERMS, reason="x", by="ada")
        assert [use.run_id for use in store.memberships.uses_without(Account("wards"), "client")] == ["q1"]
        with begin("claimed", data=WARDS) as run:
            walk(stages, run, 1)
        told = statement(store, store.run("claimed"))
        assert [run["run_id"] for run in told["unclaimed_runs"]] == ["q1", "q2", "q3"]
        assert [run["rounds"] for run in told["unclaimed_runs"]] == [1, 1, 1]
        assert "3 runs on these data without this claim" in in_short(told)
        text = markdown(told)
        assert "q2 (ward, begun" in text and "their models and metrics exist" in text
        assert "without the runs that made no claim (below)" in text
        assert strangers and store.memberships.uses_without(Account("somebody"), "client") == []
        store.verify_journal()

    def test_a_claim_about_examples_covers_no_client(self, begin: Begin, store: Store) -> None:
        store.ledger.set_budget(Account("wards").template, EXAMPLE_TERMS, reason="x", by="ada")
        with begin("by-example", data=WARDS, **BY_EXAMPLE) as run:
            walk(stages, run, 1)
        assert store.memberships.uses_without(Account("wards"), "example") == []
        assert [use.run_id for use in store.memberships.uses_without(Account("wards"), "client")] == ["by-example"]
        assert [use.run_id for use in store.memberships.uses_without(Account("wards", "ward-3"), "client")] == [
            "by-example"
        ]
        assert store.memberships.uses_without(Account("wards", "nobody"), "client") == []
        assert store.memberships.clients("wards") == {f"ward-{ward}" for ward in range(9)}


class TestFilesOfOnesOwn:
    def test_they_are_private_unless_declared_public(self, begin: Begin, store: Store, tmp_path: Path) -> None:
        package = Path(wards.stages.__file__).parents[1] / "data" / "heart_disease"
        for file in package.glob("*.data"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
        assert HeartDisease().is_public and HeartDisease(folder=str(tmp_path)).is_public
        file = tmp_path / "processed.va.data"
        file.write_bytes(file.read_bytes().replace(b"63", b"64"))
        data = {"kind": "heart_disease", "folder": str(tmp_path)}
        assert not HeartDisease(folder=str(tmp_path)).is_public
        with pytest.raises(StoreError, match="has no privacy budget"):
            begin("mine", data=data, population="mine")
        assert not begin("free", data=data, population="free", **NO_CLAIM).federation.population.is_public
        assert begin(
            "open", data=data | {"public": True}, population="open", **NO_CLAIM
        ).federation.population.is_public
        assert not HeartDisease(public=False).is_public

    def test_files_in_the_form_of_mnist_are(self, tmp_path: Path) -> None:
        assert Mnist(folder=str(tmp_path)).is_public  # nothing is there to protect: loading says what is missing
        for name in (
            "train-images-idx3-ubyte",
            "train-labels-idx1-ubyte",
            "t10k-images-idx3-ubyte",
            "t10k-labels-idx1-ubyte",
        ):
            (tmp_path / name).write_bytes(b"mine")
        assert not Mnist(folder=str(tmp_path)).is_public
        assert Mnist(folder=str(tmp_path), public=True).is_public

    @pytest.mark.parametrize(
        "kind",
        [{"kind": "emnist", "split": "digits"}, {"kind": "femnist"}, {"kind": "shakespeare"}],
        ids=lambda kind: kind["kind"],
    )
    def test_files_in_the_form_of_others_are(self, kind: dict[str, Any], tmp_path: Path) -> None:
        (tmp_path / "input.txt").write_text("FIRST:\nmine")  # that is what Shakespeare's file is called
        fields = PRIVATE | {"privacy": {"kind": "none"}}
        mine = kind | {"folder": str(tmp_path)}
        assert not parse_config(fields | {"data": mine}).data.is_public
        assert parse_config(fields | {"data": mine | {"public": True}}).data.is_public


class TestNamesOfBudgets:
    def test_a_demonstration_does_not_keep_a_name(self, begin: Begin, store: Store) -> None:
        """An administrator makes it private; what it has spent stays, and its own statement stays a demonstration's."""
        with begin("demo") as run:
            walk(stages, run, 1)
            store.ledger.set_budget(Account("wards"), TERMS, reason="x", by="ada")
            with pytest.raises(ConfigError, match="population 'wards' is private, and data digits are public"):
                walk(stages, run, 2)
        budget = store.ledger.budget(Account("wards"))
        assert budget is not None and not budget.demonstration and sum(budget.spent.values()) == 1
        with begin("real", data=WARDS) as run:
            walk(stages, run, 1)
        assert statement(store, store.run("demo"))["demonstration"]
        assert not statement(store, store.run("real"))["demonstration"]
        store.verify_journal()

    def test_a_limit_for_another_spelling_of_a_client_is_found(self, begin: Begin, store: Store) -> None:
        store.ledger.set_budget(Account("wards").template, EXAMPLE_TERMS, reason="x", by="ada")
        store.ledger.set_budget(Account("wards", "WARD 3"), EXAMPLE_TERMS, reason="x", by="ada")
        with pytest.raises(
            ConfigError, match="a privacy budget is set for 'wards/WARD 3', and the client's name is 'ward-3'"
        ):
            begin("r", data=WARDS, **BY_EXAMPLE)
