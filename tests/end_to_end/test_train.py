"""The main job, by the console script, on the embedded servers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedrounds.fl_components.config import load_config
from fedrounds.fl_components.simulate import simulate
from fedrounds.fl_components.store import Store
from fedrounds.fl_components.values import ServerState
from tests.support import HEART, Fedrounds, clean_environment, data_of, prefect, server_stays, told_by_mlflow

STAGES = [
    *("load", "broadcast", "select", "authorise", "train", "compress", "admit"),
    *("aggregate", "server_step", "evaluate", "commit", "track"),
]
DATA = {  # the object of docs/operations.md
    "run_id", "state", "rounds", "params_digest", "metrics", "privacy", "communication", "seconds", "mlflow_run_id",
    "prefect_flow_run_id",
}  # fmt: skip


def test_four_hospitals_train_and_every_view_shows_it(fedrounds: Fedrounds, home: Path) -> None:
    """One training, and all that it leaves: the answer, the store, Prefect's runs, MLflow's run and model."""
    arguments = ["train", HEART, "--set", "rounds=3", "--run-id", "heart-1", "--profile", home / "trace.json", "--json"]
    with server_stays(home):
        answer = fedrounds(*arguments)
        data = data_of(answer)
        assert data.keys() >= DATA
        with Served(home) as api_url:
            check_prefect(api_url, data)
    spans = [each for each in json.loads((home / "trace.json").read_text())["traceEvents"] if each["ph"] == "X"]
    assert [span["name"] for span in spans if span["cat"] == "stage"] == [s for s in STAGES if s != "track"] * 3
    assert "temporary server" not in answer.stderr  # Prefect would start one for whatever is logged after the flow
    assert data["peak_memory_mb"] > 100
    assert (data["run_id"], data["state"], data["rounds"]) == ("heart-1", "Completed", 3)
    assert set(data["privacy"].values()) == {None}
    assert data["privacy"].keys() >= {"epsilon", "epsilon_tightest", "delta", "unit", "neighbouring", "accountant"}
    assert data["baselines"]["pooled_majority"] == pytest.approx(0.516, abs=5e-4)
    assert data["baselines"]["client_majority"] == pytest.approx(0.638, abs=5e-4)
    shown = data_of(fedrounds("show", "heart-1", "--json"))
    assert {name: shown[name] for name in data} == data
    assert [entry["round"] for entry in shown["history"]] == [1, 2, 3]

    config = load_config(HEART, ["rounds=3"])
    *_, reference = simulate(config)
    with Store.open(home) as store:
        state = ServerState.from_bytes(store.state_blob("heart-1"))
        np.testing.assert_allclose(state.params_D, reference.params_D, atol=1e-5)
        assert state.params_digest == data["params_digest"] == store.run("heart-1").params_digest
        assert store.verify_journal().rows > 0
    assert data["metrics"]["eval/accuracy"] == pytest.approx(reference.metrics["eval/accuracy"])

    check_mlflow(home, data)


class Served:
    """The home's Prefect server, asked after the training."""

    def __init__(self, home: Path) -> None:
        from fedrounds.deployments.stack.connection import connect

        before = dict(os.environ)
        try:
            os.environ.clear()
            os.environ.update(clean_environment(home))
            self.connection = connect(home, idle_s=0.5)
        finally:
            os.environ.clear()
            os.environ.update(before)

    def __enter__(self) -> str:
        return self.connection.wait()

    def __exit__(self, *_: object) -> None:
        self.connection.close()


def check_prefect(api_url: str, data: dict[str, Any]) -> None:
    parent = prefect(api_url, f"/flow_runs/{data['prefect_flow_run_id']}")
    assert parent["name"] == "heart-disease/heart-1"
    assert parent["state"]["type"] == "COMPLETED"
    assert {"run:heart-1", "population:heart-disease", "experiment:heart-disease"} <= set(parent["tags"])
    flow_runs = prefect(api_url, "/flow_runs/filter", {"flow_runs": {"tags": {"all_": ["run:heart-1"]}}})
    rounds = {run["name"]: run for run in flow_runs if run["id"] != parent["id"]}
    assert sorted(rounds) == ["round-0001", "round-0002", "round-0003"]
    assert {run["state"]["type"] for run in rounds.values()} == {"COMPLETED"}
    assert all({"run:heart-1", "attempt:1"} <= set(run["tags"]) for run in rounds.values())
    children = prefect(api_url, "/task_runs/filter", {"flow_runs": {"id": {"any_": [parent["id"]]}}})
    placeholders = {run["id"]: run["name"] for run in children}
    assert {name: placeholders[run["parent_task_run_id"]] for name, run in rounds.items()} == {
        name: name for name in rounds
    }
    task_runs = prefect(
        api_url,
        "/task_runs/filter",
        {"flow_runs": {"id": {"any_": [rounds["round-0002"]["id"]]}}, "sort": "EXPECTED_START_TIME_ASC"},
    )
    assert [run["name"] for run in task_runs] == STAGES
    assert {run["state"]["type"] for run in [*task_runs, *children]} == {"COMPLETED"}
    assert [run["tags"] for run in task_runs] == [[]] * len(STAGES)  # Prefect would ask for a limit of each tag
    artifacts = prefect(api_url, "/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [parent["id"]]}}})
    assert len(artifacts) == 1
    assert "**3 of 3 rounds** committed" in artifacts[0]["data"]


def check_mlflow(home: Path, data: dict[str, Any]) -> None:
    script = """
run = client.get_run(sys.argv[1])
version = client.get_model_version_by_alias("heart-disease", "challenger")
print(json.dumps({
    "status": run.info.status, "params": run.data.params, "tags": run.data.tags, "version_tags": version.tags,
    "steps": [metric.step for metric in client.get_metric_history(sys.argv[1], "eval/accuracy")],
}))
"""
    seen = told_by_mlflow(home, script, data["mlflow_run_id"])
    assert seen["status"] == "FINISHED"
    assert seen["steps"] == [1, 2, 3]
    assert seen["params"]["training.learning_rate"] == "0.1"
    assert seen["tags"]["prefect.flow_run_id"] == data["prefect_flow_run_id"]
    assert seen["version_tags"]["fedrounds.run_id"] == "heart-1"


@pytest.mark.ci
def test_a_mistake_is_told_before_anything_runs(fedrounds: Fedrounds) -> None:
    completed = fedrounds("train", HEART, "--set", "training.learning_rat=1", "--json")
    assert completed.returncode == 2
    answer = json.loads(completed.stdout)
    assert answer["error"]["code"] == "configuration"
    assert "did you mean learning_rate" in answer["error"]["message"]
    assert json.loads(fedrounds("runs", "--json").stdout)["data"] == []
