"""The `execution` section of a configuration: where clients run, and how a cohort is cut."""

from __future__ import annotations

import math
import os
import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator

from fedrounds.fl_components.errors import ConfigError, FedroundsError
from fedrounds.fl_components.executors.base import Executor, Workload
from fedrounds.fl_components.executors.dask import DaskTransport
from fedrounds.fl_components.executors.in_process import InProcessExecutor
from fedrounds.fl_components.executors.processes import ProcessTransport
from fedrounds.fl_components.executors.scheduler import ScheduledExecutor
from fedrounds.fl_components.rules import Rule, union

COPIES_OF_AN_UPDATE: Final = 5  # as trained, as a frame, as decoded, among its shard's, and room to add it up

WORK_OF_SHARD: Final = 600e6  # examples times parameters: about 50 ms of a processor where clients train at once
WORTH_SHARING: Final = 100e6
MAX_OF_SHARD: Final = 50  # clients

WORTH_PROCESSES: Final = 40
"""A run that has more default shards than this left to train is worth the start of processes, which takes about 3 s. A
default shard takes 50 ms at the least, and up to ten times that with convolutions."""


def default_shards(work_N: Sequence[float]) -> tuple[slice, ...]:
    """Return a cohort cut into shards that have about as much to do (see `ExecutionRule.shards`)."""
    done_N = np.cumsum(work_N)
    total = done_N[-1] if len(work_N) else 0.0
    pieces = 2 * math.ceil(total / (2 * WORK_OF_SHARD)) if total > WORTH_SHARING else 1
    cuts = np.searchsorted(done_N, total / pieces * np.arange(1, pieces) * (1 + 1e-9), side="right")
    edges = [0, *cuts.tolist(), len(work_N)]
    edges = [edge for start, stop in pairwise(edges) for edge in _evenly(start, stop)] + [len(work_N)]
    return tuple(slice(start, stop) for start, stop in pairwise(edges) if start < stop)


def _evenly(start: int, stop: int) -> list[int]:
    """Return the starts of equal pieces of `MAX_OF_SHARD` clients at most."""
    pieces = max(1, math.ceil((stop - start) / MAX_OF_SHARD))
    return [start + (stop - start) * piece // pieces for piece in range(pieces)]


class ExecutionRule(Rule):
    """Base of the execution rules: a cohort is cut into shards, and these are handed out.

    A shard (clients whose updates are summed together) is the unit of determinism: it decides the last bits of a
    result. Neither memory nor the number of processes or machines does.

    Args:
      memory_mb: for a wave's updates, where the aggregation or the compression needs each one for itself.
      shard_size: how many clients make a shard. By default shards have about as much to do, and are an even number:
        large enough that many clients train at once, small enough that processes share the work.
    """

    memory_mb: int = Field(default=1024, ge=1)
    shard_size: int | None = Field(default=None, ge=1)

    def shards(self, work_N: Sequence[float]) -> tuple[slice, ...]:
        """Return the cohort cut into shards. `work_N` is what each client has to do: examples times parameters.

        >>> LocalExecution().shards([400e6, 200e6, 200e6, 200e6, 200e6])
        (slice(0, 2, None), slice(2, 5, None))
        >>> LocalExecution(shard_size=2).shards([1, 1, 1])
        (slice(0, 2, None), slice(2, 3, None))
        """
        if self.shard_size is None:
            return default_shards(work_N)
        edges = [*range(0, len(work_N), self.shard_size), len(work_N)]
        return tuple(slice(start, stop) for start, stop in pairwise(edges) if start < stop)

    def waves(self, shards: Sequence[slice], num_parameters: int, *, additive: bool) -> tuple[slice, ...]:
        """Whole shards in waves: one where updates are added up as they come, else as many as `memory_mb` holds.

        One empty wave for an empty cohort.

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
    def executor(
        self, workload: Workload, say: Callable[[str], None], work_N: Sequence[float] = (), rounds: int = 1
    ) -> Executor:
        """Return an executor for a run.

        Args:
          workload: what it trains.
          say: called with messages for people.
          work_N: what each client of an average cohort has to do, as in `shards`.
          rounds: how many rounds are left.
        """


class LocalExecution(ExecutionRule):
    """Clients run on this machine.

    Args:
      processes: how many train, each on one thread; 1 is the process that drives the run. By default as many as there
        are processors, where the rounds that are left are worth their start.
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

    def executor(
        self, workload: Workload, say: Callable[[str], None], work_N: Sequence[float] = (), rounds: int = 1
    ) -> Executor:
        num_processes = self.processes or self._default_processes(work_N, rounds)
        if self.device != "cpu" or num_processes == 1:
            return InProcessExecutor(workload, say, self.device)
        executor = ScheduledExecutor(workload, ProcessTransport(workload, num_processes), say)
        if self.processes is None:  # nobody asked for processes, so a run that cannot have any goes on without
            try:
                executor.wait_for_worker()
            except BaseException as error:
                executor.close()
                if not isinstance(error, FedroundsError):
                    raise
                say(f"training continues in one process: {error.message}")
                return InProcessExecutor(workload, say)
        return executor

    def _default_processes(self, work_N: Sequence[float], rounds: int) -> int:
        """Return as many processes as there are processors and shards in a round.

        1 where they are not worth their start.
        """
        if rounds * len(default_shards(work_N)) <= WORTH_PROCESSES:
            return 1
        return min(num_processors(), len(self.shards(work_N)))


class DaskExecution(ExecutionRule):
    """Clients run at the workers of a Dask cluster.

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

    def executor(
        self, workload: Workload, say: Callable[[str], None], work_N: Sequence[float] = (), rounds: int = 1
    ) -> Executor:
        _ = work_N, rounds
        return ScheduledExecutor(workload, DaskTransport(workload, self.address, self.wait_s), say)


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
