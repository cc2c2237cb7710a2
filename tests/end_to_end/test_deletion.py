"""Runs are deleted from the store, from Prefect and from MLflow; what they have spent is not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import HEART, Fedrounds, clean_environment

PRIVATE = (
    *(
        "--set",
        "rounds=1",
        "--set",
        "privacy={kind: central, noise_multiplier: 1.0, clipping: {kind: fixed, norm: 0.5}}",
    ),
    *("--set", "selection={kind: poisson, sampling_rate: 0.5}", "--set", "aggregation={weights: uniform}"),
)

SHOWN = """
import json, sys
from fedrounds.deployments.stack.connection import client_settings, connect
from fedrounds.fl_components.store import Store
from fedrounds.tasks.tracking import server
with connect(idle_s=20) as connection, client_settings(connection):
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
    with get_client(sync_client=True) as client:
        prefect = {
            run: sorted(each.name for each in client.read_flow_runs(
                flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=[f"run:{run}"]))))
            for run in sys.argv[1:]
        }
        pages = sorted(each.key for each in client.read_artifacts() if each.key.startswith("run-"))
with Store.open() as store:
    mlflow = server.connect(server.tracking_uri(store.home))
    experiment = mlflow.get_experiment_by_name("heart-disease")
    logged = [each.data.tags["fedrounds.run_id"] for each in mlflow.search_runs([experiment.experiment_id])]
    versions = [int(each.version) for each in mlflow.search_model_versions("name = 'heart-disease'")]
print(json.dumps({"prefect": prefect, "pages": pages, "mlflow": sorted(logged), "versions": sorted(versions)}))
"""


def data_of(answer: subprocess.CompletedProcess[str]) -> Any:
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)["data"]


def shown(home: Path, *runs: str) -> Any:
    """What Prefect and MLflow have of these runs."""
    command = [sys.executable, "-c", SHOWN, *runs]
    done = subprocess.run(command, env=clean_environment(home), cwd=home, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_runs_are_deleted_everywhere_and_their_charges_stay(home: Path, fedrounds: Fedrounds) -> None:
    for run in ("one", "two"):
        assert data_of(fedrounds("train", HEART, *PRIVATE, "--run-id", run, "--json"))["state"] == "Completed"
    before = data_of(fedrounds("privacy", "status", "--json"))
    seen = shown(home, "one", "two")
    assert (seen["mlflow"], seen["versions"], seen["pages"]) == (["one", "two"], [1, 2], ["run-one", "run-two"])
    assert seen["prefect"]["one"] == ["heart-disease/one", "round-0001"]

    dry = data_of(fedrounds("prune", "--keep", "1", "--dry-run", "--json"))
    assert [run["run_id"] for run in dry["runs"]] == ["one"]
    assert shown(home, "one", "two") == seen

    found = data_of(fedrounds("prune", "--keep", "1", "--mlflow", "--yes", "--json"))
    assert [run["run_id"] for run in found["runs"]] == ["one"]
    assert found["prefect"] == {"flow_runs": 2, "problem": None}
    assert found["mlflow"] == {"runs": 1, "model_versions": 1, "kept": {}, "problem": None}
    after = shown(home, "one", "two")
    assert after["prefect"] == {"one": [], "two": seen["prefect"]["two"]}
    assert (after["pages"], after["mlflow"], after["versions"]) == (["run-two"], ["two"], [2])

    found = data_of(fedrounds("runs", "delete", "two", "--mlflow", "--yes", "--json"))
    assert found["mlflow"]["kept"] == {"two": "version 2 of the model heart-disease is its challenger"}
    after = shown(home, "one", "two")
    assert after["prefect"] == {"one": [], "two": []}
    assert (after["pages"], after["mlflow"], after["versions"]) == ([], ["two"], [2])
    assert not [path for path in (home / "blobs").rglob("*") if path.is_file()]
    assert list((home / "secrets" / "runs").iterdir()) == []

    assert data_of(fedrounds("runs", "--json")) == []
    assert [run["state"] for run in data_of(fedrounds("runs", "--all", "--json"))] == ["Deleted", "Deleted"]
    still = data_of(fedrounds("privacy", "status", "--json"))
    assert [each["epsilon"] for each in still] == [each["epsilon"] for each in before]
    population = before[0]["population"]
    assert [charge["run_deleted"] for charge in data_of(fedrounds("privacy", "ledger", population, "--json"))] == [
        True,
        True,
    ]
    statement = fedrounds("privacy", "statement", "one").stdout
    assert "This run was deleted. What it has spent stays." in statement
    assert "Gaussian noise of 1 times that norm" in statement
    one = data_of(fedrounds("show", "one", "--json"))
    assert (one["state"], one["history"], one["privacy"]["epsilon"] > 0) == ("Deleted", [], True)
    assert data_of(fedrounds("journal", "verify", "--json"))["rows"] > 10
    for line in (["resume", "one"], ["audit", "one"], ["train", HEART, *PRIVATE, "--run-id", "one"]):
        refused = fedrounds(*line)
        assert refused.returncode == 2, refused.stderr
        assert "was deleted" in refused.stderr
