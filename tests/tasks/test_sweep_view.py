"""A sweep in MLflow: one parent run, found again after a kill, open while a cell is trained, closed at the end."""

from __future__ import annotations

import socket
from typing import Any

import numpy as np
import pytest

from fedrounds.fl_components.arrays import params_digest
from fedrounds.fl_components.run_state import RunState
from fedrounds.fl_components.store import Store, SweepRecord
from fedrounds.tasks.tracking import server
from fedrounds.tasks.tracking.run_view import RunView
from fedrounds.tasks.tracking.server import tracking_uri
from fedrounds.tasks.tracking.sweep_view import MAX_DESCRIPTION, end_sweep
from fedrounds.tasks.tracking.tracker import catch_up

CONFIG = {
    "name": "digits",
    "rounds": 1,
    "task": {"kind": "classification"},
    "evaluation": {"every": 1, "primary": "accuracy"},
}


def new_sweep(store: Store, over: Any = (("seed", [1, 2]),)) -> SweepRecord:
    return store.create_sweep(sweep_id="s", name="digits", config=CONFIG, over=over, source_folder="/src")


def train(
    store: Store,
    sweep: SweepRecord,
    run_id: str,
    *,
    accuracy: float = 0.5,
    state: str = "Completed",
    metrics: dict[str, float] | None = None,
    config: dict[str, Any] = CONFIG,
) -> None:
    """One cell of one round, which nothing has shown yet."""
    store.create_run(
        run_id=run_id,
        name="digits",
        population="public",
        rounds=1,
        config=config | sweep.cells[run_id],
        config_digest=run_id * 8,
        initial_state=b"0",
        params_digest=params_digest(np.zeros(3, dtype=np.float32)),
        ancestor=None,
        engine={},
        source_folder="/src",
        sweep_id="s",
    )
    with store.acquire(run_id) as lease:
        lease.begin_attempt()
        lease.reserve(1)
        result = {"metrics": {"clients/received": 4.0} | (metrics or {"eval/accuracy": accuracy}), "seconds": {}}
        lease.commit(1, state=b"1", params_digest="d" * 64, result=result)
        lease.finish(RunState(state))


def show(store: Store, run_id: str, *, close: bool = True) -> RunView:
    with store.acquire(run_id) as lease:
        view = RunView(client(store), tracking_uri(store.home), store, lease)
        view.log_rounds()
        if close:
            view.close()
        return view


def client(store: Store) -> Any:
    return server.connect(tracking_uri(store.home))


def parents(store: Store) -> list[Any]:
    experiment = client(store).get_experiment_by_name("digits")
    found = client(store).search_runs([experiment.experiment_id])
    return [run for run in found if "fedrounds.sweep_id" in run.data.tags]


def description(store: Store) -> str:
    (parent,) = parents(store)
    text: str = parent.data.tags["mlflow.note.content"]
    return text


def test_cells_are_nested_in_one_parent_which_is_closed_with_the_last(store: Store) -> None:
    sweep = new_sweep(store)
    train(store, sweep, "s-001", accuracy=0.5)
    first = show(store, "s-001")
    (parent,) = parents(store)
    assert (parent.info.run_name, parent.info.status) == ("s", "RUNNING")
    train(store, sweep, "s-002", accuracy=0.75)
    second = show(store, "s-002")
    (parent,) = parents(store)
    assert parent.info.status == "FINISHED"
    for view, name in ((first, "seed=1"), (second, "seed=2")):
        cell = client(store).get_run(view.mlflow_run_id)
        assert cell.info.run_name == name
        assert cell.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert "| s-001 | 1 | Completed | 0.5000 |" in description(store)
    assert "| s-002 | 2 | Completed | **0.7500** |" in description(store)
    page = f"#/compare-runs?runs=%5B%22{first.mlflow_run_id}%22%2C%22{second.mlflow_run_id}%22%5D"
    assert page in description(store)


def test_the_parent_is_closed_as_the_sweep_ended_and_opened_again_by_a_resume(store: Store) -> None:
    sweep = new_sweep(store)
    train(store, sweep, "s-001", state="TooFewClients")
    show(store, "s-001")
    shown = end_sweep(store, sweep, "Failed", pytest.fail)  # the other cell could not even begin
    (parent,) = parents(store)
    assert (parent.info.run_id, parent.info.status) == (shown["mlflow_run_id"], "FAILED")
    with store.acquire("s-001") as lease:
        lease.begin_attempt()
    show(store, "s-001", close=False)
    (parent,) = parents(store)
    assert parent.info.status == "RUNNING"
    with store.acquire("s-001") as lease:
        lease.finish(RunState.CANCELLED)
    show(store, "s-001")
    (parent,) = parents(store)
    assert parent.info.status == "KILLED"


def test_a_sweep_that_mlflow_missed_is_written_and_closed_later(store: Store) -> None:
    sweep = new_sweep(store)
    for run_id in sweep.cells:
        train(store, sweep, run_id)
    assert catch_up(store, say=pytest.fail).keys() == {"s-001", "s-002"}
    (parent,) = parents(store)
    assert parent.info.status == "FINISHED"
    assert parent.info.end_time == round(store.run("s-002").updated_at * 1000)


def test_another_store_s_sweep_of_the_same_id_is_not_written_to(store: Store) -> None:
    sweep = new_sweep(store)
    train(store, sweep, "s-001")
    view = show(store, "s-001")
    tags = {"fedrounds.sweep_id": "s", "fedrounds.created_at": "1.0"}
    other = client(store).create_run(view.experiment_id, tags=tags)
    end_sweep(store, sweep, "Cancelled", pytest.fail)
    assert client(store).get_run(other.info.run_id).info.status == "RUNNING"
    assert len(parents(store)) == 2


def test_a_large_sweep_s_description_fits_and_says_what_is_left_out(store: Store) -> None:
    sweep = new_sweep(store, [("seed", list(range(400))), ("text", ["long " * 2000])])
    for run_id in list(sweep.cells)[:2]:
        train(store, sweep, run_id)
        show(store, run_id)
    assert len(description(store)) <= MAX_DESCRIPTION + 100
    assert "more; the best so far is s-001." in description(store)


def test_an_mlflow_that_is_down_does_not_fail_a_sweep(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = new_sweep(store)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{probe.getsockname()[1]}")
    said: list[str] = []
    assert end_sweep(store, sweep, "Completed", said.append) == {"mlflow_run_id": None, "compare_url": None}
    (words,) = said
    assert "connection refused" in words
    assert "`fedrounds resume s`" in words


def test_the_best_cell_of_a_regression_has_the_smallest_error(store: Store) -> None:
    """The cells' own configuration says what they are compared by, and in which direction."""
    regression = CONFIG | {"task": {"kind": "regression"}, "evaluation": {"every": 1, "primary": "mse"}}
    sweep = store.create_sweep(
        sweep_id="s", name="digits", config=regression, over=(("seed", [1, 2]),), source_folder="/src"
    )
    for run_id, mse in (("s-001", 4.0), ("s-002", 0.25)):
        train(store, sweep, run_id, metrics={"eval/mse": mse}, config=regression)
        show(store, run_id)
    text = description(store)
    assert "| state | mse |" in text and "**0.2500**" in text and "**4.0000**" not in text
