"""Accuracy under example-level differential privacy: the heart disease data of four hospitals, epsilon 1 and 0.1.

    python benchmarks/private_heart.py --choose           # hyperparameters, on folds of the training rows alone
    python benchmarks/private_heart.py --seeds 40 --plot docs/images/private-heart.png

Each hospital answers for its own patients at delta 1e-3: DP-SGD with the least noise that keeps the epsilon (RDP) over
all rounds. Inputs lie between public bounds. The batches and the noise of each seed come from a new secret; the
split into training and test rows is the data set's own. The whole walk of a round with its store, without Prefect and
MLflow.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, quantiles, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from fedrounds.fl_components.config import FederationConfig, parse_config
from fedrounds.fl_components.data.heart_disease import HeartDisease
from fedrounds.fl_components.parameters import load_into
from fedrounds.fl_components.server import stages
from fedrounds.fl_components.server.assembly import assemble
from fedrounds.fl_components.server.opening import open_run
from fedrounds.fl_components.store import Store
from fedrounds.fl_components.training import ExampleTable
from fedrounds.fl_components.training.engine import Engine
from fedrounds.fl_components.values import SimulatedClient
from fedrounds.flows.round import walk

DELTA = 1e-3
FOLDS = 5

CHOSEN: dict[float, dict[str, Any]] = {
    1.0: {"rounds": 10, "learning_rate": 1.0, "max_grad_norm": 1.0, "sampling_rate": 1.0},
    0.1: {"rounds": 1, "learning_rate": 0.3, "max_grad_norm": 1.0, "sampling_rate": 1.0},
}
"""By --choose."""

GRID = {
    "rounds": [1, 3, 10, 30],
    "learning_rate": [0.1, 0.3, 1.0, 3.0],
    "max_grad_norm": [0.3, 1.0, 3.0],
    "sampling_rate": [1.0],
}


def configuration(epsilon: float, choice: dict[str, Any]) -> FederationConfig:
    return parse_config(
        {
            "name": "private-heart",
            "rounds": choice["rounds"],
            "data": {"kind": "heart_disease", "normalisation": "public_bounds"},
            "model": {"kind": "logistic_regression", "bias": False},
            "training": {
                "learning_rate": choice["learning_rate"],
                "steps": 1,
                "privacy": {
                    "kind": "example_level",
                    "target_epsilon": epsilon,
                    "max_grad_norm": choice["max_grad_norm"],
                    "sampling_rate": choice["sampling_rate"],
                    "delta": DELTA,
                },
            },
            "execution": {"processes": 1},
        }
    )


def folds() -> Iterator[tuple[list[tuple[Any, Any]], Any, Any]]:
    """Each hospital's training rows without a fifth of them, and all hospitals' fifths together."""
    data = HeartDisease(normalisation="public_bounds").load(seed=0)
    clients = [data.train(client) for client in range(data.num_clients)]
    orders = [np.random.default_rng(client).permutation(len(y)) for client, (_, y) in enumerate(clients)]
    for fold in range(FOLDS):
        left_out = [order[fold::FOLDS] for order in orders]
        kept = [np.setdiff1d(order, out) for order, out in zip(orders, left_out, strict=True)]
        yield (
            [(x[rows], y[rows]) for (x, y), rows in zip(clients, kept, strict=True)],
            np.concatenate([x[rows] for (x, _), rows in zip(clients, left_out, strict=True)]),
            np.concatenate([y[rows] for (_, y), rows in zip(clients, left_out, strict=True)]),
        )


def accuracy_on_folds(config: FederationConfig, seeds: int) -> float:
    """The mean over folds and secrets, by the engine and a mean weighted by rows."""
    module, found = assemble(config).module, []
    for clients, x_test, y_test in folds():
        stops = np.cumsum([len(y) for _, y in clients])
        starts = stops - [len(y) for _, y in clients]
        x, y = (torch.from_numpy(np.concatenate(each)) for each in zip(*clients, strict=True))
        engine = Engine(module, ExampleTable(x, y, starts, stops))
        num_parameters = sum(each.numel() for each in module.parameters())
        for _ in range(seeds):
            params_D = np.zeros(num_parameters, np.float32)
            updates_ND = np.empty((len(clients), num_parameters), np.float32)
            for round in range(1, config.rounds + 1):
                tasks = [
                    SimulatedClient(str(client), client, len(y), 0, key=os.urandom(32))
                    for client, (_, y) in enumerate(clients)
                ]
                engine.train(config.training.resolve(round, config.rounds), params_D, tasks, updates_ND)
                params_D = params_D + np.average(updates_ND, axis=0, weights=stops - starts).astype(np.float32)
            load_into(module, params_D)
            with torch.no_grad():
                found.append(float((module(torch.from_numpy(x_test)).argmax(1).numpy() == y_test).mean()))
    return mean(found)


def choose(epsilons: list[float], seeds: int) -> None:
    for epsilon in epsilons:
        tried = []
        for values in itertools.product(*GRID.values()):
            choice = dict(zip(GRID, values, strict=True))
            tried.append((accuracy_on_folds(configuration(epsilon, choice), seeds), choice))
        tried.sort(key=lambda each: -each[0])
        print(f"epsilon {epsilon:g}, {FOLDS} folds of the training rows, {seeds} secrets each")
        for accuracy, choice in tried[:8]:
            print(f"  {accuracy:.4f}  {choice}", flush=True)


def train(config: FederationConfig) -> tuple[list[float], float]:
    """The pooled test accuracy by round, and the largest epsilon of a hospital after the last."""
    with (
        tempfile.TemporaryDirectory() as home,
        Store.open(Path(home)) as store,
        open_run(store, "r", config=config) as run,
    ):
        results = [walk(stages, run, round) for round in range(1, config.rounds + 1)]
    return [each.metrics["eval/accuracy"] for each in results], results[-1].metrics["privacy/example/epsilon"]


def draw(curves: dict[str, list[list[float]]], baselines: dict[str, float], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4))
    for (label, runs), colour in zip(curves.items(), ("C0", "C1"), strict=False):
        rounds = range(1, len(runs[0]) + 1)
        low, _, high = zip(*(quantiles(each, n=4) for each in zip(*runs, strict=True)), strict=True)
        axis.plot(rounds, [mean(each) for each in zip(*runs, strict=True)], color=colour, marker="o", ms=4, label=label)
        axis.fill_between(rounds, low, high, color=colour, alpha=0.2, lw=0)
    for (name, value), style in zip(baselines.items(), ("--", ":"), strict=True):
        axis.axhline(value, color="#888888", lw=1, ls=style, label=name.replace("_", " "))
    axis.set(xlabel="round", ylabel="pooled test accuracy", title="Heart disease, each hospital's patients protected")
    axis.legend(frameon=False, loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choose", action="store_true")
    parser.add_argument("--epsilons", type=float, nargs="+", default=[*CHOSEN])
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if options.choose:
        choose(options.epsilons, options.seeds)
        return
    baselines = assemble(configuration(1.0, CHOSEN[1.0])).baselines
    curves: dict[str, list[list[float]]] = {}
    print(", ".join(f"{name} {value:.3f}" for name, value in baselines.items()))
    for epsilon in options.epsilons:
        config = configuration(epsilon, CHOSEN[epsilon])
        noise = config.training.resolve(1, config.rounds).privacy.noise_multiplier  # type: ignore[attr-defined]
        for _ in range(options.seeds):
            curve, spent = train(config)
            assert spent <= epsilon
            curves.setdefault(f"epsilon {epsilon:g}", []).append(curve)
        last = [curve[-1] for curve in curves[f"epsilon {epsilon:g}"]]
        print(
            f"epsilon {epsilon:g}  noise {noise:.3f}  {CHOSEN[epsilon]}  accuracy {mean(last):.4f} +- "
            f"{stdev(last):.4f}, from {min(last):.4f} to {max(last):.4f}, {len(last)} seeds",
            flush=True,
        )
    if options.plot:
        draw(curves, baselines, options.plot)


if __name__ == "__main__":
    main()
