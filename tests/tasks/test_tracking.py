"""MLflow shows every committed round exactly once, whatever is killed, and never stops a training."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedrounds.fl_components.arrays import params_digest
from fedrounds.fl_components.errors import ConfigError, DataError, LeaseHeld, LeaseLost, StoreError, Unreachable
from fedrounds.fl_components.parameters import constants_digest, flatten
from fedrounds.fl_components.run_state import RunState
from fedrounds.fl_components.store import Lease, RunRecord, Store
from fedrounds.tasks.tracking import server
from fedrounds.tasks.tracking.model import LoggableModel, load_start_parameters
from fedrounds.tasks.tracking.run_view import RunView
from fedrounds.tasks.tracking.server import run_url, tracking_uri
from fedrounds.tasks.tracking.tracker import Tracker, catch_up
from tests.support import PRIVATE

TIMEOUT_S = 60.0
ACCURACY = [0.5, 0.75, 0.625, 0.875, 0.8125]
CONFIG = {
    "name": "digits",
    "rounds": 5,
    "task": {"kind": "classification"},
    "model": {"kind": "mlp", "hidden": [64, 32]},
    "evaluation": {"every": 1, "primary": "accuracy"},
    "text": "long " * 2000,
}


def make_run(store: Store, run_id: str = "r1", **changes: Any) -> RunRecord:
    given: dict[str, Any] = {
        "run_id": run_id,
        "name": "digits",
        "population": "public",
        "rounds": 5,
        "config": CONFIG,
        "config_digest": "c" * 64,
        "initial_state": b"0",
        "params_digest": params_digest(np.zeros(3, dtype=np.float32)),
        "ancestor": None,
        "engine": {"delta_warnings": []},
        "source_folder": "/src",
    }
    return store.create_run(**{**given, **changes})


def commit(lease: Lease, n: int, digest: str = "d", **metrics: float) -> None:
    values = {"train/loss": 1.0 / n, "eval/accuracy": ACCURACY[n - 1], "time/round_s": 0.1 * n, **metrics}
    lease.reserve(n)
    lease.commit(n, state=b"%d" % n, params_digest=digest, result={"metrics": values})


def make_tracker(store: Store, lease: Lease, **changes: Any) -> Tracker:
    given: dict[str, Any] = {"model": None, "prefect_flow_run": None, "say": lambda text: None}
    tracker = Tracker(store, lease, **{**given, **changes})
    tracker.start()
    return tracker


def train(store: Store, run_id: str, rounds: range, state: str, digest: str = "d", **changes: Any) -> list[str]:
    """One attempt that commits these rounds and ends in that state; what the tracker said."""
    said: list[str] = []
    with store.acquire(run_id) as lease:
        lease.begin_attempt()
        tracker = make_tracker(store, lease, say=said.append, **changes)
        for n in rounds:
            commit(lease, n, digest)
            tracker.wake()
        lease.finish(RunState(state))
        report = tracker.close(TIMEOUT_S)
    assert (report.pending_rounds, report.error) == (0, None)
    return said


def shown(store: Store, run_id: str = "r1", uri: str | None = None) -> Any:
    mlflow_run_id = store.run(run_id).mlflow_run_id
    assert mlflow_run_id is not None
    return client(store, uri).get_run(mlflow_run_id)


def client(store: Store, uri: str | None = None) -> Any:
    return server.connect(uri or tracking_uri(store.home))


def history(store: Store, key: str, run_id: str = "r1", uri: str | None = None) -> list[tuple[int, float, int]]:
    """(step, value, timestamp) of every row that MLflow has, in order."""
    rows = client(store, uri).get_metric_history(store.run(run_id).mlflow_run_id, key)
    return sorted((row.step, row.value, row.timestamp) for row in rows)


def expected(store: Store, key: str, values: list[float], run_id: str = "r1") -> list[tuple[int, float, int]]:
    rounds = store.rounds(run_id)
    return [(r.round, v, round(r.committed_at * 1000)) for r, v in zip(rounds, values, strict=True)]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


class Mlp(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = torch.nn.Linear(4, 4)
        self.head = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.frozen(x))


def make_model(name: str = "digits", seed: int = 0) -> LoggableModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = Mlp().eval()
        example = torch.randn(4, 4).numpy()
    return LoggableModel(module, example, name)


def digest_of(model: LoggableModel) -> str:
    return params_digest(flatten(model.module))


# --- what is shown ---


def test_a_run_is_shown_with_its_rounds_parameters_and_tags(store: Store) -> None:
    make_run(store, ancestor="models:/digits/1")
    flow_run = {"id": "f-1", "url": "http://127.0.0.1:4200/runs/flow-run/f-1"}
    said = train(store, "r1", range(1, 6), "Completed", prefect_flow_run=flow_run)

    assert said == []
    assert history(store, "eval/accuracy") == expected(store, "eval/accuracy", ACCURACY)
    assert history(store, "best/accuracy") == expected(store, "best/accuracy", [0.5, 0.75, 0.75, 0.875, 0.875])
    run = shown(store)
    assert run.info.run_name == "r1"
    assert run.info.status == "FINISHED"
    assert run.info.start_time == round(store.run("r1").created_at * 1000)
    assert run.info.end_time == round(store.run("r1").updated_at * 1000)
    assert run.data.params | {"text": ""} == {
        "name": "digits",
        "rounds": "5",
        "model.kind": "mlp",
        "model.hidden": "[64, 32]",
        "task.kind": "classification",
        "evaluation.every": "1",
        "evaluation.primary": "accuracy",
        "text": "",
    }
    assert run.data.params["text"].endswith("... (cut; 10000 characters)")
    wanted = {
        "config_digest": "c" * 12,
        "fedrounds.run_id": "r1",
        "population": "public",
        "state": "Completed",
        "ancestor": "models:/digits/1",
        "prefect.flow_run_id": "f-1",
        "prefect.flow_run_url": flow_run["url"],
    }
    assert wanted.items() <= run.data.tags.items()
    experiment = client(store).get_experiment(run.info.experiment_id)
    assert experiment.name == "digits"
    assert experiment.artifact_location == (store.home / "mlartifacts").as_uri()


@pytest.mark.slow
def test_a_first_run_says_nothing_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """In a new home, after a process that was killed while MLflow made its tables there.

    One model is exported and one cannot be. None of it prints anything, or touches the working folder.
    """
    script = """
import os, sys
sys.path[:0] = sys.argv[2:]
from test_tracking import *
branching = LoggableModel(Branching().eval(), make_model().example, "digits")
with Store.open() as store:
    for run_id, model in ((sys.argv[1], make_model), ("r2", lambda: branching)):
        make_run(store, run_id)
        said = train(store, run_id, range(1, 3), "Completed", model=model)
    assert store.run("r1").model_uri == "models:/digits/1"
    assert "cannot be exported" in said[0]
    assert "MLFLOW_TRACKING_URI" not in os.environ
"""
    home, folder = tmp_path / "home folder", tmp_path / "working folder"
    folder.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "FEDROUNDS_"))}
    options: dict[str, Any] = {"env": {**environment, "FEDROUNDS_HOME": str(home)}, "cwd": folder, "text": True}
    killed = subprocess.Popen([sys.executable, "-c", script, "r0", *python_path()], **options)
    wait_until(lambda: number_of_tables(home / "mlflow.db.new") > 20)
    killed.kill()
    killed.wait()

    done = subprocess.run([sys.executable, "-c", script, "r1", *python_path()], capture_output=True, **options)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(folder.iterdir()) == []
    assert {path.name for path in home.iterdir()} >= {"mlflow.db", "mlartifacts"}


def number_of_tables(database: Path) -> int:
    if not database.exists():
        return 0
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        try:
            return int(connection.execute("select count(*) from sqlite_master where type = 'table'").fetchone()[0])
        except sqlite3.OperationalError:  # locked, or empty yet
            return 0


def python_path() -> list[str]:
    here = Path(__file__).resolve()
    return [str(here.parent), str(here.parents[2])]


@pytest.mark.parametrize(
    ("state", "status"),
    [
        pytest.param("BudgetExhausted", "FINISHED", marks=pytest.mark.ci),
        ("Failed", "FAILED"),
        pytest.param("TooFewClients", "FAILED", marks=pytest.mark.ci),
        pytest.param("Cancelled", "KILLED", marks=pytest.mark.ci),
    ],
)
def test_every_final_state_closes_the_run(store: Store, state: str, status: str) -> None:
    assert RunState(state).is_final
    make_run(store)
    train(store, "r1", range(1, 2), state, model=make_model)
    assert shown(store).info.status == status
    assert shown(store).data.tags["state"] == state
    models = client(store).search_registered_models()
    assert bool(models) == (state == "BudgetExhausted")  # what was paid for is kept; other ends are not the last


def test_names_and_sizes_that_mlflow_would_refuse(store: Store) -> None:
    make_run(store)
    odd = {f"eval/client/{name}/accuracy": 0.5 for name in ("a#b", "a?b", "//x", "..", "é" * 300)}
    many = {f"eval/client/{n}/accuracy": n / 2000 for n in range(2000)}
    with store.acquire("r1") as lease:
        tracker = make_tracker(store, lease)
        commit(lease, 1, **odd, **many, nothing=None)  # type: ignore[arg-type]
        commit(lease, 2, **odd, **many)
        lease.finish(RunState.CANCELLED)
        assert tracker.close(TIMEOUT_S).error is None
    metrics = shown(store).data.metrics
    assert len(metrics) == len(odd) + len(many) + 4
    assert metrics["eval/client/1999/accuracy"] == 1999 / 2000
    assert [step for step, _, _ in history(store, "eval/client/7/accuracy")] == [1, 2]


def test_where_to_look(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(Path("/srv")) == "sqlite:////srv/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow.example.org")
    assert run_url(tracking_uri(home), "7f") == "https://mlflow.example.org/#/runs/7f"


# --- once each ---


def test_a_resume_reopens_the_run(store: Store) -> None:
    make_run(store)
    train(store, "r1", range(1, 4), "Cancelled", prefect_flow_run={"id": "f-1", "url": "u-1"})
    first = store.run("r1").mlflow_run_id
    assert shown(store).info.status == "KILLED"

    with store.acquire("r1") as lease:
        lease.begin_attempt()
        tracker = make_tracker(store, lease, prefect_flow_run={"id": "f-2", "url": "u-2"})
        wait_until(lambda: shown(store).info.status == "RUNNING")
        commit(lease, 4)
        tracker.wake()
        wait_until(lambda: store.run("r1").tracked_round == 4)
        commit(lease, 5)
        lease.finish(RunState.COMPLETED)
        tracker.close(TIMEOUT_S)
    run = shown(store)
    assert run.info.run_id == first
    assert (run.info.status, run.data.tags["state"]) == ("FINISHED", "Completed")
    assert run.data.tags["prefect.flow_run_id"] == "f-1, f-2"
    assert run.data.tags["prefect.flow_run_url"] == "u-1, u-2"
    assert history(store, "best/accuracy") == expected(store, "best/accuracy", [0.5, 0.75, 0.75, 0.875, 0.875])


def test_a_replay_adds_no_row(store: Store) -> None:
    make_run(store)
    train(store, "r1", range(1, 6), "Cancelled")
    with store.acquire("r1") as lease:
        lease.note(tracked_round=1)
    train(store, "r1", range(6, 6), "Completed")
    for key in ("train/loss", "best/accuracy", "time/round_s"):
        assert [step for step, _, _ in history(store, key)] == [1, 2, 3, 4, 5]


def test_quick_rounds_are_logged_together(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is committed while the tracker rests waits for the next call, and closing ends the rest."""
    monkeypatch.setattr("fedrounds.tasks.tracking.tracker._REST_S", TIMEOUT_S)
    written: list[int] = []
    log_rounds = RunView.log_rounds

    def counted(view: RunView) -> int:
        written.append(log_rounds(view))
        return written[-1]

    monkeypatch.setattr(RunView, "log_rounds", counted)
    make_run(store)
    with store.acquire("r1") as lease:
        lease.begin_attempt()
        commit(lease, 1)
        tracker = make_tracker(store, lease)
        wait_until(lambda: written == [1])
        for n in range(2, 6):
            commit(lease, n)
            tracker.wake()
        lease.finish(RunState.COMPLETED)
        assert tracker.close(TIMEOUT_S).error is None
    assert written == [1, 4]
    assert history(store, "eval/accuracy") == expected(store, "eval/accuracy", ACCURACY)


@pytest.mark.parametrize(
    "notes_before_kill",
    [
        pytest.param(0, id="run made, id not noted", marks=pytest.mark.ci),
        pytest.param(3, id="round logged, cursor not moved", marks=pytest.mark.ci),
    ],
)
def test_killed_while_logging(store: Store, notes_before_kill: int) -> None:
    """kill -9 between what MLflow was told and what the store knows of it; then another process finishes the run."""
    script = """
import itertools, os, signal, sys
sys.path[:0] = sys.argv[2:]
from test_tracking import *
left = itertools.count(int(sys.argv[1]), -1)
note = Lease.note
def killed_note(self, **given):
    if next(left) == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    note(self, **given)
Lease.note = killed_note
with Store.open() as store, store.acquire("r1") as lease:
    lease.begin_attempt()
    tracker = make_tracker(store, lease)
    for n in range(1, 5):
        commit(lease, n)
        tracker.wake()
        wait_until(lambda: store.run("r1").tracked_round == n)
"""
    make_run(store)
    killed = subprocess.run([sys.executable, "-c", script, str(notes_before_kill), *python_path()])
    assert killed.returncode == -signal.SIGKILL
    before = store.run("r1")
    assert before.tracked_round == max(0, notes_before_kill - 1) < before.committed_round

    train(store, "r1", range(before.committed_round + 1, 6), "Completed")
    assert history(store, "eval/accuracy") == expected(store, "eval/accuracy", ACCURACY)
    assert history(store, "best/accuracy") == expected(store, "best/accuracy", [0.5, 0.75, 0.75, 0.875, 0.875])
    assert len(client(store).search_runs([shown(store).info.experiment_id])) == 1


def test_a_run_of_another_store_with_the_same_id_is_not_written_to(store: Store) -> None:
    other = client(store)
    theirs = other.create_run(other.create_experiment("digits"), tags={"fedrounds.run_id": "r1"})
    make_run(store)
    train(store, "r1", range(1, 2), "Completed")
    assert store.run("r1").mlflow_run_id != theirs.info.run_id
    assert other.get_run(theirs.info.run_id).data.metrics == {}


def test_another_mlflow_gets_all_rounds(store: Store, mlflow_template: Path, tmp_path: Path) -> None:
    make_run(store)
    train(store, "r1", range(1, 4), "Cancelled")
    other = tmp_path / "other.db"
    other.write_bytes(mlflow_template.read_bytes())
    uri = f"sqlite:///{other}"
    train(store, "r1", range(4, 6), "Completed", tracking_uri=uri)
    assert history(store, "eval/accuracy", uri=uri) == expected(store, "eval/accuracy", ACCURACY)


def test_a_superseded_process_writes_no_more(store: Store) -> None:
    make_run(store)
    with store.acquire("r1") as lease:
        tracker = make_tracker(store, lease)
        commit(lease, 1)
        tracker.wake()
        wait_until(lambda: store.run("r1").tracked_round == 1)
        lease.release()
        with store.acquire("r1") as successor:
            commit(successor, 2)
            tracker.wake()
            report = tracker.close(TIMEOUT_S)
            assert (report.pending_rounds, report.lacking, report.superseded) == (1, "1 round", True)
            assert report.error is not None
            assert "taken run r1 over" in report.error
            assert store.run("r1").tracked_round == 1


@pytest.mark.ci
def test_a_process_superseded_before_it_registers_registers_nothing(store: Store) -> None:
    make_run(store)
    successors: list[Lease] = []

    def superseded() -> LoggableModel:
        lease.release()
        successors.append(store.acquire("r1"))
        return make_model()

    with store.acquire("r1") as lease:
        tracker = make_tracker(store, lease, model=superseded)
        commit(lease, 1, digest_of(make_model()))
        lease.finish(RunState.COMPLETED)
        report = tracker.close(TIMEOUT_S)
    successors[0].release()
    assert (report.pending_rounds, report.lacking, report.superseded) == (0, "the model and the end", True)
    assert client(store).search_registered_models() == []
    assert shown(store).info.status == "RUNNING"


def test_a_process_superseded_before_it_closes_leaves_the_run_open(store: Store) -> None:
    make_run(store)
    successors: list[Lease] = []

    def superseded() -> None:
        lease.release()
        successors.append(store.acquire("r1"))

    with store.acquire("r1") as lease:
        tracker = make_tracker(store, lease, model=superseded)
        commit(lease, 1)
        lease.finish(RunState.COMPLETED)
        assert tracker.close(TIMEOUT_S).superseded
    successors[0].release()
    assert shown(store).info.status == "RUNNING"


def test_who_listens_does_not_end_the_tracker(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    def deaf(text: str) -> None:
        raise ValueError("no screen")

    make_run(store)
    with store.acquire("r1") as lease:
        tracker = make_tracker(store, lease, model=no_module, say=deaf)
        commit(lease, 1)
        lease.finish(RunState.COMPLETED)
        report = tracker.close(TIMEOUT_S)
    assert (report.error, report.lacking) == (None, "nothing")
    assert shown(store).info.status == "FINISHED"
    assert "the model of run r1 was not registered" in caplog.text


# --- MLflow is down ---


@pytest.mark.slow
def test_the_server_is_killed_and_started_again_between_rounds(store: Store, mlflow_server: Any) -> None:
    make_run(store)
    said: list[str] = []
    uri = mlflow_server.uri
    mlflow_server.start()
    with store.acquire("r1") as lease:
        lease.begin_attempt()
        tracker = make_tracker(
            store, lease, tracking_uri=uri, say=said.append, model=make_model, prefect_flow_run={"id": "f", "url": "u"}
        )
        commit(lease, 1)
        tracker.wake()
        wait_until(lambda: store.run("r1").tracked_round == 1)
        mlflow_server.kill()
        for n in (2, 3, 4):
            commit(lease, n)
            tracker.wake()
        wait_until(lambda: len(said) == 1)
        assert store.run("r1").tracked_round == 1
        mlflow_server.start()
        commit(lease, 5, digest_of(make_model()))
        lease.finish(RunState.COMPLETED)
        report = tracker.close(TIMEOUT_S)

    assert (report.pending_rounds, report.error) == (0, None)
    assert said == [
        f"MLflow at {uri} does not answer (connection refused); the training goes on, and what is missing is written "
        "as soon as it can be",
        "MLflow is back; 4 rounds were written late",
    ]
    assert history(store, "eval/accuracy", uri=uri) == expected(store, "eval/accuracy", ACCURACY)
    assert shown(store, uri=uri).info.status == "FINISHED"
    params_D, ancestor = load_start_parameters("models:/digits@challenger", tracking_uri=uri)
    assert ancestor == store.run("r1").model_uri == "models:/digits/1"
    assert np.array_equal(params_D, flatten(make_model().module))


@pytest.mark.ci
def test_an_mlflow_that_is_down_is_given_up_and_caught_up_with(store: Store) -> None:
    uri = unused_uri()
    make_run(store)
    model = make_model()
    with store.acquire("r1") as lease:
        tracker = make_tracker(store, lease, tracking_uri=uri)
        for n in range(1, 6):
            commit(lease, n, digest_of(model))
        lease.finish(RunState.COMPLETED)
        report = tracker.close(timeout_s=0.1)
    assert (report.pending_rounds, report.error) == (5, f"MLflow at {uri} does not answer (connection refused)")
    assert catch_up(store, tracking_uri=uri, say=print)["r1"] == report

    made_for: list[str] = []

    def make(run: RunRecord) -> LoggableModel:
        made_for.append(run.run_id)
        return model

    reports = catch_up(store, model=make, say=print)
    assert {key: (each.pending_rounds, each.error) for key, each in reports.items()} == {"r1": (0, None)}
    assert history(store, "eval/accuracy") == expected(store, "eval/accuracy", ACCURACY)
    assert shown(store).info.status == "FINISHED"
    assert shown(store).info.end_time == round(store.run("r1").updated_at * 1000)
    assert (made_for, store.run("r1").model_uri) == (["r1"], "models:/digits/1")
    assert catch_up(store, model=make, say=print) == {}


def test_an_mlflow_that_never_answers_is_given_up(store: Store) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        make_run(store)
        with store.acquire("r1") as lease:
            tracker = make_tracker(store, lease, tracking_uri=uri)
            commit(lease, 1)
            lease.finish(RunState.COMPLETED)
            report = tracker.close(timeout_s=0.2)
    assert (report.pending_rounds, report.error) == (1, f"MLflow at {uri} does not answer (no answer in time)")


def unused_uri() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_catching_up_leaves_alone_what_is_held_or_deleted(store: Store) -> None:
    for run_id in ("held", "deleted"):
        make_run(store, run_id)
    train(store, "deleted", range(1, 2), "Cancelled")
    with store.acquire("deleted") as lease:
        commit(lease, 2)
        lease.finish(RunState.FAILED)
    client(store).delete_run(store.run("deleted").mlflow_run_id)
    with store.acquire("held") as lease:
        commit(lease, 1)
        lease.finish(RunState.FAILED)
        assert catch_up(store, say=print) == {}
        assert store.run("held").tracked_round == 0
    assert list(catch_up(store, say=print)) == ["held"]


def test_catching_up_repairs_what_it_works_on_while_it_holds_the_lease(store: Store) -> None:
    for run_id in ("good", "bad", "last"):
        make_run(store, run_id)
        with store.acquire(run_id) as lease:
            commit(lease, 1)
            lease.finish(RunState.FAILED)
    repaired: list[str] = []

    def repair(run: RunRecord) -> None:
        with pytest.raises(LeaseHeld):
            store.acquire(run.run_id)
        if run.run_id == "bad":
            raise OSError("no server")
        repaired.append(run.run_id)

    reports = catch_up(store, repair=repair, say=print)
    assert repaired == ["good", "last"]
    assert {run_id: report.error for run_id, report in reports.items()} == {
        "good": None,
        "bad": "what Prefect shows of run bad cannot be put right: OSError: no server",
        "last": None,
    }
    assert list(catch_up(store, repair=lambda run: repaired.append(run.run_id), say=print)) == ["bad"]
    assert repaired == ["good", "last", "bad"]


def test_a_deleted_experiment_is_the_users_to_restore(store: Store) -> None:
    mlflow = client(store)
    experiment_id = mlflow.create_experiment("digits")
    mlflow.delete_experiment(experiment_id)
    make_run(store)
    said: list[str] = []
    with store.acquire("r1") as lease:
        tracker = make_tracker(store, lease, say=said.append)
        commit(lease, 1)
        tracker.wake()
        wait_until(lambda: len(said) == 1)
        assert f"mlflow experiments restore --experiment-id {experiment_id}" in said[0]
        mlflow.restore_experiment(experiment_id)
        lease.finish(RunState.COMPLETED)
        assert tracker.close(TIMEOUT_S).pending_rounds == 0
    assert history(store, "train/loss") == expected(store, "train/loss", [1.0])


# --- the model ---


def test_the_model_is_registered_and_predicts_at_any_batch_size(store: Store) -> None:
    import mlflow

    model = make_model()
    make_run(store)
    train(store, "r1", range(1, 2), "Completed", digest_of(model), model=lambda: model)

    version = client(store).get_model_version_by_alias("digits", "challenger")
    assert store.run("r1").model_uri == f"models:/digits/{version.version}"
    assert version.run_id == store.run("r1").mlflow_run_id
    assert version.tags == {
        "fedrounds.run_id": "r1",
        "params_digest": digest_of(model),
        "constants_digest": constants_digest(model.module),
        "privacy": "none",
    }
    assert shown(store).data.tags["registered_model"] == "models:/digits/1"
    outputs = shown(store).outputs.model_outputs
    assert len(outputs) == 1
    logged = client(store).get_logged_model(outputs[0].model_id)
    assert json.loads(logged.tags["mlflow.modelVersions"]) == [{"name": "digits", "version": version.version}]
    folder = mlflow.artifacts.download_artifacts(artifact_uri=version.source)
    assert not [path for path in Path(folder).rglob("*") if path.suffix in (".pkl", ".pth", ".pickle")]
    loaded = mlflow.pyfunc.load_model(folder)
    assert loaded.metadata.signature.inputs.inputs[0].shape == (-1, 4)
    for batch_size in (1, 7):
        inputs = np.random.default_rng(0).normal(size=(batch_size, 4)).astype(np.float32)
        with torch.no_grad():
            wanted = model.module(torch.from_numpy(inputs)).numpy()
        np.testing.assert_allclose(loaded.predict(inputs), wanted, atol=1e-5)


def test_a_model_of_a_simulated_cohort_is_registered_but_never_the_challenger(store: Store) -> None:
    """Its epsilon is another federation's: whoever promotes by the alias must not meet it."""
    model = make_model()
    simulated = PRIVATE["privacy"] | {"simulate_noise_cohort": 450}
    judged = {name: CONFIG[name] for name in ("task", "evaluation")}
    make_run(store, config=PRIVATE | judged | {"privacy": simulated})
    train(store, "r1", range(1, 2), "Completed", digest_of(model), model=lambda: model)
    (version,) = client(store).search_model_versions("name = 'digits'")
    assert version.tags["privacy"] == "simulated: no claim"
    assert client(store).get_registered_model("digits").aliases == {}


def test_a_training_starts_from_a_registered_model(store: Store) -> None:
    for run_id, seed in (("r1", 1), ("r2", 2)):
        model = make_model(seed=seed)
        make_run(store, run_id)
        train(store, run_id, range(1, 2), "Completed", digest_of(model), model=lambda model=model: model)

    params_D, ancestor = load_start_parameters("models:/digits@challenger")
    assert ancestor == "models:/digits/2"
    assert params_D.dtype == np.float32
    assert np.array_equal(params_D, flatten(make_model(seed=2).module))
    params_D, ancestor = load_start_parameters("models:/digits/1")
    assert (params_digest(params_D), ancestor) == (digest_of(make_model(seed=1)), "models:/digits/1")

    constants = constants_digest(make_model(seed=1).module)
    assert load_start_parameters("models:/digits/1", constants=constants)[1] == "models:/digits/1"
    with pytest.raises(ConfigError, match="models:/digits/1 was trained beside other frozen parameters"):
        load_start_parameters("models:/digits/1", constants="0" * 64)

    # The exported program has the same trainable parameters, in the same order.
    import mlflow

    source = client(store).get_model_version("digits", "1").source
    program = mlflow.pytorch.load_model(mlflow.artifacts.download_artifacts(artifact_uri=source))
    assert np.array_equal(flatten(program), params_D)


def test_start_parameters_that_are_not_there(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a registered model"):
        load_start_parameters("models:/digits")
    for uri in ("models:/digits@champion", "models:/digits/3"):
        with pytest.raises(ConfigError, match="is not in MLflow at sqlite"):
            load_start_parameters(uri)
    (tmp_path / "foreign").mkdir()
    mlflow = client(store)
    mlflow.create_registered_model("foreign")
    mlflow.create_model_version("foreign", source=(tmp_path / "foreign").as_uri())
    with pytest.raises(ConfigError, match="the parameters of models:/foreign/1 cannot be read"):
        load_start_parameters("models:/foreign/1")
    with pytest.raises(Unreachable, match="connection refused"):
        load_start_parameters("models:/digits/1", tracking_uri=unused_uri())


def test_a_process_killed_after_registering_registers_no_second_version(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(store)
    note = Lease.note

    def superseded_note(self: Lease, **given: Any) -> None:
        if "model_uri" in given:
            raise LeaseLost("another process has taken run r1 over")
        note(self, **given)

    monkeypatch.setattr(Lease, "note", superseded_note)
    with store.acquire("r1") as lease:
        tracker = make_tracker(store, lease, model=make_model)
        commit(lease, 1, digest_of(make_model()))
        lease.finish(RunState.COMPLETED)
        assert tracker.close(TIMEOUT_S).error == "another process has taken run r1 over"
    monkeypatch.undo()
    assert (store.run("r1").model_uri, shown(store).info.status) == (None, "RUNNING")

    assert list(catch_up(store, model=lambda run: make_model(), say=print)) == ["r1"]
    assert (store.run("r1").model_uri, shown(store).info.status) == ("models:/digits/1", "FINISHED")
    assert len(client(store).search_model_versions("name = 'digits'")) == 1


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        pytest.param(StoreError("the database is locked"), "the database is locked", id="store"),
        pytest.param(
            ConfigError("model.start_from is 'latest'"),
            "model.start_from is 'latest'",
            id="configuration",
            marks=pytest.mark.ci,
        ),
        pytest.param(
            ValueError("a bug"),
            "the model of run r1 cannot be built: ValueError: a bug",
            id="bug",
            marks=pytest.mark.ci,
        ),
    ],
)
def test_a_model_that_could_not_be_built_this_time_is_registered_another_time(
    store: Store, trouble: Exception, words: str
) -> None:
    def troubled() -> LoggableModel:
        raise trouble

    make_run(store)
    make_run(store, "r2")
    with store.acquire("r1") as lease:
        tracker = make_tracker(store, lease, model=troubled)
        commit(lease, 1, digest_of(make_model()))
        lease.finish(RunState.COMPLETED)
        report = tracker.close(timeout_s=0.1)
    assert (report.error, report.lacking, report.superseded) == (words, "the model and the end", False)
    with store.acquire("r2") as lease:
        commit(lease, 1)
        lease.finish(RunState.FAILED)

    reports = catch_up(store, model=lambda run: troubled(), say=print)
    assert {run_id: each.error for run_id, each in reports.items()} == {"r1": words, "r2": None}
    assert catch_up(store, model=lambda run: make_model(), say=print)["r1"].error is None
    assert (store.run("r1").model_uri, shown(store).info.status) == ("models:/digits/1", "FINISHED")


@pytest.mark.parametrize("dtype", ["float32", pytest.param("int64", marks=pytest.mark.ci)])
def test_a_model_that_was_damaged_on_its_way_is_not_registered(
    store: Store, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    import mlflow

    load_model = mlflow.pytorch.load_model

    def without_weights(path: str) -> torch.nn.Module:
        loaded = load_model(path)
        with torch.no_grad():
            for name, parameter in loaded.named_parameters():
                if name.endswith("weight"):
                    parameter.zero_()
        return loaded

    monkeypatch.setattr(mlflow.pytorch, "load_model", without_weights)
    layers = [torch.nn.Linear(4, 3)] if dtype == "float32" else [torch.nn.Embedding(5, 3), torch.nn.Flatten()]
    model = LoggableModel(torch.nn.Sequential(*layers).eval(), np.zeros((2, 4), dtype), "digits")
    make_run(store)
    said = train(store, "r1", range(1, 2), "Completed", model=lambda: model)
    words = "the model of run r1 was not registered: exported, it answers differently from the module for a batch of 1"
    assert said == [words]
    assert client(store).search_registered_models() == []


class Branching(torch.nn.Module):
    """What it does depends on the values that it is given: torch cannot export it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) if x.sum() > 0 else self.layer(-x)


class FixedBatch(torch.nn.Module):
    """It exports, but for the example's batch size only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * torch.ones(int(x.shape[0]), 1)


def no_module() -> LoggableModel:
    raise DataError("the data file is gone")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: LoggableModel(Branching().eval(), make_model().example, "digits"), "it cannot be exported: "),
        (
            lambda: LoggableModel(FixedBatch().eval(), make_model().example, "digits"),
            "it does not work for a batch of 1: ",
        ),
        (lambda: LoggableModel(Mlp().eval(), make_model().example, "a/b:c"), "MLflow refuses it: "),
        (no_module, "it cannot be built: the data file is gone"),
    ],
    ids=["not exportable", "one batch size", "bad name", "no module"],
)
def test_a_model_that_cannot_be_registered_does_not_fail_the_run(
    store: Store, model: Callable[[], LoggableModel], words: str
) -> None:
    make_run(store)
    said = train(store, "r1", range(1, 2), "Completed", model=model)
    assert len(said) == 1
    assert said[0].startswith("the model of run r1 was not registered: ")
    assert words in said[0]
    assert shown(store).info.status == "FINISHED"
    assert words in shown(store).data.tags["registered_model"]
    assert store.run("r1").model_uri is None
    assert client(store).search_model_versions() == []
