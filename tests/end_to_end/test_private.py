"""A training that ends where its budget does, and what each view then says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedrounds.fl_components.privacy.accountants import rdp_epsilon
from fedrounds.fl_components.privacy.events import Gaussian, PoissonSampled
from fedrounds.fl_components.store import Store
from tests.end_to_end.test_train import Served
from tests.support import PRIVATE, Fedrounds, data_of, prefect, told_by_mlflow

WARDS = """
import numpy as np

def load():
    wards = {}
    for ward in range(40):
        x = np.random.default_rng(ward).normal(size=(30, 4)).astype("float32")
        y = (x.sum(1) > 0).astype("int64")
        wards[f"ward-{ward}"] = (x[:20], y[:20], x[20:], y[20:])
    return wards
"""
SHOWN = """
run = client.get_run(sys.argv[1])
version = client.get_model_version_by_alias("wards", "challenger")
print(json.dumps({
    "status": run.info.status, "tags": run.data.tags, "version_tags": version.tags,
    "metrics": list(run.data.metrics), "described": version.description,
    "epsilons": [metric.value for metric in client.get_metric_history(sys.argv[1], "privacy/epsilon")],
    "statement": mlflow.artifacts.load_text(f"runs:/{sys.argv[1]}/privacy_statement.md"),
}))
"""
FIELDS = PRIVATE | {
    "name": "wards",
    "population": "hospital",
    "rounds": 6,
    "data": {"kind": "function", "path": "our_wards:load", "num_classes": 2},
}


@pytest.mark.ci
def test_a_budget_ends_a_training_with_its_model_saved(fedrounds: Fedrounds, home: Path, tmp_path: Path) -> None:
    (tmp_path / "our_wards.py").write_text(WARDS)
    config = tmp_path / "wards.yaml"
    config.write_text(json.dumps(FIELDS))

    refused = fedrounds("train", config, "--json")
    assert refused.returncode == 2
    assert "population 'hospital' has no privacy budget" in json.loads(refused.stdout)["error"]["message"]

    event = PoissonSampled(sampling_rate=0.5, event=Gaussian(noise_multiplier=1.5))
    three = rdp_epsilon({event: 3}, "add_or_remove", 1e-3)
    limit = ["--epsilon", f"{three + 1e-6}", "--delta", "1e-3", "--reason", "a test"]
    data_of(fedrounds("privacy", "budget", "set", "hospital", *limit, "--json"))

    ended = fedrounds("train", config, "--run-id", "r", "--json")
    assert ended.returncode == 5, ended.stderr
    error = json.loads(ended.stdout)["error"]
    assert error["code"] == "budget_exhausted" and "population 'hospital'" in error["message"]
    assert "fedrounds privacy budget set hospital" in error["hint"]

    data = data_of(fedrounds("show", "r", "--json"))
    assert (data["state"], data["committed_round"]) == ("BudgetExhausted", 3)
    assert data["privacy"]["epsilon"] == pytest.approx(three)
    assert 0 < data["privacy"]["epsilon_tightest"] < three
    assert data["model_uri"] == "models:/wards/1"
    assert (data["seconds"], data["communication"]) == (None, {"upload_bytes": None, "download_bytes": None})
    assert all(name.startswith("privacy/") for name in data["metrics"])
    (status,) = data_of(fedrounds("privacy", "status", "--json"))
    assert status["epsilon"] <= status["epsilon_limit"]
    with Served(home) as api_url:
        verified = data_of(fedrounds("journal", "verify", "--json"))
        assert (verified["anchors"], verified["not_reached"]) == (2, [])  # one in MLflow, one in Prefect
        flow_run = prefect(api_url, f"/flow_runs/{data['prefect_flow_run_id']}")
        assert (flow_run["state"]["type"], flow_run["state"]["name"]) == ("COMPLETED", "BudgetExhausted")
        asked = {"artifacts": {"flow_run_id": {"any_": [flow_run["id"]]}}}
        (artifact,) = prefect(api_url, "/artifacts/filter", asked)
        assert "Population `hospital`: `██████████████████████████████`" in artifact["data"]
        assert "ward-" not in json.dumps(prefect(api_url, "/logs/filter", {}))

    shown = told_by_mlflow(home, SHOWN, data["mlflow_run_id"])
    assert shown["status"] == "FINISHED"
    assert shown["epsilons"] == pytest.approx([rdp_epsilon({event: n}, "add_or_remove", 1e-3) for n in (1, 2, 3)])
    assert (
        shown["tags"]["privacy"].startswith("epsilon ") and shown["version_tags"]["privacy"] == shown["tags"]["privacy"]
    )
    assert "| The population in all |" in shown["statement"] and "# Privacy statement of run r" in shown["described"]
    assert not [name for name in shown["metrics"] if not name.startswith("privacy/")]

    with Store.open(home) as store:
        assert all("eval/accuracy" in row.withheld["metrics"] for row in store.rounds("r"))
