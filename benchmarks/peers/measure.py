"""One measurement: what a peer is given to train, and the line of JSON in which it answers.

    python -m benchmarks.peers.lean --workload W1 --rounds 12

Every peer of this folder has these options; `bench.py` starts them one after the other.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

WORKLOAD = Path(__file__).with_name("workload.py")
WORKLOADS = ("W1", "W1u", "W2")
NUM_CLIENTS = 1000

Rows = NDArray[np.int64]
Run = Callable[["Task", int, str], tuple[Sequence[float], float | None]]


@dataclass(frozen=True)
class Task:
    """A workload, of the definition (a file like workload.py) in `definition`. Rounds count from 0."""

    name: str
    definition: Path

    @cached_property
    def _module(self) -> Any:
        spec = importlib.util.spec_from_file_location("fedrounds_workload", self.definition)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    @cached_property
    def images(self) -> tuple[NDArray[Any], ...]:
        """x_train float32 [M, 784], y_train int64 [M], x_test, y_test."""
        found: tuple[NDArray[Any], ...] = self._module.data()
        return found

    @cached_property
    def rows(self) -> Sequence[Rows]:
        """The training rows of each client."""
        found: Sequence[Rows] = self._module.partition_u() if self.name == "W1u" else self._module.partition()
        return found

    @property
    def model(self) -> str:
        """`mlp` or `cnn`."""
        return "cnn" if self.name == "W2" else "mlp"

    @property
    def initial(self) -> list[NDArray[np.float32]]:
        """Weight and bias of each layer."""
        found: list[NDArray[np.float32]] = self._module.init(self.model)
        return found

    @property
    def cohort_size(self) -> int:
        return int(self._module.COHORT[self.name])

    @property
    def learning_rate(self) -> float:
        return float(self._module.LR)

    @property
    def batch_size(self) -> int:
        return int(self._module.BATCH)

    def cohort(self, round: int) -> list[int]:
        """The clients of a round."""
        found: list[int] = self._module.cohort(round, self.cohort_size).tolist()
        return found

    def shuffled(self, round: int, client: int) -> Rows:
        """A client's rows in the order in which it trains on them."""
        rows = self.rows[client]
        found: Rows = rows[self._module.perm(round, client, len(rows))]
        return found

    def batches(self, round: int, client: int) -> Iterator[Rows]:
        """The rows of each of a client's steps; the last may be fewer."""
        rows = self.shuffled(round, client)
        return (rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size))

    def num_examples(self, round: int) -> int:
        """How many examples the cohort of a round trains on."""
        return sum(len(self.rows[client]) for client in self.cohort(round))


def main(package: str, run: Run, *, answers: bool = True) -> None:
    """Run one measurement: `run(task, rounds, setting)` gives the seconds of each round and the final test accuracy.

    The accuracy is None where nothing was trained. Of several processes only one `answers`.
    """
    task, rounds, setting = _arguments()
    seconds, accuracy = run(task, rounds, setting)
    if answers:
        print(json.dumps({"version": version(package), "seconds": list(seconds), "accuracy": accuracy}), flush=True)


def _arguments() -> tuple[Task, int, str]:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, default="W1")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--setting", default="best", help="where a peer has several: see its file")
    parser.add_argument("--definition", type=Path, default=WORKLOAD, help="the file that defines the workloads")
    parser.add_argument("--mnist", help="the folder of MNIST's four files; by default $FLDATA")
    options = parser.parse_args()
    if options.mnist:
        os.environ["FLDATA"] = options.mnist
    elif "FLDATA" not in os.environ:
        sys.exit("name the folder of MNIST's four files: --mnist FOLDER")
    os.environ.setdefault("FLCACHE", str(Path(tempfile.gettempdir()) / "fedrounds-workload"))
    return Task(options.workload, options.definition), options.rounds, options.setting
