"""FedAvg, which drops stragglers, against FedProx, which keeps them (Li et al. 2020, https://arxiv.org/abs/1812.06127).

    python benchmarks/uneven_work.py --rounds 60

Their figure 1 in small: MNIST with two labels a client, logistic regression, E = 20 local epochs, and 90 % of the
clients of a round are stragglers that do a random number of these. All through `simulate`, from the same seeds: the
same clients straggle by the same amount in each line.
"""

from __future__ import annotations

import argparse
from statistics import mean, pstdev

from fedrounds.fl_components.config import parse_config
from fedrounds.fl_components.simulate import simulate

LINES = {  # whether stragglers are dropped, and the proximal term
    "FedAvg (stragglers dropped)": (True, 0.0),
    "FedProx, mu = 0 (stragglers kept)": (False, 0.0),
    "FedProx, mu = 0.1": (False, 0.1),
    "FedProx, mu = 1": (False, 1.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=0.03)
    parser.add_argument("--fraction", type=float, default=0.9)
    arguments = parser.parse_args()
    for name, (drop, mu) in LINES.items():
        config = parse_config(
            {
                "name": "uneven",
                "rounds": arguments.rounds,
                "data": {"kind": "mnist", "partition": {"kind": "shards", "num_clients": 100}},
                "model": {"kind": "logistic_regression"},
                "training": {
                    "learning_rate": arguments.learning_rate,
                    "batch_size": 10,
                    "epochs": 20,
                    "objective": {"kind": "proximal", "mu": mu} if mu else {"kind": "loss"},
                },
                "simulation": {"stragglers": {"fraction": arguments.fraction, "drop": drop}},
                "selection": {"kind": "uniform", "cohort_size": 10, "min_updates": 0},
            }
        )
        steps = list(simulate(config))
        last = [step.metrics["eval/accuracy"] for step in steps[-20:]]
        losses = [step.metrics["eval/loss"] for step in steps[-20:]]
        print(
            f"{name:<36} last 20 rounds: accuracy {mean(last):.3f} +- {pstdev(last):.3f}, loss {mean(losses):.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
