"""`fedrounds runs delete` and `fedrounds prune`: which runs, and what is refused."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedrounds.deployments import api
from fedrounds.deployments.cli import main
from fedrounds.fl_components.errors import ConfigError, LeaseHeld, RunNotFound
from fedrounds.fl_components.run_state import RunState
from fedrounds.fl_components.store import Store

DAY = 86_400
CONFIG = {
    "data": {"kind": "digits"},
    "evaluation": {"every": 1, "primary": "accuracy"},
    "task": {"kind": "classification"},
}


def create(store: Store, run_id: str, name: str, state: str | None = "Completed", **given: Any) -> None:
    store.create_run(
        run_id=run_id, name=name, population=name, rounds=2, config=CONFIG, config_digest="c", initial_state=b"0",
        params_digest="0", ancestor=None, engine={}, source_folder="/", **given,
    )  # fmt: skip
    if state is not None:
        with store.acquire(run_id) as lease:
            lease.begin_attempt()
            error = {"code": "diverged", "message": "x", "hint": None} if state == "Diverged" else None
            lease.finish(RunState("Failed" if state == "Diverged" else state), error)


@pytest.fixture
def store(home: Path) -> Iterator[Store]:
    with Store.open(home) as store:
        for n in range(1, 4):
            create(store, f"a{n}", "a")
        create(store, "diverged", "a", "Diverged")
        create(store, "stopped", "a", "Cancelled")
        create(store, "b1", "b", "BudgetExhausted")
        yield store


@pytest.fixture
def in_100_days(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedrounds.deployments.deletion.time", SimpleNamespace(time=lambda: time.time() + 100 * DAY))


def pruned(**given: Any) -> set[str]:
    return {run["run_id"] for run in api.prune(dry_run=True, **given)["runs"]}


@pytest.mark.usefixtures("in_100_days")
class TestWhatIsPruned:
    def test_the_newest_of_each_experiment_stay(self, store: Store) -> None:
        assert pruned(keep=0) == {"a1", "a2", "a3", "diverged", "b1"}
        assert pruned(keep=1) == {"a1", "a2", "diverged"}
        assert pruned(keep=2) == {"a1", "diverged"}
        assert pruned(keep=9) == {"diverged"}

    def test_by_age_one_of_each_experiment_stays(self, store: Store) -> None:
        assert pruned(older_than="90d") == {"a1", "a2", "diverged"}
        assert pruned(older_than="15w") == set()
        assert pruned(older_than="2399h", keep=2, experiment="a") == {"a1", "diverged"}

    def test_of_one_experiment(self, store: Store) -> None:
        assert pruned(keep=0, experiment="b") == {"b1"}
        with pytest.raises(RunNotFound, match="no run of the experiment 'c'"):
            pruned(keep=0, experiment="c")

    def test_unfinished_runs_only_where_that_is_said(self, store: Store) -> None:
        assert pruned(keep=1, unfinished=True) == {"a1", "a2", "diverged", "stopped"}
        found = api.prune(keep=1)
        assert found["kept"] == {"stopped": "it is unfinished (Cancelled); --unfinished includes it"}
        assert {run.run_id for run in store.runs()} == {"a3", "stopped", "b1"}
        assert (found["dry_run"], found["prefect"], found["mlflow"]) == (False, {"flow_runs": 0, "problem": None}, None)
        store.verify_journal()

    def test_a_run_that_a_process_works_on_stays(self, store: Store) -> None:
        with store.acquire("a1"):
            found = api.prune(keep=0)
            assert found["kept"]["a1"] == "a process is working on it"
        assert store.run("a1").state == "Completed"

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({}, "nothing says which runs to prune"),
            ({"experiment": "a"}, "nothing says which runs to prune"),
            ({"older_than": "90"}, "'90' is not a duration"),
            ({"older_than": "-1d"}, "'-1d' is not a duration"),
            ({"keep": -1}, "--keep is -1"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, store: Store, given: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            api.prune(**given)
        assert len(store.runs()) == 6


class TestDeletingByName:
    def test_all_are_checked_before_any_is_deleted(self, store: Store) -> None:
        with pytest.raises(RunNotFound):
            api.delete_runs(["a1", "nobody"])
        with pytest.raises(ConfigError, match="run stopped is unfinished: Cancelled, 0 of 2 rounds"):
            api.delete_runs(["a1", "stopped"])
        with store.acquire("a2"), pytest.raises(LeaseHeld, match="a process is working on run a2"):
            api.delete_runs(["a1", "a2"])
        assert len(store.runs()) == 6
        found = api.delete_runs(["a1", "stopped", "a1"], unfinished=True)
        assert [run["run_id"] for run in found["runs"]] == ["a1", "stopped"]
        assert api.show("a1")["state"] == "Deleted"
        assert {run["run_id"] for run in api.runs()} == {"a2", "a3", "diverged", "b1"}
        assert len(api.runs(deleted=True)) == 6

    def test_the_cells_of_a_sweep(self, store: Store) -> None:
        store.create_sweep(sweep_id="s", name="a", config={}, over=[("seed", [1, 2, 3])], source_folder="/")
        for cell in ("s-001", "s-002"):
            create(store, cell, "a", sweep_id="s")
        found = api.delete_runs(["s"])
        assert {run["run_id"] for run in found["runs"]} == {"s-001", "s-002"}
        assert [cell["state"] for cell in api.show("s")["cells"]] == ["Deleted", "Deleted", "Pending"]


@pytest.mark.parametrize(
    ("line", "code", "told"),
    [
        (["runs", "delete", "nobody", "--yes"], 2, "there is no run 'nobody' in this store"),
        (["runs", "delete", "a1"], 2, "stdin is no terminal"),
        (["runs", "delete", "stopped", "--yes"], 2, "run stopped is unfinished"),
        (["runs", "delete"], 2, "RUN"),
        (["prune", "--keep", "1"], 2, "stdin is no terminal"),
        (["prune", "--yes"], 2, "nothing says which runs to prune"),
        (["prune", "--keep", "1", "--dry-run"], 0, "Would delete 3 runs"),
        (["prune", "--keep", "99", "--older-than", "90d"], 0, "Would delete 0 runs"),
        (["runs", "delete", "a1", "--yes"], 0, "Their charges and the journal stay"),
        (["runs", "--all"], 0, "a1"),
    ],
)
def test_the_commands(store: Store, capsys: pytest.CaptureFixture[str], line: list[str], code: int, told: str) -> None:
    assert main(line) == code
    shown = capsys.readouterr()
    assert told in shown.out + shown.err
    if code:
        assert len(store.runs()) == 6


def test_json(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "delete", "a1", "--yes", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)["data"]
    assert [run["run_id"] for run in data["runs"]] == ["a1"]
    assert main(["prune", "--keep", "0", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["hint"] == "add --yes"
