"""What compression costs in accuracy and saves in bytes: MNIST at twenty silos that are always there, or at a tenth of
a hundred clients a round.

    python benchmarks/small_updates.py --results results.jsonl
    python benchmarks/small_updates.py --results results.jsonl --model cnn --rounds 12 --settings none "random_k .01"
    python benchmarks/small_updates.py --results results.jsonl --only-report --plot docs/images/communication.png

Each line is the whole walk of every round with its store, without Prefect and MLflow: bytes are the lengths of frames,
accuracy the mean of the last five rounds on the test images, time that of a link of 10 Mbit/s each way with .05 s of
latency (transfers alone: all clients have the same link). A line that the results file has already is not measured
again, so a run that was stopped goes on. Needs MNIST's files.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fedrounds.fl_components.config import parse_config
from fedrounds.fl_components.server import stages
from fedrounds.fl_components.server.opening import open_run
from fedrounds.fl_components.store import Store
from fedrounds.flows.round import walk

LAST = 5  # rounds, of which accuracy is the mean
TARGET = 0.95  # accuracy, for the time that it takes

MODELS: dict[str, dict[str, Any]] = {"2nn": {"kind": "mlp", "hidden": [200, 200]}, "cnn": {"kind": "cnn"}}
PARTITIONS: dict[str, dict[str, Any]] = {"iid": {"kind": "iid"}, "dirichlet": {"kind": "dirichlet", "alpha": 0.3}}

SIGN: dict[str, Any] = {"kind": "sign"}
EDEN_1: dict[str, Any] = {"kind": "eden", "bits": 1}


def _topk(fraction: float, **values: Any) -> dict[str, Any]:
    return {"kind": "top_k", "fraction": fraction, "error_feedback": True, **({"values": values} if values else {})}


SETTINGS: dict[str, dict[str, Any]] = {
    "none": {"kind": "none"},
    "uniform, 8 bits": {"kind": "uniform", "bits": 8},
    "qsgd, 4 bits": {"kind": "qsgd", "bits": 4},
    "ternary": {"kind": "ternary"},
    "eden, 2 bits": {"kind": "eden", "bits": 2},
    "eden, 1 bit": EDEN_1,
    "dithered, step 1": {"kind": "dithered", "step": 1.0},
    "dithered, step 3": {"kind": "dithered", "step": 3.0},
    "random_k .97, eden 1 bit": {"kind": "random_k", "fraction": 0.97, "values": EDEN_1},
    "random_k .1, eden 1 bit": {"kind": "random_k", "fraction": 0.1, "values": EDEN_1},
    "random_k .01": {"kind": "random_k", "fraction": 0.01},
    "byte_budget 27 kB": {"kind": "byte_budget", "update_bytes": 27_000},
    "byte_budget 6 kB, feedback": {"kind": "byte_budget", "update_bytes": 6_000, "error_feedback": True},
    **{
        f"dead_zone {step}, feedback": {"kind": "dead_zone", "step": step, "error_feedback": True}
        for step in (2, 4, 6, 9)
    },
    "sign, feedback": {**SIGN, "error_feedback": True},
    "low_rank 4, feedback": {"kind": "low_rank", "rank": 4, "error_feedback": True},
    "top_k .01, feedback": _topk(0.01),
    "top_k .03 sign, feedback": _topk(0.03, **SIGN),
    "top_k .01 sign, feedback": _topk(0.01, **SIGN),
}
BROADCASTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "4-bit differences": {"values": {"kind": "uniform", "bits": 4}, "mode": "delta"},
    "dead_zone 1 differences": {"values": {"kind": "dead_zone", "step": 1.0}, "mode": "delta"},
    "dead_zone 3 differences": {"values": {"kind": "dead_zone", "step": 3.0}, "mode": "delta"},
    "8 bits": {"values": {"kind": "uniform", "bits": 8}, "mode": "full"},
    "6 bits": {"values": {"kind": "uniform", "bits": 6}, "mode": "full"},
    "4 bits": {"values": {"kind": "uniform", "bits": 4}, "mode": "full"},
}


def configuration(options: argparse.Namespace, partition: str, setting: str, seed: int) -> dict[str, Any]:
    num_clients, drawn = (100, {"kind": "uniform", "cohort_size": 10}) if options.sampled else (20, {})
    return {
        "name": "small-updates",
        "rounds": options.rounds,
        "seed": seed,
        "data": {"kind": "mnist", "partition": {**PARTITIONS[partition], "num_clients": num_clients}},
        "model": MODELS[options.model],
        "training": {"learning_rate": options.learning_rate, "batch_size": 20, "steps": options.steps},
        "compression": SETTINGS[setting],
        "broadcast": BROADCASTS[options.broadcast],
        "simulation": {"network": {"upload_mbps": 10, "download_mbps": 10, "latency_s": 0.05, "spread": 0}},
        "evaluation": {"per_client": False},
        **({"selection": drawn} if drawn else {}),
    }


def measure(fields: dict[str, Any]) -> dict[str, Any]:
    """Train; what each round came to: accuracy, bits a parameter up and down, error and simulated seconds."""
    config = parse_config(fields)
    with (
        tempfile.TemporaryDirectory() as home,
        Store.open(Path(home)) as store,
        open_run(store, "r", config=config) as run,
    ):
        rounds = [walk(stages, run, round).metrics for round in range(1, config.rounds + 1)]
        numbers = run.federation.num_parameters
    names = {"up": "bits_per_parameter", "error": "error", "seconds": "simulated_s"}
    found = {name: [each.get(f"communication/{metric}", 0.0) for each in rounds] for name, metric in names.items()}
    found["down"] = [8 * each["communication/download_bytes"] / (each["clients/received"] * numbers) for each in rounds]
    return {**found, "accuracy": [each["eval/accuracy"] for each in rounds]}


def summary(found: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over one setting's seeds."""

    def seconds_to_target(accuracy: Sequence[float], seconds: Sequence[float]) -> float:
        reached = next((round for round, each in enumerate(accuracy, 1) if each >= TARGET), None)
        return math.nan if reached is None else sum(seconds[:reached])

    line = {name: mean(mean(each[name]) for each in found) for name in ("up", "down", "error", "seconds")}
    line["accuracy"] = mean(mean(each["accuracy"][-LAST:]) for each in found)
    line["to_target"] = mean(seconds_to_target(each["accuracy"], each["seconds"]) for each in found)
    return line


def table(title: str, settings: dict[str, list[dict[str, Any]]]) -> str:
    """In Markdown: each setting beside the first, in points of accuracy."""
    told = [
        f"### {title}",
        "",
        "| compression | accuracy | points | bits up | times less | bits down | times less | error | s a round | "
        f"s to {TARGET:.0%} |",
        "|---|" + "---|" * 9,
    ]
    whole = summary(next(iter(settings.values())))["accuracy"]
    for setting, found in settings.items():
        line = summary(found)
        to_target = "never" if math.isnan(line["to_target"]) else f"{line['to_target']:.1f}"
        told.append(
            f"| {setting} | {line['accuracy']:.4f} | {100 * (line['accuracy'] - whole):+.2f} | {line['up']:.3f} | "
            f"{32 / line['up']:.0f} | {line['down']:.2f} | {32 / line['down']:.1f} | {line['error']:.3f} | "
            f"{line['seconds']:.2f} | {to_target} |"
        )
    return "\n".join(told)


def draw(groups: dict[str, dict[str, list[dict[str, Any]]]], file: Path) -> None:
    """Accuracy against bytes, and the settings that no other beats in both."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(groups), figsize=(7.2 * len(groups), 5), squeeze=False)
    for axis, (title, settings) in zip(axes[0], groups.items(), strict=True):
        points = {name: summary(found) for name, found in settings.items()}
        front: list[tuple[float, float]] = []
        ordered = sorted(points.items(), key=lambda point: (point[1]["up"], -point[1]["accuracy"]))
        for number, (name, each) in enumerate(ordered, 1):
            best = not front or each["accuracy"] > front[-1][1]
            front += [(each["up"], each["accuracy"])] if best else []
            axis.plot(each["up"], each["accuracy"], "o", color="#1f5f8b" if best else "#aaaaaa", markersize=5)
            axis.text(1.03, 1 - 0.045 * number, f"{number}  {name}", transform=axis.transAxes, fontsize=7)
        axis.plot(*zip(*front, strict=True), color="#1f5f8b", linewidth=1, zorder=0)
        axis.set_title(title, fontsize=9)
        axis.set(xlabel="bits a parameter up", ylabel="test accuracy", xscale="log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.margins(0.1, 0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    for axis in axes[0]:  # once it is known how large they are
        _number(axis)
    figure.savefig(file, dpi=110)


def _number(axis: Any) -> None:
    """Number the points in the order in which they were drawn, as near as no other number or point is in the way."""
    places = [line.get_xydata()[0] for line in axis.lines if line.get_marker() == "o"]
    points = axis.transData.transform(places) * 72 / axis.figure.dpi
    taken = [*points]
    for number, (place, point) in enumerate(zip(places, points, strict=True), 1):
        for away, turn in product(range(9, 60, 3), range(0, 360, 20)):
            offset = away * np.array([np.sin(np.radians(turn)), np.cos(np.radians(turn))])
            if all((np.abs(point + offset - other) > (9, 8)).any() for other in taken):
                break
        taken.append(point + offset)
        line = {"arrowstyle": "-", "color": "#aaaaaa", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}
        style: dict[str, Any] = {"fontsize": 7, "ha": "center", "va": "center", "textcoords": "offset points"}
        axis.annotate(str(number), place, offset, arrowprops=line if away > 12 else None, **style)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="what was measured, one JSON object a line")
    parser.add_argument("--model", choices=[*MODELS], default="2nn")
    parser.add_argument("--partitions", nargs="+", choices=[*PARTITIONS], default=[*PARTITIONS])
    parser.add_argument("--settings", nargs="+", choices=[*SETTINGS], default=[*SETTINGS])
    parser.add_argument("--broadcast", choices=[*BROADCASTS], default="4-bit differences")
    parser.add_argument("--sampled", action="store_true", help="ten of a hundred clients a round, not twenty silos")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--steps", type=int, default=50, help="of a client in a round, of 20 images each")
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only-report", action="store_true")
    parser.add_argument("--plot", type=Path, help="also draw accuracy against bytes into this PNG file")
    options = parser.parse_args()
    known = {}
    if options.results.exists():
        known = {line["what"]: line for line in map(json.loads, options.results.read_text().splitlines())}
    who = "10 of 100 clients" if options.sampled else "20 silos"
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for partition in options.partitions:
        rounds = f"{options.rounds} rounds of {options.steps} steps"
        title = f"{options.model}, {partition}, {who}, broadcast {options.broadcast}, {rounds}"
        for setting in options.settings:
            for seed in options.seeds:
                what = f"{title}, rate {options.learning_rate}, {setting}, seed {seed}"
                if what not in known and not options.only_report:
                    began = time.perf_counter()
                    known[what] = measure(configuration(options, partition, setting, seed))
                    with options.results.open("a") as file:
                        file.write(json.dumps({"what": what, **known[what]}) + "\n")
                    accuracy = mean(known[what]["accuracy"][-LAST:])
                    print(f"{what}: {accuracy:.4f} in {time.perf_counter() - began:.0f} s", flush=True)
                if what in known:
                    groups.setdefault(title, {}).setdefault(setting, []).append(known[what])
    for title, settings in groups.items():
        print(f"\n{table(title, settings)}")
    if options.plot:
        draw(groups, options.plot)


if __name__ == "__main__":
    main()
