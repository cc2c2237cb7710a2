"""Real trainings, with Prefect's server and MLflow, killed at chosen and at random moments and resumed."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedrounds.fl_components.store import Store

Stack = Any  # conftest.py's
FEDERATION = str(Path(__file__).with_name("federation.yaml"))
ROUNDS = 6
TRAIN = ("train", FEDERATION, "--set", f"rounds={ROUNDS}", "--run-id")
FINAL = {"COMPLETED", "CRASHED", "FAILED", "CANCELLED"}


def journalled(kind: str, round: int | None = None) -> Callable[[Store, str], bool]:
    def condition(store: Store, run_id: str) -> bool:
        return any(row.kind == kind and row.content.get("round") == round for row in store.journal(run_id))

    return condition


def of_the_run(condition: Callable[[Any], Any]) -> Callable[[Store, str], bool]:
    return lambda store, run_id: (run := store.find_run(run_id)) is not None and bool(condition(run))


MOMENTS: dict[str, Callable[[Store, str], bool]] = {
    "run created": journalled("run.created"),
    "attempt begun": journalled("attempt.begun"),
    "round 1 authorised": journalled("charge.reserved", 1),
    "round 1 sealed": journalled("round.sealed", 1),
    "round 1 committed": journalled("round.committed", 1),
    "round 2 in MLflow": of_the_run(lambda run: run.tracked_round >= 2),
    "round 4 authorised": journalled("charge.reserved", 4),
    "round 5 sealed": journalled("round.sealed", 5),
    "last round committed": journalled("round.committed", ROUNDS),
    "run finished": journalled("run.finished"),
    "model registered": of_the_run(lambda run: run.model_uri),
}


def kill_at(stack: Stack, run_id: str, moment: str, *, resume: bool) -> None:
    command = stack.start(*(("resume", run_id) if resume else (*TRAIN, run_id)))
    with stack.store() as store:
        stack.wait(command, lambda: MOMENTS[moment](store, run_id), moment)
    command.kill()


def check(stack: Stack, run_id: str, data: dict[str, Any], digest: str, killed: int) -> None:
    """The store, MLflow and Prefect after the end of a training of which at most so many attempts were killed.

    (One that was killed before its flow run was made is not known to Prefect.)
    """
    assert (data["state"], data["committed_round"], data["params_digest"]) == ("Completed", ROUNDS, digest)
    with stack.store() as store:
        rounds = store.rounds(run_id)
        assert [each.round for each in rounds] == list(range(1, ROUNDS + 1))
        charges = [(each.round, each.collection, each.state) for each in store.ledger.collections(run_id=run_id)]
        assert charges == [(each, 1, "spent") for each in range(1, ROUNDS + 1)]
        store.verify_journal()
    check_mlflow(stack, run_id, data)
    check_prefect(stack, run_id, data, killed)


def check_mlflow(stack: Stack, run_id: str, data: dict[str, Any]) -> None:
    from fedrounds.tasks.tracking import server

    with server.quiet():
        client = server.connect(f"sqlite:///{stack.home}/mlflow.db")
        experiment = client.get_experiment_by_name(data["name"])
        (shown,) = client.search_runs([experiment.experiment_id], filter_string=f"tags.`fedrounds.run_id` = '{run_id}'")
        assert (shown.info.run_id, shown.info.status) == (data["mlflow_run_id"], "FINISHED")
        with stack.store() as store:
            committed = {each.round: each.result["metrics"] for each in store.rounds(run_id)}
        for key in shown.data.metrics:
            history = [(each.step, each.value) for each in client.get_metric_history(shown.info.run_id, key)]
            assert [step for step, _ in history] == list(range(1, ROUNDS + 1)), key
            if key != "best/accuracy":
                assert history == [(step, committed[step][key]) for step, _ in history], key
        assert shown.data.metrics.keys() == {*committed[ROUNDS], "best/accuracy"}
        versions = client.search_model_versions(f"name = '{data['name']}'")
        assert [each.run_id for each in versions].count(shown.info.run_id) == 1


def check_prefect(stack: Stack, run_id: str, data: dict[str, Any], killed: int) -> None:
    def states(kind: str) -> list[str]:
        return [each["state_type"] for each in stack.prefect(kind, run_id)]

    deadline = time.monotonic() + 60
    while not {*states("flow_runs"), *states("task_runs")} <= FINAL:  # Prefect writes task runs a second or two late
        assert time.monotonic() < deadline, (Counter(states("flow_runs")), Counter(states("task_runs")))
        time.sleep(0.1)
    attempts = [each for each in stack.prefect("flow_runs", run_id) if each["parent_task_run_id"] is None]
    assert [each["state_type"] for each in attempts] == ["CRASHED"] * (len(attempts) - 1) + ["COMPLETED"]
    assert len(attempts) <= killed + 1
    assert attempts[-1]["id"] == data["prefect_flow_run_id"]


@pytest.mark.ci
def test_a_killed_training_resumes_to_the_same_model(stack: Stack, undisturbed: Callable[[int], str]) -> None:
    kill_at(stack, "quick", "round 4 authorised", resume=False)
    data = stack.start("resume").end(0)  # the latest unfinished run is this one
    assert data["run_id"] == "quick"
    check(stack, "quick", data, undisturbed(ROUNDS), killed=1)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "moments",
    [
        pytest.param(["run created", "attempt begun", "round 1 authorised", "round 1 sealed"], id="beginning"),
        pytest.param(["round 1 committed", "round 2 in MLflow", "round 4 authorised", "round 5 sealed"], id="middle"),
        pytest.param(["last round committed", "run finished", "model registered"], id="end"),
    ],
)
def test_kill_after_kill(
    stack: Stack, undisturbed: Callable[[int], str], moments: list[str], request: pytest.FixtureRequest
) -> None:
    run_id = request.node.callspec.id
    for number, moment in enumerate(moments):
        kill_at(stack, run_id, moment, resume=number > 0)
    data = stack.start(*TRAIN, run_id).end(0)  # the same command again does what `resume` does
    check(stack, run_id, data, undisturbed(ROUNDS), killed=len(moments))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_superseded_command_that_wakes_changes_nothing_anywhere(
    stack: Stack, undisturbed: Callable[[int], str]
) -> None:
    """Stopped for longer than its lease, it must not declare its successor dead in Prefect either."""
    kill_at(stack, "woken", "round 1 committed", resume=False)
    stopped = stack.start("resume", "woken")
    with stack.store() as store:
        stack.wait(stopped, lambda: MOMENTS["round 2 in MLflow"](store, "woken"), "two rounds")
        os.kill(stopped.pid, signal.SIGSTOP)
        successor = stack.start("resume", "woken")
        stack.wait(successor, lambda: store.run("woken").attempt == 3, "the successor takes over")
    os.kill(stopped.pid, signal.SIGCONT)
    assert stopped.end(1)["code"] == "lease_lost"
    data = successor.end(0)
    assert (data["attempt"], data["params_digest"]) == (3, undisturbed(ROUNDS))
    check_mlflow(stack, "woken", data)
    flow_run = next(each for each in stack.prefect("flow_runs", "woken") if each["id"] == data["prefect_flow_run_id"])
    assert flow_run["state_type"] == "COMPLETED"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(3))
def test_kills_at_random_moments(stack: Stack, undisturbed: Callable[[int], str], seed: int) -> None:
    draws, run_id = random.Random(seed), f"random-{seed}"
    for number in range(2):
        command = stack.start(*(("resume", run_id) if number else (*TRAIN, run_id)))
        with stack.store() as store:
            run = store.find_run(run_id)
            after = draws.randint(run.committed_round if run else 0, ROUNDS - 1)
            stack.wait(
                command,
                lambda: (run := store.find_run(run_id)) is not None and run.committed_round >= after,  # noqa: B023
                f"round {after} is committed",
            )
        time.sleep(draws.uniform(0, 0.5))  # the random moment itself
        command.kill()
    check(stack, run_id, stack.start("resume", run_id).end(0), undisturbed(ROUNDS), killed=2)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_training_survives_the_death_of_prefects_server(stack: Stack, undisturbed: Callable[[int], str]) -> None:
    command = stack.start(*TRAIN, "server")
    with stack.store() as store:
        stack.wait(command, lambda: MOMENTS["round 4 authorised"](store, "server"), "round 4 authorised")
    os.kill(stack.server().pid, signal.SIGKILL)
    data = command.end(0)
    assert (data["state"], data["attempt"], data["params_digest"]) == ("Completed", 1, undisturbed(ROUNDS))
    check_mlflow(stack, "server", data)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_example_that_kills_a_training() -> None:
    example = Path(__file__).parents[2] / "examples" / "kill_and_resume.py"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    found = subprocess.run([sys.executable, example, "--seed", "1"], capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stdout + found.stderr
    in_peace, resumed = re.findall(r"^(?:in peace|resumed) +([0-9a-f]{64})$", found.stdout, re.M)
    assert in_peace == resumed
