"""What a round costs beside its training: Prefect, the store and MLflow together, against Prefect alone.

    python benchmarks/orchestration.py --rounds 100 --block 20
    python benchmarks/orchestration.py --rounds 500 --block 50 --sizes small

Two lines, each with a model of 50 and of 199,210 parameters (the 2NN of MNIST), on one embedded server in a new home:

- bare: a Prefect parent with one subflow a round, which runs as many tasks as a round has stages; each returns an array
  of the model's size. Tuned as fedrounds is: no heartbeat in the subflow, nothing cached, persisted or looked through.
- fedrounds: a training of three clients with everything real: the store, its seals, commits and blobs, and MLflow. The
  seconds of the stages `train` and `evaluate` are subtracted.

Each line has a process of its own. They run in turn, a block of rounds each, while the others wait; the order is
reversed from turn to turn. In the 3 s between two blocks both Prefect's server and MLflow write what they still lack:
at most the rounds of the last second, as MLflow gets those of each second together.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

import numpy as np

WIDTHS = {"small": (4, 10), "2nn": (784, 200, 200, 10)}
"""The layers of each model: features, hidden units, classes."""

STAGES = (
    *("load", "broadcast", "select", "authorise", "train", "compress", "admit"),
    *("aggregate", "server_step", "evaluate", "commit", "track"),
)
TARGET = 1.3
WARM_UP_ROUNDS = 10
SETTLE_S = 3.0  # Prefect's server writes task runs and events up to two seconds late


def clients(features: int, classes: int) -> dict[str, tuple[Any, ...]]:
    """The data of the trainings: three clients with 20 examples each, and 5 to test."""
    draw = np.random.default_rng(0)

    def examples(count: int) -> tuple[Any, Any]:
        return draw.standard_normal((count, features), np.float32), np.arange(count) % classes

    return {name: (*examples(20), *examples(5)) for name in ("east", "north", "south")}


class Turns:
    """A line's side of taking turns: blocks of as many rounds as each line on stdin says, told in seconds on stdout."""

    def __init__(self) -> None:
        self._last = 0.0
        self._wait()

    def round(self, excluded_s: float = 0.0) -> None:
        """A round has ended, of which `excluded_s` are not counted."""
        now = time.perf_counter()
        self._rounds_s.append(now - self._last - excluded_s)
        self._last = now
        if len(self._rounds_s) == self._block:
            print(json.dumps(self._rounds_s), flush=True)
            self._wait()

    def _wait(self) -> None:
        self._block = int(sys.stdin.readline() or 0)
        self._rounds_s: list[float] = []
        self._last = time.perf_counter()


def fedrounds(size: str, rounds: int) -> None:
    from fedrounds.deployments.api import train
    from fedrounds.tasks.progress import Progress

    features, *hidden, classes = WIDTHS[size]
    model: dict[str, Any] = {"kind": "mlp", "hidden": hidden} if hidden else {"kind": "logistic_regression"}
    arguments = {"features": features, "classes": classes}
    config = {
        "name": f"orchestration-{size}",
        "rounds": rounds,
        "data": {"kind": "function", "path": f"{Path(__file__).stem}:clients", "arguments": arguments},
        "model": model,
        "training": {"learning_rate": 0.01, "batch_size": 20, "epochs": 1},
        "selection": {"kind": "uniform", "cohort_size": 3},
        "evaluation": {"per_client": False},
    }
    turns = Turns()

    def listen(news: Progress) -> None:
        if news.kind == "round":
            turns.round(news.seconds["train"] + news.seconds["evaluate"])

    train(config, on_progress=listen)


def bare(size: str, rounds: int) -> None:
    from prefect import flow, task
    from prefect.cache_policies import NO_CACHE
    from prefect.utilities.annotations import opaque

    from fedrounds.deployments.stack.connection import client_settings, connect
    from fedrounds.flows.prefect_runs import without_heartbeat

    options: dict[str, Any] = {"persist_result": False, "validate_parameters": False}
    value_D = np.zeros(sum((wide + 1) * narrow for wide, narrow in pairwise(WIDTHS[size])), np.float32)
    turns = Turns()

    def stage(value: Any) -> Any:
        return value

    stages: list[Any] = [task(name=name, cache_policy=NO_CACHE, persist_result=False)(stage) for name in STAGES]

    @flow(name="bare-round", **options)
    def child(round: int) -> None:
        value: Any = value_D
        for each in stages:
            value = each(opaque(value))

    @flow(name="bare-training", **options)
    def parent() -> None:
        settings = without_heartbeat()
        for round in range(1, rounds + 1):
            with settings.model_copy():
                child(round, return_state=True)
            turns.round()

    with connect() as connection:
        connection.wait()
        with client_settings(connection):
            parent(return_state=True)


LINES = {"bare": bare, "fedrounds": fedrounds}


@dataclass
class Line:
    """A line's process, and the seconds of the rounds of each block that it has told of."""

    name: str
    size: str
    process: subprocess.Popen[str]
    blocks_s: list[list[float]] = field(default_factory=list)

    def run(self, rounds: int) -> list[float]:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(rounds, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.name} ({self.size}) has ended: exit status {self.process.wait()}")
        seconds: list[float] = json.loads(answer)
        return seconds

    @property
    def rounds_s(self) -> list[float]:
        return [seconds for block in self.blocks_s for seconds in block]


def start(name: str, size: str, rounds: int) -> Line:
    command = [sys.executable, __file__, "--line", name, "--sizes", size, "--rounds", str(rounds)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return Line(name, size, subprocess.Popen(command, **pipes))


def show(lines: list[Line]) -> None:
    print(f"\n{'ms a round':<20}{'mean':>8}{'median':>8}{'p90':>8}   mean of each block")
    for line in lines:
        figures_s = (mean(line.rounds_s), median(line.rounds_s), quantiles(line.rounds_s, n=10)[-1])
        blocks = " ".join(f"{mean(block) * 1e3:.0f}" for block in line.blocks_s)
        print(f"{line.name + ', ' + line.size:<20}{''.join(f'{each * 1e3:8.0f}' for each in figures_s)}   {blocks}")
    for alone, ours in zip(lines[::2], lines[1::2], strict=True):
        ratios = [of(ours.rounds_s) / of(alone.rounds_s) for of in (mean, median)]
        print(f"{ours.size}: {ratios[0]:.2f} times Prefect alone (target {TARGET}), by the median {ratios[1]:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="of each line, after the warm-up")
    parser.add_argument("--block", type=int, default=20, help="rounds in a turn")
    parser.add_argument("--sizes", nargs="+", choices=WIDTHS, default=list(WIDTHS))
    parser.add_argument("--line", choices=LINES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.line:
        LINES[arguments.line](arguments.sizes[0], arguments.rounds)
        return

    from fedrounds.deployments.stack.connection import connect

    turns = math.ceil(arguments.rounds / arguments.block)
    rounds = WARM_UP_ROUNDS + turns * arguments.block
    with tempfile.TemporaryDirectory(prefix="fedrounds-orchestration-", ignore_cleanup_errors=True) as home:
        for name in [name for name in os.environ if name.startswith(("PREFECT_", "MLFLOW_", "FEDROUNDS_"))]:
            del os.environ[name]
        os.environ["FEDROUNDS_HOME"] = home
        with connect(idle_s=5) as connection, ExitStack() as stack:
            connection.wait()
            lines = [start(name, size, rounds) for size in arguments.sizes for name in LINES]
            for line in lines:
                stack.callback(line.process.kill)
                line.run(WARM_UP_ROUNDS)
            for turn in range(turns):
                for line in lines if turn % 2 == 0 else reversed(lines):
                    time.sleep(SETTLE_S)
                    line.blocks_s.append(line.run(arguments.block))
                print(f"turn {turn + 1} of {turns}", file=sys.stderr, flush=True)
        show(lines)


if __name__ == "__main__":
    main()
