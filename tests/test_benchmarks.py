"""The benchmarks still run, and reach what the documentation says."""

from __future__ import annotations

import runpy
from pathlib import Path
from statistics import mean

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.slow
def test_the_heart_disease_example_reaches_its_accuracy() -> None:
    benchmark = runpy.run_path(str(BENCHMARKS / "heart_disease_fedavg.py"))
    accuracies = [benchmark["pooled_accuracy"](seed) for seed in range(benchmark["SEEDS"])]
    assert mean(accuracies) >= 0.785, accuracies
