"""Sweeps in the store, on both databases: what a grid is, and which runs are its cells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fedrounds.fl_components.errors import ConfigError, RunConflict, RunNotFound
from fedrounds.fl_components.run_state import RunState
from fedrounds.fl_components.store import RunRecord, Store, SweepRecord

NewRun = Callable[..., RunRecord]
OVER: list[tuple[str, list[Any]]] = [("seed", [1, 2]), ("model.hidden", [[64, 32], [128]])]


def new_sweep(store: Store, sweep_id: str = "s", **changes: Any) -> SweepRecord:
    given: dict[str, Any] = {
        "name": "digits",
        "config": {"name": "digits", "rounds": 2},
        "over": OVER,
        "source_folder": "/source",
    }
    return store.create_sweep(sweep_id=sweep_id, **(given | changes))


def test_a_sweep_is_remembered_and_creating_it_again_changes_nothing(store: Store) -> None:
    made = new_sweep(store)
    assert made == new_sweep(store) == store.sweep("s") == store.find_sweep("s")
    assert (made.name, made.config, made.source_folder) == ("digits", {"name": "digits", "rounds": 2}, "/source")
    assert list(made.cells.values()) == [
        {"seed": 1, "model.hidden": [64, 32]},
        {"seed": 1, "model.hidden": [128]},
        {"seed": 2, "model.hidden": [64, 32]},
        {"seed": 2, "model.hidden": [128]},
    ]
    (row,) = store.journal()
    assert (row.kind, row.content["sweep_id"]) == ("sweep.created", "s")
    assert store.verify_journal().rows == 1


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"config": {"name": "digits", "rounds": 3}}, r"config.rounds \(2, now 3\)"),
        ({"over": OVER[:1]}, r"over \("),
        ({"over": OVER[::-1]}, r"over \("),  # the cells would have other numbers
    ],
)
def test_another_grid_or_configuration_is_a_conflict(store: Store, changes: dict[str, Any], named: str) -> None:
    new_sweep(store)
    with pytest.raises(RunConflict, match=named):
        new_sweep(store, **changes)


def test_the_cells_are_runs_that_know_their_sweep(store: Store, new_run: NewRun) -> None:
    new_sweep(store)
    cell = new_run("s-002", sweep_id="s")
    new_run("alone")
    assert cell.sweep_id == "s"
    assert store.runs(sweep_id="s") == [cell]
    assert new_run("s-002") == cell  # gone on with by itself
    with store.acquire("s-002") as lease:
        assert store.runs(sweep_id="s", unfinished=True) == [store.run("s-002")]
        lease.begin_attempt()
        lease.finish(RunState.COMPLETED)
        assert store.runs(sweep_id="s", unfinished=True) == [store.run("s-002")]  # its views are not complete
    assert store.runs(sweep_id="s", unfinished=True) == []


def test_a_run_that_is_there_already_is_no_cell(store: Store, new_run: NewRun) -> None:
    new_sweep(store)
    new_run("s-001")
    with pytest.raises(RunConflict, match="no cell of the sweep 's'"):
        new_run("s-001", sweep_id="s")


def test_runs_and_sweeps_do_not_share_an_id(store: Store, new_run: NewRun) -> None:
    new_run("r")
    with pytest.raises(RunConflict, match="'r' is the id of a run"):
        new_sweep(store, "r")
    new_sweep(store)
    with pytest.raises(RunConflict, match="'s' is the id of a sweep"):
        new_run("s")


def test_ids_that_a_cell_could_not_be_named_after_are_refused(store: Store) -> None:
    for sweep_id in ("", "a/b", "..", "x" * 125):
        with pytest.raises(ConfigError, match="sweep id"):
            new_sweep(store, sweep_id)
    with pytest.raises(RunNotFound, match="'x'"):
        store.sweep("x")
    assert store.find_sweep("x") is None
