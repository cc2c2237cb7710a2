"""An audit by the command: what it says, and what Prefect and MLflow keep of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import HEART, Fedrounds, clean_environment, data_of

PRIVATE = {
    "name": "digits",
    "rounds": 1,
    "data": {"kind": "digits", "partition": {"kind": "iid", "num_clients": 20}},
    "model": {"kind": "mlp", "hidden": [32]},
    "training": {"learning_rate": 0.1, "epochs": 1},
    "selection": {"kind": "poisson", "sampling_rate": 0.5},
    "aggregation": {"weights": "uniform"},
    "privacy": {"kind": "central", "noise_multiplier": 2.0, "clipping": {"kind": "fixed", "norm": 0.5}, "delta": 1e-3},
}


@pytest.mark.slow
def test_an_honest_mechanism_is_not_accused(fedrounds: Fedrounds, home: Path, tmp_path: Path) -> None:
    config = tmp_path / "private.yaml"
    config.write_text(json.dumps(PRIVATE))
    data_of(fedrounds("train", config, "--run-id", "r", "--json"))
    found = data_of(fedrounds("privacy", "audit", "r", "--canaries", "400", "--picture", tmp_path / "a.png", "--json"))
    assert (found["run_id"], found["accused"], found["num_canaries"]) == ("r", False, 400)
    low, high = found["epsilon_interval"]
    assert low < found["claimed_epsilon"] < high
    assert found["verdict"].startswith("not accused")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert data_of(fedrounds("privacy", "status", "--json"))[0]["runs"][0]["rounds"] == 1  # nothing more is charged

    shown = mlflow_of(home, found["mlflow_run_id"])
    assert shown["tags"]["fedrounds.audit_of"] == "r" and shown["tags"]["accused"] == "false"
    assert shown["metrics"]["audit/claimed_epsilon"] == pytest.approx(found["claimed_epsilon"])

    data_of(fedrounds("train", HEART, "--set", "rounds=1", "--run-id", "open", "--json"))
    refused = fedrounds("privacy", "audit", "open", "--json")
    assert refused.returncode == 2
    assert "run open claims nothing" in json.loads(refused.stdout)["error"]["message"]


def mlflow_of(home: Path, mlflow_run_id: str) -> dict[str, Any]:
    """In a process of its own: importing mlflow here would slow all other tests of this process."""
    script = """
import json, sys
from mlflow import MlflowClient
run = MlflowClient(tracking_uri=sys.argv[1]).get_run(sys.argv[2])
print(json.dumps({"tags": run.data.tags, "metrics": run.data.metrics}))
"""
    answer = subprocess.run(
        [sys.executable, "-c", script, f"sqlite:///{home / 'mlflow.db'}", mlflow_run_id],
        env=clean_environment(home), capture_output=True, text=True, check=True,
    )  # fmt: skip
    seen: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return seen
