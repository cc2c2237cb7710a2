"""Where local training runs, and in what pieces."""

from __future__ import annotations

import os
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from fl_components.rules import Rule, union
from fl_components.training.dask import DaskTrainer
from fl_components.training.engine import ShardReport
from fl_components.training.processes import ProcessTrainer
from fl_components.training.sgd import SGD
from fl_components.training.trainer import OwnTrainer, Shard, Trainer, Workload
from fl_components.values import Float32

COPIES_OF_AN_UPDATE: Final = 5  # as trained, as a frame, as decoded, among its shard's, and room to add it up

SHARD_PARAMETERS: Final = 5_000_000

WORTH_PROCESSES_S: Final = 10.0  # of training still to do: a process takes some 3 s of work to start


class ExecutionRule(Rule):
    """Base of the execution rules. A wave is as many whole shards as `memory_mb` holds.

    `shard_size` (clients summed together) is the unit of determinism: it decides the last bits of a result, while
    memory and the number of processes never do.

    Args:
      memory_mb: for a wave's updates, where the aggregation or the compression needs each one for itself.
      shard_size: how many clients make a shard. By default as many as hold `SHARD_PARAMETERS` together, from 5 to 25:
        small models gain from company, and large ones from being spread.
    """

    memory_mb: int = Field(default=1024, ge=1)
    shard_size: int | None = Field(default=None, ge=1)

    def clients_of_shard(self, num_parameters: int) -> int:
        """The most clients in a shard.

        >>> [LocalExecution().clients_of_shard(num_parameters) for num_parameters in (650, 600_000, 1_663_370)]
        [25, 8, 5]
        """
        return self.shard_size or min(25, max(5, SHARD_PARAMETERS // num_parameters))

    def waves(self, cohort_size: int, num_parameters: int, *, additive: bool) -> tuple[slice, ...]:
        """The cohort cut into waves, one where updates are added up as they come; one empty wave for an empty cohort.

        >>> rule = LocalExecution(shard_size=4, memory_mb=1)
        >>> rule.waves(10, num_parameters=10_000, additive=False)  # 200 kB a client: one shard
        (slice(0, 4, None), slice(4, 8, None), slice(8, 10, None))
        """
        bytes_per_client = COPIES_OF_AN_UPDATE * 4 * num_parameters
        shard_size = self.clients_of_shard(num_parameters)
        shards = max(1, int(self.memory_mb * 1e6) // (bytes_per_client * shard_size))
        size = max(1, cohort_size) if additive else shards * shard_size
        return tuple(slice(start, min(start + size, cohort_size)) for start in range(0, max(1, cohort_size), size))

    def shards(self, num_updates: int, num_parameters: int) -> tuple[slice, ...]:
        """A wave cut into shards."""
        size = self.clients_of_shard(num_parameters)
        return tuple(slice(start, min(start + size, num_updates)) for start in range(0, num_updates, size))

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
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:\d+)?)$")

    @model_validator(mode="after")
    def _one_process_for_a_gpu(self) -> LocalExecution:
        if self.device != "cpu" and (self.processes or 1) > 1:
            raise ValueError(
                f"execution.processes is {self.processes} and execution.device is {self.device}: one process drives a "
                "GPU; leave processes out"
            )
        return self

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
    address: str = Field(pattern=r"^(tcp|tls)://\S+:\d+$")
    wait_s: float = Field(default=60.0, gt=0)

    def trainer(self, workload: Workload, say: Callable[[str], None]) -> Trainer:
        return DaskTrainer(workload, self.address, self.wait_s, say)


class GrowingTrainer(Trainer):
    """In this process, until what is left to do is worth processes and these have started."""

    def __init__(self, workload: Workload, num_processes: int, say: Callable[[str], None]) -> None:
        self._workload, self._num_processes, self._say = workload, num_processes, say
        self._own = OwnTrainer(workload, say)
        self._own.on_shard = lambda *span: self.on_shard(*span)
        self._processes: ProcessTrainer | None = None
        self._shard_s = 0.0  # of the last shard; the first one of all is not typical

    def train(
        self, rule: SGD, params_D: Float32, shards: Sequence[Shard], rounds_left: int
    ) -> Iterator[tuple[ShardReport, NDArray[np.float32]]]:
        for index, shard in enumerate(shards):
            if self._processes is not None and self._processes.is_ready():
                yield from self._processes.train(rule, params_D, shards[index:], rounds_left)
                return
            if self._processes is None and self._shard_s * (rounds_left * len(shards) - index) > WORTH_PROCESSES_S:
                self._processes = ProcessTrainer(self._workload, self._num_processes, self._say)
                self._processes.on_shard = self._own.on_shard
            began, first = time.perf_counter(), self._own.is_new
            (trained,) = self._own.train(rule, params_D, [shard], rounds_left)
            self._shard_s = 0.0 if first else time.perf_counter() - began
            yield trained

    def close(self) -> None:
        if self._processes is not None:
            self._processes.close()

    @property
    def peak_memory_bytes(self) -> int:
        return self._own.peak_memory_bytes if self._processes is None else self._processes.peak_memory_bytes


def num_processors() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


if TYPE_CHECKING:
    Execution = ExecutionRule
else:
    Execution = union("execution", LocalExecution, DaskExecution)
