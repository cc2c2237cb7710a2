"""An audit by the command: what it says, and what Prefect and MLflow keep of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import HEART, PRIVATE, Fedrounds, data_of, told_by_mlflow


@pytest.mark.slow
def test_an_honest_mechanism_is_not_accused(fedrounds: Fedrounds, home: Path, tmp_path: Path) -> None:
    config = tmp_path / "private.yaml"
    config.write_text(json.dumps(PRIVATE | {"rounds": 1, "model": {"kind": "mlp", "hidden": [32]}}))
    data_of(fedrounds("train", config, "--run-id", "r", "--json"))
    found = data_of(fedrounds("audit", "r", "--canaries", "400", "--plot", tmp_path / "a.png", "--json"))
    assert (found["run_id"], found["claim_violated"], found["num_canaries"]) == ("r", False, 400)
    low, high = found["epsilon_interval"]
    assert low < found["claimed_epsilon"] < high
    assert found["verdict"].startswith("consistent with the claim")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert data_of(fedrounds("privacy", "status", "--json"))[0]["runs"][0]["rounds"] == 1  # nothing more is charged

    script = (
        'run = client.get_run(sys.argv[1]); print(json.dumps({"tags": run.data.tags, "metrics": run.data.metrics}))'
    )
    shown = told_by_mlflow(home, script, found["mlflow_run_id"])
    assert shown["tags"]["fedrounds.audit_of"] == "r" and shown["tags"]["claim_violated"] == "false"
    assert shown["metrics"]["audit/claimed_epsilon"] == pytest.approx(found["claimed_epsilon"])

    data_of(fedrounds("train", HEART, "--set", "rounds=1", "--run-id", "open", "--json"))
    refused = fedrounds("audit", "open", "--json")
    assert refused.returncode == 2
    assert "run open claims nothing" in json.loads(refused.stdout)["error"]["message"]
