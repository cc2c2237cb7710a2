"""Four hospitals that answer for their patients, by the command, and what Prefect and MLflow keep of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import ROOT, Fedrounds, data_of, told_by_mlflow

EXAMPLE = ROOT / "examples" / "heart_disease_private.yaml"
HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")


@pytest.mark.slow
def test_the_example(fedrounds: Fedrounds, home: Path) -> None:
    data = data_of(fedrounds("train", EXAMPLE, "--run-id", "r", "--json"))
    assert (data["state"], data["privacy"]["unit"], data["privacy"]["delta"]) == ("Completed", "example", 1e-3)
    assert 0.99 < data["privacy"]["epsilon"] <= 1
    assert data["privacy"]["clients"].keys() == {*HOSPITALS}
    assert data["metrics"]["eval/accuracy"] > 0.75

    script = (
        "run = client.search_runs([client.get_experiment_by_name(sys.argv[1]).experiment_id])[0]; "
        "artifacts = [each.path for each in client.list_artifacts(run.info.run_id)]; "
        'print(json.dumps({"tags": run.data.tags, "metrics": run.data.metrics, "artifacts": artifacts}))'
    )
    shown = told_by_mlflow(home, script, "heart-private")
    assert shown["metrics"]["privacy/example/epsilon"] == pytest.approx(data["privacy"]["epsilon"])
    assert {f"privacy/example/client/{name}" for name in HOSPITALS} <= shown["metrics"].keys()
    assert "privacy_statement.md" in shown["artifacts"]
    assert any("(example, zero_out)" in value for value in shown["tags"].values())

    found = data_of(fedrounds("audit", "r", "--json"))
    assert (found["claim_violated"], found["num_canaries"], found["num_releases"]) == (False, 1000, 10)
    data_of(fedrounds("journal", "verify", "--json"))

    # The same files as private data, of which each hospital has a budget of its own.
    private = [EXAMPLE, "--set", "rounds=1", "--set", "data.public=false", "--set", "population=hospitals"]
    for whose, epsilon in (("*", "10"), ("va", "0.01")):
        terms = ["--epsilon", epsilon, "--delta", "1e-3", "--reason", "a test"]
        data_of(fedrounds("privacy", "budget", "set", f"hospitals/{whose}", *terms, "--json"))
    again = data_of(fedrounds("train", *private, "--run-id", "s", "--json"))
    assert "va" not in again["privacy"]["clients"] and again["metrics"]["clients/rejected"] == 1
    data_of(fedrounds("privacy", "budget", "set", "hospitals/*", "--epsilon", "0.01", "--reason", "a test", "--json"))
    refused = fedrounds("train", *private, "--run-id", "t", "--json")
    assert refused.returncode == 5
    assert "examples of client 'hospitals/" in json.loads(refused.stdout)["error"]["message"]
