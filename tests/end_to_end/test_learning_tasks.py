"""A regression and three classes with names, trained from CSV files by the public API, up to MLflow's model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import clean_environment, told_by_mlflow

pytestmark = pytest.mark.ci

STAGES = ("mild", "moderate", "severe")

TRAIN = """
import json, sys
from fedrounds import runs, show, train
data = train(json.loads(sys.argv[1]))
print(json.dumps({"data": data, "history": show(data["run_id"])["history"], "runs": runs()}))
"""

LOGGED = """
run = client.get_run(sys.argv[1])
signature = mlflow.models.get_model_info(sys.argv[2]).signature
print(json.dumps({"metrics": run.data.metrics, "outputs": signature.outputs.to_dict()}))
"""


@pytest.fixture
def wards(tmp_path: Path) -> Path:
    """Three hospitals of 90 patients: the length of stay and the stage follow from two measurements."""
    generator, folder = np.random.default_rng(0), tmp_path / "wards"
    folder.mkdir()
    for ward in ("north", "south", "west"):
        x = generator.standard_normal((90, 2))
        days = 3 * x[:, 0] - 2 * x[:, 1] + 5 + 0.1 * generator.standard_normal(90)
        stages = [STAGES[int(place)] for place in np.digitize(x[:, 0], [-0.5, 0.5])]
        rows = [f"{a},{b},{d},{s}" for (a, b), d, s in zip(x, days, stages, strict=True)]
        (folder / f"{ward}.csv").write_text("\n".join(["a,b,days,stage", *rows]))
    return folder


def trained(home: Path, folder: Path, label: str, **changes: Any) -> Any:
    config = {
        "name": "wards",
        "rounds": 8,
        "data": {"kind": "tables", "folder": str(folder), "label": label, "columns": ["a", "b"], "public": True},
        "model": {"kind": "logistic_regression"},
        "training": {"learning_rate": 0.1, "epochs": 2, "batch_size": 16},
    }
    answer = subprocess.run(
        [sys.executable, "-c", TRAIN, json.dumps(config | changes)],
        env=clean_environment(home), cwd=home.parent, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout.splitlines()[-1])


def test_regression(home: Path, wards: Path) -> None:
    seen = trained(home, wards, "days", task={"kind": "regression"})
    data, metrics = seen["data"], seen["data"]["metrics"]
    assert data["primary_metric"] == seen["runs"][0]["primary_metric"] == "mse"
    assert metrics["eval/mse"] < 0.05 and metrics["eval/r2"] > 0.99 and 0 < metrics["eval/mae"] < 0.2
    assert metrics["eval/client/west/r2"] > 0.98 and "eval/mse/clients/median" in metrics
    assert data["baselines"]["pooled_mean"] > 5
    logged = told_by_mlflow(home, LOGGED, data["mlflow_run_id"], data["model_uri"])
    assert logged["metrics"]["eval/mse"] == pytest.approx(metrics["eval/mse"])
    assert logged["metrics"]["best/mse"] == min(row["metrics"]["eval/mse"] for row in seen["history"])
    (output,) = logged["outputs"]
    assert output["tensor-spec"] == {"dtype": "float32", "shape": [-1, 1]}


def test_three_classes_with_names(home: Path, wards: Path) -> None:
    names = ["loss", "accuracy", "balanced_accuracy", "f1", "auroc", "confusion_matrix"]
    data = trained(home, wards, "stage", evaluation={"metrics": names, "primary": "auroc"})["data"]
    metrics = data["metrics"]
    assert data["primary_metric"] == "auroc" and metrics["eval/auroc"] > 0.9
    assert metrics["eval/balanced_accuracy"] > 0.6 and metrics["eval/f1"] > 0.6
    counts = {(true, as_): metrics[f"eval/confusion_matrix/{true}/{as_}"] for true in STAGES for as_ in STAGES}
    assert sum(counts.values()) == 3 * 18  # a fifth of each hospital's patients
    assert sum(counts[stage, stage] for stage in STAGES) / 54 == pytest.approx(metrics["eval/accuracy"])
    logged = told_by_mlflow(home, LOGGED, data["mlflow_run_id"], data["model_uri"])["metrics"]
    assert logged["eval/confusion_matrix/mild/severe"] == counts["mild", "severe"]
