"""What a round's train stage asks for: shards of clients trained, wherever that is."""

from __future__ import annotations

import os
import resource
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from fedrounds.fl_components.arrays import Float32
from fedrounds.fl_components.errors import ModelError
from fedrounds.fl_components.models import ModelRule, build_seeded
from fedrounds.fl_components.parameters import constants_digest
from fedrounds.fl_components.shared_memory import SharedMemory
from fedrounds.fl_components.task import Classification, LearningTask
from fedrounds.fl_components.training.chunk import ExampleTable
from fedrounds.fl_components.training.engine import Engine, ShardReport, StreamingSum
from fedrounds.fl_components.training.sgd import SGD
from fedrounds.fl_components.training.threads import one_thread
from fedrounds.fl_components.values import ClientTask

Shard = Sequence[ClientTask]
Result = tuple[type[np.floating], tuple[int, ...]]
OnShard = Callable[[str, float, float, int], object]
T = TypeVar("T")
RowTask = Callable[[Float32], T]
"""Work on some rows of updates, float32 [N, D]. It goes to other processes: pickle must be able to write it."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """How another process builds the same model, and what the model learns.

    `constants_digest` is that of its frozen parameters and buffers.
    """

    rule: ModelRule
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    seed: int
    constants_digest: str
    task: LearningTask = field(default_factory=Classification)

    def build(self) -> torch.nn.Module:
        """Raises `ModelError` when it is not the same in all that is not trained."""
        module = build_seeded(self.rule, self.input_shape, self.output_shape, self.seed)
        if constants_digest(module) != self.constants_digest:
            raise ModelError(
                "the model's frozen parameters or buffers are others in each process that builds it",
                hint="draw them from torch's generator, which is seeded, or set execution.processes to 1",
            )
        return module


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """All that local training needs besides a round's own values: the same for all rounds of a run.

    Args:
      module: the model with its initial parameters.
      spec: how another process builds it.
      examples: all clients' training examples, x [M, ...] and y [M, ...]; client i has the rows starts[i]:stops[i].
      num_parameters: D.
      most_of_shard: the most clients that any shard has.
      result: of a shard, its type and shape: the sum of its updates [D], or the updates [most_of_shard, D].
    """

    module: torch.nn.Module
    spec: ModelSpec
    examples: SharedMemory
    num_parameters: int
    most_of_shard: int
    result: Result

    def engine(self, device: str = "cpu") -> Engine:
        """An engine in this process."""
        x, y = (torch.from_numpy(self.examples[name]).to(device) for name in ("x", "y"))
        return Engine(self.module, ExampleTable(x, y, self.examples["starts"], self.examples["stops"], self.spec.task))


class RowMapper(Protocol):
    """Work other than training, on updates in some rows, wherever that is."""

    def __call__(
        self, work_on: Callable[[slice], RowTask[T]], rows_ND: Float32, unit: int, *, reads: bool, writes: bool
    ) -> Iterator[T]:
        """What the work on each piece of the rows returns, in the order of the pieces.

        Args:
          work_on: the work on a piece of the rows.
          rows_ND: updates, float32 [N, D].
          unit: pieces are cut at multiples of so many rows.
          reads: whether the work looks at what its rows hold.
          writes: whether what it leaves in them is to be in `rows_ND`; it leaves them alone otherwise.
        """


def here(
    work_on: Callable[[slice], RowTask[T]], rows_ND: Float32, unit: int, *, reads: bool, writes: bool
) -> Iterator[T]:
    """A `RowMapper` over one piece: in this process, on one thread.

    >>> ones_ND = np.ones((3, 2), np.float32)
    >>> list(here(lambda rows: len, ones_ND, 1, reads=True, writes=False))
    [3]
    """
    _ = unit, reads, writes
    with one_thread():
        done = work_on(slice(0, len(rows_ND)))(rows_ND)
    yield done


class Trainer(ABC):
    """Trains shards of clients. Which one, and with how many processes, never changes a bit of what comes out.

    `on_shard` is told of each shard that was trained: its name, when it began and ended (seconds since the epoch), and
    the id of the process that trained it.
    """

    on_shard: OnShard = staticmethod(lambda name, began, ended, process: None)

    @abstractmethod
    def train(
        self, rule: SGD, params_D: Float32, shards: Sequence[Shard], streaming: StreamingSum | None, rounds_left: int
    ) -> Iterator[tuple[ShardReport, NDArray[np.floating]]]:
        """Each shard's report and result, in the order of the shards. Asking for the next one overwrites a result.

        `rounds_left` counts this one: what is worth while for many rounds may not be for one. Raises `ModelError`, and
        `RunFailed` when processes that train a shard die again and again.
        """

    def spread(
        self, work_on: Callable[[slice], RowTask[T]], rows_ND: Float32, unit: int, *, reads: bool, writes: bool
    ) -> Iterator[T]:
        """A `RowMapper` over the processes that train, where there are any. Raises what `train` raises."""
        return here(work_on, rows_ND, unit, reads=reads, writes=writes)

    def close(self) -> None:  # noqa: B027 (most trainers start nothing)
        """End what was started."""

    @property
    def peak_memory_bytes(self) -> int:
        """The most memory that this process held so far, and with it those that train for it."""
        return peak_memory_bytes()


def peak_memory_bytes() -> int:
    """The most memory that this process held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def private_memory_bytes() -> int:
    """The memory that this process holds for itself: what it shares with others is theirs as well, and counted there.

    Where the system does not tell (Linux does), the most memory that it held.
    """
    try:
        resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
    except OSError:
        return peak_memory_bytes()
    return (resident - shared) * resource.getpagesize()


class OwnTrainer(Trainer):
    """In this process, on one thread."""

    def __init__(self, workload: Workload, say: Callable[[str], None], device: str = "cpu") -> None:
        self._workload, self._say, self._device = workload, say, device
        self._engine: Engine | None = None

    @property
    def is_new(self) -> bool:
        """Whether nothing was trained yet."""
        return self._engine is None

    def train(
        self, rule: SGD, params_D: Float32, shards: Sequence[Shard], streaming: StreamingSum | None, rounds_left: int
    ) -> Iterator[tuple[ShardReport, NDArray[np.floating]]]:
        if self._engine is None:
            self._engine = self._workload.engine(self._device)
            if self._engine.note:
                self._say(self._engine.note)
        result = empty(self._workload.result)
        for shard in shards:
            began = time.time()
            report = self._engine.train(rule, params_D, shard, result, streaming)
            self.on_shard(name_of(shard), began, time.time(), os.getpid())
            yield report, result


def empty(result: Result) -> NDArray[np.floating]:
    """Room for what a shard comes to."""
    dtype, shape = result
    return np.empty(shape, dtype)


def name_of(shard: Shard) -> str:
    """A shard's name in a profile."""
    return f"{len(shard)} clients from {shard[0].client_id}" if shard else "nobody"
