"""`fedrounds up` and `fedrounds deploy`: scheduled trainings, each from the last one's model, cancelled and retried."""

from __future__ import annotations

import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedrounds.fl_components.store import RunRecord, Store
from tests.support import HEART, Fedrounds, data_of, prefect, start_fedrounds, wait_until

pytestmark = [pytest.mark.ci, pytest.mark.timeout(600)]
OVERRIDES = ["model.start_from=latest", "name=nightly"]


@pytest.fixture
def up(home: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The local stack, as a person starts it."""
    process = start_fedrounds(home, "up")
    log = home.parent / "fedrounds.log"
    wait_until(lambda: "Ctrl-C" in log.read_text(), "the stack is up")
    yield process
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)


def completed(store: Store) -> list[RunRecord]:
    """The runs whose model is registered, which is the last that a training does."""
    return [run for run in reversed(store.runs(name="nightly")) if run.model_uri is not None]


def test_a_schedule_fires_by_itself_and_goes_on_from_the_last_model(
    up: subprocess.Popen[bytes], fedrounds: Fedrounds, home: Path
) -> None:
    deployed = data_of(
        fedrounds(
            "deploy", HEART, "--set", "name=nightly", "--set", "rounds=3", "--cron", "* * * * *", "--active", "--json"
        )
    )
    api_url = deployed["url"].partition("/deployments/")[0] + "/api"
    deployment = f"/deployments/{deployed['deployment_id']}"
    with Store.open(home) as store:
        wait_until(lambda: len(completed(store)) >= 2, "two scheduled trainings", deadline_s=240)
        first, second = completed(store)[:2]
        assert first.ancestor is None
        assert second.ancestor == f"run:{first.run_id}"
        for run in (first, second):
            flow_run = prefect(api_url, f"/flow_runs/{run.prefect_flow_runs[0]['id']}")
            assert flow_run["name"] == f"nightly/{run.run_id}"
            assert flow_run["deployment_id"] == deployed["deployment_id"]
            assert flow_run["auto_scheduled"]
            assert run.state == "Completed"

        prefect(api_url, deployment, {"paused": True}, method="PATCH")
        cancel_and_retry(store, api_url, deployment)


def cancel_and_retry(store: Store, api_url: str, deployment: str) -> None:
    """Prefect's Cancel button stops a worker's training, and its Retry button goes on with the same run."""
    parameters = {"overrides": [*OVERRIDES, "rounds=25"]}
    body: dict[str, Any] = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
    flow_run_id = prefect(api_url, f"{deployment}/create_flow_run", body)["id"]
    run_id = flow_run_id.replace("-", "")[-12:]

    def state() -> str:
        name: str = prefect(api_url, f"/flow_runs/{flow_run_id}")["state"]["name"]
        return name

    wait_until(lambda: (run := store.find_run(run_id)) is not None and run.committed_round >= 2, "two rounds")
    set_state = f"/flow_runs/{flow_run_id}/set_state"
    prefect(api_url, set_state, {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    wait_until(lambda: state() == "Cancelled", "the flow run is cancelled")
    stopped = store.run(run_id)
    assert stopped.state == "Cancelled"
    assert 2 <= stopped.committed_round < 25
    prefect(api_url, set_state, {"state": {"type": "SCHEDULED", "name": "AwaitingRetry"}, "force": True})
    wait_until(lambda: state() == "Completed", "the retry completes")
    retried = store.run(run_id)
    assert (retried.state, retried.committed_round, retried.attempt) == ("Completed", 25, 2)
    children = prefect(
        api_url,
        "/flow_runs/filter",
        {"flow_runs": {"tags": {"all_": [f"run:{run_id}"]}, "name": {"like_": "round-"}}},
    )
    assert {child["name"] for child in children} == {f"round-{round:04d}" for round in range(1, 26)}
    ends = Counter(child["state"]["name"] for child in children)
    assert ends.keys() <= {"Completed", "Cancelled"}
    assert ends["Cancelled"] <= 1  # the round that the button met: after its commit, or it was run again
    assert len(children) - 25 <= ends["Cancelled"]
