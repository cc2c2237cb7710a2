"""How examples/heart_disease.yaml got its settings, and what they give.

    python benchmarks/heart_disease_fedavg.py            # test accuracy of five seeds (some seconds)
    python benchmarks/heart_disease_fedavg.py --choose   # the choice: cross-validation inside the training rows

The choice never looks at a test row: each hospital's training rows are cut into five folds, and a setting is judged by
its mean log loss on the fold left out. Everything runs the product's own rules, through `simulate`.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from fedrounds.fl_components.config import load_config
from fedrounds.fl_components.data import HeartDisease
from fedrounds.fl_components.randomness import generator
from fedrounds.fl_components.simulate import simulate

CONFIG = Path(__file__).parents[1] / "examples" / "heart_disease.yaml"
FOLDS = 5
SEEDS = 5
GRID = {
    "training.learning_rate": (0.01, 0.03, 0.1),
    "training.momentum": (0.0, 0.9),
    "training.epochs": (1, 5),
    "training.batch_size": (16, 64),
}
ROUNDS = (20, 50)


def fold(number: int) -> dict[str, tuple[Any, Any, Any, Any]]:
    """Each hospital's training rows, of which fold `number` plays the test rows."""
    data = HeartDisease().load(seed=0)
    clients = {}
    for index, client_id in enumerate(data.client_ids):
        x, y = data.train(index)
        held_out = generator(0, 0, "folds", client_id).permutation(len(y)) % FOLDS == number
        clients[client_id] = x[~held_out], y[~held_out], x[held_out], y[held_out]
    return clients


def choose() -> None:
    """Print the settings, the best by log loss first."""
    rows = []
    for values in product(*GRID.values()):
        overrides = [f"{name}={value}" for name, value in zip(GRID, values, strict=True)]
        found: dict[int, list[tuple[float, float]]] = {rounds: [] for rounds in ROUNDS}
        for number in range(FOLDS):
            data = f"data={{kind: function, path: '{Path(__file__).stem}:fold', arguments: {{number: {number}}}}}"
            config = load_config(CONFIG, [*overrides, data, f"rounds={max(ROUNDS)}"])
            for step in simulate(config, str(Path(__file__).parent)):
                if step.round in found:
                    found[step.round].append((step.metrics["eval/loss"], step.metrics["eval/accuracy"]))
        for rounds, folds in found.items():
            loss, accuracy = (mean(column) for column in zip(*folds, strict=True))
            rows.append((loss, accuracy, f"rounds={rounds} " + " ".join(overrides)))
            print(f"{loss:.4f}  {accuracy:.4f}  {rows[-1][2]}", flush=True)
    print("\nlog loss  accuracy  setting (best first)")
    for loss, accuracy, setting in sorted(rows)[:10]:
        print(f"  {loss:.4f}    {accuracy:.4f}  {setting}")


def pooled_accuracy(seed: int) -> float:
    """The accuracy of the example's last round on all hospitals' test rows together."""
    *_, last = simulate(load_config(CONFIG, [f"seed={seed}"]))
    return last.metrics["eval/accuracy"]


def report() -> None:
    """Print the test accuracy of five seeds, and of the predictors that need no model."""
    accuracies = []
    for seed in range(SEEDS):
        accuracies.append(pooled_accuracy(seed))
        print(f"seed {seed}   pooled test accuracy {accuracies[-1]:.4f}")
    print(f"mean     {mean(accuracies):.4f}   standard deviation {np.std(accuracies, ddof=1):.4f}")
    for name, accuracy in HeartDisease().load(seed=0).baselines().items():
        print(f"{name.replace('_', ' ')}: {accuracy:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The settings of the heart disease example.")
    parser.add_argument("--choose", action="store_true", help="cross-validate the grid (some minutes)")
    choose() if parser.parse_args().choose else report()
