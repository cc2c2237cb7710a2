"""Accuracy under client-level differential privacy: MNIST, 1,000 clients of 60 images, epsilon 2, 4 and 8.

    python benchmarks/private_mnist.py --seeds 5
    python benchmarks/private_mnist.py --seeds 5 --model mlp --rounds 100 --plot docs/images/private-mnist.png

Poisson selection, one tenth of the clients a round; the noise multiplier is the smallest that keeps the epsilon (at
delta 1e-4, RDP) for all rounds. A seed decides the partition and the initial parameters; cohorts and noise come from a
new secret each time. The whole walk of a round with its store, without Prefect and MLflow. Needs MNIST's files.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fedrounds.fl_components.config import FederationConfig, parse_config
from fedrounds.fl_components.privacy import CentralPrivacy, neighbouring_of
from fedrounds.fl_components.privacy.calibration import least_noise
from fedrounds.fl_components.server import stages
from fedrounds.fl_components.server.opening import open_run
from fedrounds.fl_components.store import Store
from fedrounds.flows.round import walk

NUM_CLIENTS = 1000
MODELS: dict[str, dict[str, Any]] = {
    "logistic": {
        "model": {"kind": "logistic_regression"},
        "training": {"learning_rate": 0.1, "batch_size": 10, "epochs": 5},
    },
    "mlp": {
        "model": {"kind": "mlp", "hidden": [200, 200]},
        "training": {"learning_rate": 0.1, "batch_size": 10, "epochs": 2},
    },
}


def configuration(model: str, epsilon: float, rounds: int, seed: int, norm: float) -> FederationConfig:
    fields: dict[str, Any] = {
        "name": "private-mnist",
        "rounds": rounds,
        "seed": seed,
        "data": {"kind": "mnist", "partition": {"kind": "iid", "num_clients": NUM_CLIENTS}},
        "selection": {"kind": "poisson", "sampling_rate": 0.1},
        "aggregation": {"weights": "uniform"},
        "evaluation": {"every": max(1, rounds // 20), "per_client": False},
        "privacy": {
            "kind": "central",
            "noise_multiplier": 1.0,
            "clipping": {"kind": "fixed", "norm": norm},
            "delta": 1e-4,
        },
        **MODELS[model],
    }
    config = parse_config(fields)
    sampling, privacy = config.sampling(NUM_CLIENTS), config.privacy
    assert isinstance(privacy, CentralPrivacy)

    def spent(noise: float) -> dict[Any, int]:
        return {privacy.model_copy(update={"noise_multiplier": noise}).event(sampling): rounds}

    noise = least_noise(spent, neighbouring_of(sampling), epsilon, privacy.delta)
    fields["privacy"] |= {"noise_multiplier": noise, "epsilon": epsilon}
    return parse_config(fields)


def train(config: FederationConfig) -> tuple[list[tuple[int, float]], float]:
    """The test accuracies by round, and the epsilon after the last."""
    with (
        tempfile.TemporaryDirectory() as home,
        Store.open(Path(home)) as store,
        open_run(store, "r", config=config) as run,
    ):
        results = [walk(stages, run, round) for round in range(1, config.rounds + 1)]
    curve = [(each.round, each.metrics["eval/accuracy"]) for each in results if "eval/accuracy" in each.metrics]
    return curve, results[-1].metrics["privacy/epsilon"]


def draw(curves: dict[str, Sequence[tuple[int, float]]], title: str, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4))
    for label, curve in curves.items():
        axis.plot(*zip(*curve, strict=True), label=label)
    axis.set(xlabel="round", ylabel="test accuracy", title=title)
    axis.legend(frameon=False, loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*MODELS], default="logistic")
    parser.add_argument("--epsilons", type=float, nargs="+", default=[2.0, 4.0, 8.0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--norm", type=float, default=0.5, help="the clipping norm")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    curves: dict[str, Sequence[tuple[int, float]]] = {}
    print(f"{options.model}, {options.rounds} rounds, clipping norm {options.norm:g}", flush=True)
    for epsilon in options.epsilons:
        last = []
        for seed in range(options.seeds):
            config = configuration(options.model, epsilon, options.rounds, seed, options.norm)
            curve, spent = train(config)
            assert spent <= epsilon
            curves.setdefault(f"epsilon {epsilon:g}", curve)
            last.append(curve[-1][1])
        spread = stdev(last) if len(last) > 1 else 0.0
        noise = config.privacy.noise_multiplier  # type: ignore[attr-defined]
        values = " ".join(f"{each:.4f}" for each in last)
        print(
            f"epsilon {epsilon:g}  noise {noise:.3f}  accuracy {mean(last):.4f} +- {spread:.4f}  ({values})", flush=True
        )
    if options.plot:
        draw(curves, f"MNIST, 1,000 clients, {options.model}, delta 1e-4, first seed", options.plot)


if __name__ == "__main__":
    main()
