"""Example-level differential privacy on MNIST in one client: the setting of TensorFlow Privacy's tutorial (z = 1.3, 15
epochs, 256 of 60,000 images expected in a batch; 95.0 % there, with a small CNN).

    python benchmarks/mnist_examples.py --seeds 3
    python benchmarks/mnist_examples.py --model cnn

A seed decides the initial parameters; batches and noise come from a new secret each time. The whole walk of a round (an
epoch) with its store, without Prefect and MLflow. Needs MNIST's files.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fedrounds.fl_components.config import parse_config
from fedrounds.fl_components.reports import events_of, tightest_epsilon
from fedrounds.fl_components.server import stages
from fedrounds.fl_components.server.opening import open_run
from fedrounds.fl_components.store import Store
from fedrounds.flows.round import walk

MODELS: dict[str, dict[str, Any]] = {
    "2nn": {"kind": "mlp", "hidden": [200, 200]},
    "cnn": {"kind": "cnn", "channels": [16, 32], "hidden": 32},
    "small cnn": {"kind": "cnn", "channels": [8, 16], "hidden": 32},
    "logistic": {"kind": "logistic_regression"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*MODELS], default="2nn")
    parser.add_argument("--noise", type=float, default=1.3)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--norm", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=0.5)
    parser.add_argument("--schedule", choices=["constant", "cosine"], default="constant")
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    for seed in range(options.seeds):
        config = parse_config(
            {
                "name": "mnist-examples",
                "rounds": options.epochs,
                "seed": seed,
                "data": {"kind": "mnist", "partition": {"kind": "iid", "num_clients": 1}},
                "model": MODELS[options.model],
                "training": {
                    "learning_rate": options.learning_rate,
                    "schedule": {"kind": options.schedule},
                    "steps": 234,
                    "privacy": {
                        "kind": "example_level",
                        "noise_multiplier": options.noise,
                        "max_grad_norm": options.norm,
                        "sampling_rate": 256 / 60_000,
                        "delta": 1e-5,
                    },
                },
                "evaluation": {"per_client": False},
                "execution": {"processes": 1},
            }
        )
        began = time.perf_counter()
        with (
            tempfile.TemporaryDirectory() as home,
            Store.open(Path(home)) as store,
            open_run(store, "r", config=config) as run,
        ):
            results = [walk(stages, run, round) for round in range(1, config.rounds + 1)]
            (budget,) = (each for each in store.ledger.budgets().values() if each.spent)
            tightest = tightest_epsilon(budget, budget.spent)
            steps = sum(count * event.count for event, count in events_of(budget.spent).items())  # type: ignore[attr-defined]
        accuracies = [each.metrics["eval/accuracy"] for each in results]
        print(
            f"{options.model}, seed {seed}: accuracy {accuracies[-1]:.4f} after {steps} steps in "
            f"{time.perf_counter() - began:.0f} s, epsilon {results[-1].metrics['privacy/example/epsilon']:.4f} "
            f"by RDP, {tightest:.4f} by PLD; by epoch {' '.join(f'{each:.3f}' for each in accuracies)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
