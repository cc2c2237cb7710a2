"""Server optimisers on MNIST with two labels a client, where Reddi et al. 2021 would expect adaptive ones to help.

    python benchmarks/adaptive_servers.py --rounds 150

The 2NN with E = 1, B = 10, C = 0.1 of `examples/mnist_2nn_two_shard.yaml`, through `simulate` from the same seed.
Accuracy goes up and down from round to round, so the mean and the deviation of the last 20 are told.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean, pstdev

from fedrounds.fl_components.config import load_config
from fedrounds.fl_components.simulate import simulate

EXAMPLE = Path(__file__).parents[1] / "examples" / "mnist_2nn_two_shard.yaml"
LINES = [
    ("{kind: fedavg}", 0.05),
    ("{kind: fedavg}", 0.1),
    ("{kind: fedavgm, momentum: 0.9, learning_rate: 0.1}", 0.05),
    ("{kind: fedadam, learning_rate: 0.003}", 0.05),
    ("{kind: fedadam, learning_rate: 0.001}", 0.05),
    ("{kind: fedyogi, learning_rate: 0.003}", 0.05),
    ("{kind: fedadagrad, learning_rate: 0.03}", 0.05),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=150)
    arguments = parser.parse_args()
    for server_optimizer, rate in LINES:
        overrides = [
            f"rounds={arguments.rounds}",
            f"server_optimizer={server_optimizer}",
            f"training.learning_rate={rate}",
        ]
        steps = simulate(load_config(EXAMPLE, overrides))
        last = [step.metrics["eval/accuracy"] for step in list(steps)[-20:]]
        print(
            f"{server_optimizer:<52} client rate {rate:<5} last 20 rounds: {mean(last):.3f} +- {pstdev(last):.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
