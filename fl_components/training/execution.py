"""Where local training runs, and in what pieces."""

from __future__ import annotations

import math
import os
import re
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from fedrounds.fl_components.arrays import Float32
from fedrounds.fl_components.errors import ConfigError, FedroundsError
from fedrounds.fl_components.rules import Rule, union
from fedrounds.fl_components.training.dask import DaskTrainer
from fedrounds.fl_components.training.engine import ShardReport, StreamingSum
from fedrounds.fl_components.training.processes import ProcessTrainer
from fedrounds.fl_components.training.sgd import SGD
from fedrounds.fl_components.training.trainer import OwnTrainer, RowTask, Shard, T, Trainer, Workload

COPIES_OF_AN_UPDATE: Final = 5  # as trained, as a frame, as decoded, among its shard's, and room to add it up

WORK_OF_SHARD: Final = 600e6  # examples times parameters: about 50 ms of a processor where clients train at once
WORTH_SHARING: Final = 100e6
MAX_OF_SHARD: Final = 50  # clients

WORTH_PROCESSES_S: Final = 10.0  # of training still to do: a process takes some 3 s of work to start


def _evenly(start: int, stop: int) -> list[int]:
    """Where pieces of `MAX_OF_SHARD` clients at most begin."""
    pieces = max(1, math.ceil((stop - start) / MAX_OF_SHARD))
    return [start + (stop - start) * piece // pieces for piece in range(pieces)]


class ExecutionRule(Rule):
    """Base of the execution rules: a cohort is cut into shards, and these are handed out.

    A shard (clients whose updates are summed together) is the unit of determinism: it decides the last bits of a
    result, while memory and the number of processes or machines never do.

    Args:
      memory_mb: for a wave's updates, where the aggregation or the compression needs each one for itself.
      shard_size: how many clients make a shard. By default shards have about as much to do, and are an even number:
        large enough that many clients train at once, small enough that processes share the work.
    """

    memory_mb: int = Field(default=1024, ge=1)
    shard_size: int | None = Field(default=None, ge=1)

    def shards(self, work_N: Sequence[float]) -> tuple[slice, ...]:
        """The cohort cut into shards. `work_N` is what each client has to do: examples times parameters.

        >>> LocalExecution().shards([400e6, 200e6, 200e6, 200e6, 200e6])
        (slice(0, 2, None), slice(2, 5, None))
        >>> LocalExecution(shard_size=2).shards([1, 1, 1])
        (slice(0, 2, None), slice(2, 3, None))
        """
        if self.shard_size is not None:
            edges = [*range(0, len(work_N), self.shard_size), len(work_N)]
        else:
            done_N = np.cumsum(work_N)
            total = done_N[-1] if len(work_N) else 0.0
            pieces = 2 * math.ceil(total / (2 * WORK_OF_SHARD)) if total > WORTH_SHARING else 1
            cuts = np.searchsorted(done_N, total / pieces * np.arange(1, pieces) * (1 + 1e-9), side="right")
            edges = [0, *cuts.tolist(), len(work_N)]
            edges = [edge for start, stop in pairwise(edges) for edge in _evenly(start, stop)] + [len(work_N)]
        return tuple(slice(start, stop) for start, stop in pairwise(edges) if start < stop)

    def waves(self, shards: Sequence[slice], num_parameters: int, *, additive: bool) -> tuple[slice, ...]:
        """Whole shards in waves: one where updates are added up as they come, else as many as `memory_mb` holds. One
        empty wave for an empty cohort.

        >>> rule = LocalExecution(memory_mb=1, shard_size=4)
        >>> rule.waves(rule.shards([1] * 10), num_parameters=10_000, additive=False)  # 200 kB a client: one shard
        (slice(0, 4, None), slice(4, 8, None), slice(8, 10, None))
        """
        most = self._most_of_wave(num_parameters)
        waves: list[slice] = []
        for shard in shards:
            if waves and (additive or shard.stop - waves[-1].start <= most):
                waves[-1] = slice(waves[-1].start, shard.stop)
            else:
                waves.append(shard)
        return tuple(waves) or (slice(0, 0),)

    def equal_waves(
        self, num_clients: int, largest_cohort: int, num_parameters: int, *, additive: bool
    ) -> tuple[slice, ...]:
        """Return a cohort of `num_clients` in equal waves, whose number follows from the largest possible cohort alone:
        `memory_mb` holds each wave of that one. Waves may be empty.

        >>> rule = LocalExecution(memory_mb=1)
        >>> rule.equal_waves(4, largest_cohort=12, num_parameters=10_000, additive=False)  # 200 kB a client
        (slice(0, 1, None), slice(1, 2, None), slice(2, 4, None))
        >>> len(rule.equal_waves(0, largest_cohort=12, num_parameters=10_000, additive=False))
        3
        """
        most = self._most_of_wave(num_parameters)
        num_waves = 1 if additive else max(1, math.ceil(largest_cohort / max(1, most)))
        edges = [num_clients * wave // num_waves for wave in range(num_waves + 1)]
        return tuple(slice(start, stop) for start, stop in pairwise(edges))

    def _most_of_wave(self, num_parameters: int) -> int:
        """How many clients' updates `memory_mb` holds."""
        return int(self.memory_mb * 1e6) // (COPIES_OF_AN_UPDATE * 4 * num_parameters)

    def check(self) -> None:
        """Raise `ConfigError` when this machine lacks what the rule needs."""

    @abstractmethod
    def trainer(self, workload: Workload, say: Callable[[str], None]) -> Trainer:
        """What trains a run's shards. `say` hears what people should know."""


class LocalExecution(ExecutionRule):
    """On this machine.

    Args:
      processes: how many train, each on one thread; 1 is the process that drives the run. By default as many as there
        are processors, once there is enough left to do to be worth their start.
      device: where they train, as torch names it. With "cuda", processes is 1.
    """

    kind: Literal["local"] = "local"
    processes: int | None = Field(default=None, ge=1)
    device: str = Field(default="cpu")

    @field_validator("device")
    @classmethod
    def _is_a_device(cls, device: str) -> str:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
            raise ValueError("give cpu, cuda or cuda:N")
        return device

    @model_validator(mode="after")
    def _one_process_for_a_gpu(self) -> LocalExecution:
        if self.device != "cpu" and (self.processes or 1) > 1:
            raise ValueError(
                f"execution.processes is {self.processes} and execution.device is {self.device}: one process drives a "
                "GPU; leave processes out"
            )
        return self

    def check(self) -> None:
        if self.device != "cpu" and (torch.device(self.device).index or 0) >= torch.cuda.device_count():
            raise ConfigError(
                f"execution.device is {self.device} and torch finds {torch.cuda.device_count()} such devices",
                hint="use cpu, or install a torch with CUDA and see that its driver is there",
            )

    def trainer(self, workload: Workload, say: Callable[[str], None]) -> Trainer:
        if self.processes == 1 or self.device != "cpu":
            return OwnTrainer(workload, say, self.device)
        if self.processes is not None:
            return ProcessTrainer(workload, self.processes, say)
        processors = num_processors()
        return GrowingTrainer(workload, processors, say) if processors > 1 else OwnTrainer(workload, say)


class DaskExecution(ExecutionRule):
    """On the workers of a Dask cluster.

    Args:
      address: the scheduler's, tcp://host:port or tls://host:port.
      wait_s: how long a round waits for a worker when there is none.
    """

    kind: Literal["dask"] = "dask"
    address: str
    wait_s: float = Field(default=60.0, gt=0)

    @field_validator("address")
    @classmethod
    def _is_an_address(cls, address: str) -> str:
        if not re.fullmatch(r"(tcp|tls)://\S+:\d+", address):
            raise ValueError("give the scheduler's address as tcp://host:port or tls://host:port")
        return address

    def trainer(self, workload: Workload, say: Callable[[str], None]) -> Trainer:
        return DaskTrainer(workload, self.address, self.wait_s, say)


class GrowingTrainer(Trainer):
    """In this process, until what is left to do is worth processes and these have started."""

    def __init__(self, workload: Workload, num_processes: int, say: Callable[[str], None]) -> None:
        self._workload, self._num_processes, self._say = workload, num_processes, say
        self._own = OwnTrainer(workload, say)
        self._processes: ProcessTrainer | None = None
        self._shard_s = 0.0  # of the last shard; the first one of all is not typical

    def train(
        self, rule: SGD, params_D: Float32, shards: Sequence[Shard], streaming: StreamingSum | None, rounds_left: int
    ) -> Iterator[tuple[ShardReport, NDArray[np.floating]]]:
        self._own.on_shard = self.on_shard
        for index, shard in enumerate(shards):
            processes = self._ready()
            if processes is not None:
                processes.on_shard = self.on_shard
                yield from processes.train(rule, params_D, shards[index:], streaming, rounds_left)
                return
            left_s = self._shard_s * (rounds_left * len(shards) - index)
            num_processes = min(self._num_processes, len(shards))
            if self._processes is None and left_s > WORTH_PROCESSES_S and num_processes > 1:
                self._start(num_processes)
            began, first = time.perf_counter(), self._own.is_new
            (trained,) = self._own.train(rule, params_D, [shard], streaming, rounds_left)
            self._shard_s = 0.0 if first else time.perf_counter() - began
            yield trained

    def _start(self, num_processes: int) -> None:
        try:
            self._processes = ProcessTrainer(self._workload, num_processes, self._say)
        except FedroundsError as error:
            self._stay_here(error.message)

    def _stay_here(self, why: str) -> None:
        self._say(f"training goes on in one process: {why}")
        self._processes, self._num_processes = None, 1

    def _ready(self) -> ProcessTrainer | None:
        """The processes, when all of them have started. Where they cannot start, training goes on here."""
        try:
            return self._processes if self._processes is not None and self._processes.is_ready() else None
        except FedroundsError as error:
            self.close()
            self._stay_here(error.message)
            return None

    def spread(
        self, work_on: Callable[[slice], RowTask[T]], rows_ND: Float32, unit: int, *, reads: bool, writes: bool
    ) -> Iterator[T]:
        workers = self._ready() or self._own
        return workers.spread(work_on, rows_ND, unit, reads=reads, writes=writes)

    def close(self) -> None:
        if self._processes is not None:
            self._processes.close()

    @property
    def peak_memory_bytes(self) -> int:
        return self._own.peak_memory_bytes if self._processes is None else self._processes.peak_memory_bytes


def num_processors(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """How many processors this process may use: those of the machine, or what its container is given (cgroup v2).

    Args:
      quota: a file that holds the microseconds of processor time in each period, and the period: "200000 100000".
    """
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        time_us, period_us = quota.read_text().split()
        return min(processors, max(1, round(int(time_us) / int(period_us))))
    except (OSError, ValueError):  # there is no such file, or it says "max": no limit
        return processors


if TYPE_CHECKING:
    Execution = ExecutionRule
else:
    Execution = union("execution", LocalExecution, DaskExecution)
