"""Stopping a run on request: between stages, resumable, and told everywhere."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from fedrounds.fl_components.config import load_config
from fedrounds.fl_components.store import Store
from tests.support import HEART, Fedrounds, data_of, prefect, start_fedrounds, wait_until
from tests.undisturbed import undisturbed_digest

ROUNDS = "rounds=12"


@pytest.mark.parametrize(
    ("how", "exit_code"),
    [
        pytest.param("Prefect's page", 1, marks=pytest.mark.ci),
        pytest.param("Ctrl-C", 130, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_goes_on_to_the_same_model(
    fedrounds: Fedrounds, home: Path, tmp_path: Path, how: str, exit_code: int
) -> None:
    profile = home.parent / "trace.json"
    process = start_fedrounds(home, "train", HEART, "--set", ROUNDS, "--run-id", "r", "--profile", str(profile))
    with Store.open(home) as store:

        def under_way() -> bool:
            run = store.find_run("r")
            return run is not None and run.committed_round >= 2

        wait_until(under_way, "two rounds")
        flow_run = store.run("r").prefect_flow_runs[0]
        api_url = flow_run["url"].partition("/runs/")[0] + "/api"
        if how == "Ctrl-C":
            process.send_signal(signal.SIGINT)
        else:  # what the button sends
            state = {"state": {"type": "CANCELLING", "name": "Cancelling"}}
            prefect(api_url, f"/flow_runs/{flow_run['id']}/set_state", state)
        assert process.wait(timeout=120) == exit_code
        stopped = store.run("r")
        assert stopped.state == "Cancelled"
        assert stopped.error is not None
        assert stopped.error["code"] == "cancelled"
        assert 2 <= stopped.committed_round < 12
        assert prefect(api_url, f"/flow_runs/{flow_run['id']}")["state"]["type"] == "CANCELLED"
        stages = [span["name"] for span in json.loads(profile.read_text())["traceEvents"] if span.get("cat") == "stage"]
        assert stages.count("commit") == stopped.committed_round
        assert "fedrounds resume r" in (home.parent / "fedrounds.log").read_text()

    resumed = data_of(fedrounds("resume", "--json"))
    assert (resumed["run_id"], resumed["state"], resumed["attempt"]) == ("r", "Completed", 2)
    assert resumed["params_digest"] == undisturbed_digest(load_config(HEART, [ROUNDS]), tmp_path / "undisturbed")


@pytest.mark.slow
def test_cancelling_one_round_stops_the_training(fedrounds: Fedrounds, home: Path) -> None:
    """The page of a round has a Cancel button too."""
    slow_rounds = ("--set", "training.epochs=300", "--set", ROUNDS)
    process = start_fedrounds(home, "train", HEART, *slow_rounds, "--run-id", "r")
    with Store.open(home) as store:
        wait_until(lambda: (run := store.find_run("r")) is not None and run.committed_round >= 1, "a round")
        flow_run = store.run("r").prefect_flow_runs[0]
        api_url = flow_run["url"].partition("/runs/")[0] + "/api"
        question = {"flow_runs": {"tags": {"all_": ["run:r"]}, "name": {"like_": "round-"}}, "sort": "START_TIME_DESC"}

        cancelled: list[str] = []

        def a_round_is_cancelled() -> bool:
            for child in prefect(api_url, "/flow_runs/filter", question):
                if child["state_type"] == "RUNNING":
                    state = {"state": {"type": "CANCELLING", "name": "Cancelling"}}
                    if prefect(api_url, f"/flow_runs/{child['id']}/set_state", state)["status"] == "ACCEPT":
                        cancelled.append(child["id"])
                        return True
            return False  # it was over before the button was reached

        wait_until(a_round_is_cancelled, "a round that runs is cancelled")
        (child,) = cancelled
        assert process.wait(timeout=120) == 1
        assert store.run("r").state == "Cancelled"
        assert prefect(api_url, f"/flow_runs/{child}")["state"]["type"] == "CANCELLED"
        assert prefect(api_url, f"/flow_runs/{flow_run['id']}")["state"]["type"] == "CANCELLED"
    assert data_of(fedrounds("resume", "--json"))["state"] == "Completed"


@pytest.mark.slow
def test_cancelling_after_the_last_round_comes_too_late(home: Path) -> None:
    process = start_fedrounds(home, "train", HEART, "--set", "rounds=2", "--run-id", "r")
    with Store.open(home) as store:
        wait_until(lambda: (run := store.find_run("r")) is not None and run.state == "Completed", "all rounds")
        flow_run = store.run("r").prefect_flow_runs[0]
        api_url = flow_run["url"].partition("/runs/")[0] + "/api"
        state = {"state": {"type": "CANCELLING", "name": "Cancelling"}}
        answer = prefect(api_url, f"/flow_runs/{flow_run['id']}/set_state", state)
        assert answer["status"] == "ACCEPT"
        assert process.wait(timeout=120) == 0
        assert prefect(api_url, f"/flow_runs/{flow_run['id']}")["state"]["type"] == "COMPLETED"
        assert store.run("r").model_uri is not None
