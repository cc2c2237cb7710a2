"""Test accuracy by rounds of the examples that repeat published experiments, against the published figures.

    python benchmarks/published_curves.py mnist_2nn_iid mnist_2nn_two_shard mnist_cnn_iid
    python benchmarks/published_curves.py mnist_2nn_iid --plot docs/images/mnist-curves.png

Each example is trained as `fedrounds train` does, under a run id of its own in FEDROUNDS_HOME, so that what was trained
once is only read: go on after a crash, or draw the picture later, with the same command.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fedrounds.deployments.api import show, train

EXAMPLES = Path(__file__).parents[1] / "examples"

# McMahan et al. 2017, table 2: target accuracy and the rounds to it. For Shakespeare there is only a target.
PUBLISHED: dict[str, tuple[float, int | None]] = {
    "mnist_2nn_iid": (0.97, 87),
    "mnist_2nn_two_shard": (0.97, 664),
    "mnist_cnn_iid": (0.99, 20),
    "shakespeare": (0.40, None),
}
FACTOR = 1.4  # how many times the published rounds are allowed

Curve = list[tuple[int, float]]


def curve(example: str) -> Curve:
    """(round, test accuracy) of each evaluated round."""
    run_id = f"published-{example}"
    train(EXAMPLES / f"{example}.yaml", run_id=run_id)
    history = show(run_id)["history"]
    return [(row["round"], row["metrics"]["eval/accuracy"]) for row in history if "eval/accuracy" in row["metrics"]]


def draw(curves: dict[str, Curve], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(4.2 * len(curves), 3.2), squeeze=False)
    for axis, (example, points) in zip(axes[0], curves.items(), strict=True):
        target, rounds = PUBLISHED[example]
        axis.plot(*zip(*points, strict=True), color="#1f5f8b", linewidth=1.2)
        axis.axhline(target, color="#999999", linewidth=0.8, linestyle="--")
        if rounds is not None:
            axis.axvline(rounds, color="#c0392b", linewidth=0.8, label=f"published: {rounds} rounds")
            axis.legend(loc="lower right", frameon=False)
        axis.set(title=example, xlabel="round", ylabel="test accuracy", ylim=(target - 0.12, min(1.0, target + 0.1)))
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("examples", nargs="+", choices=PUBLISHED)
    parser.add_argument("--plot", type=Path, help="also draw the curves into this PNG file")
    arguments = parser.parse_args()
    curves = {}
    for example in arguments.examples:
        curves[example] = points = curve(example)
        target, published = PUBLISHED[example]
        reached = next((round for round, accuracy in points if accuracy >= target), None)
        best = max(accuracy for _, accuracy in points)
        outcome = f"in round {reached}" if reached else "not reached"
        beside = f" (published {published}; allowed {FACTOR:g} times that)" if published else ""
        print(f"{example}: {target:.0%} {outcome}{beside}; best {best:.4f}")
    if arguments.plot:
        draw(curves, arguments.plot)


if __name__ == "__main__":
    main()
