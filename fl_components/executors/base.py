"""`Executor`: the interface that the stages use to train shards of clients and to map functions over updates."""

from __future__ import annotations

import resource
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from fedrounds.fl_components.arrays import Float32
from fedrounds.fl_components.models import ModelSpec
from fedrounds.fl_components.shared_memory import SharedMemory
from fedrounds.fl_components.task import LearningTask
from fedrounds.fl_components.training import SGD, Engine, ExampleTable, ShardReport, StreamingSum, one_thread
from fedrounds.fl_components.values import SimulatedClient

Shard = Sequence[SimulatedClient]
ArrayType = tuple[type[np.floating], tuple[int, ...]]
"""The type and shape of an array."""
Access = Literal["r", "w", "r+"]
"""What a function does with the rows that it is given, in numpy's terms: "r" only reads them, "w" fills all of them
and reads none, "r+" reads and changes them."""
OnShard = Callable[[str, float, float, int], object]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """Everything that local training needs and that stays the same for all rounds of a run.

    Args:
      module: the model with its initial parameters.
      spec: how another process builds it.
      task: what the model learns.
      examples: all clients' training examples, x [M, ...] and y [M, ...]; client i has the rows starts[i]:stops[i].
      num_parameters: D.
      result: the type and shape of a shard's result: the sum of its updates [D], or its updates [N, D], where N is the
        size of the largest shard.
    """

    module: torch.nn.Module
    spec: ModelSpec
    task: LearningTask
    examples: SharedMemory
    num_parameters: int
    result: ArrayType


def make_engine(
    module: torch.nn.Module,
    examples: SharedMemory | Mapping[str, NDArray[Any]],
    task: LearningTask,
    device: str = "cpu",
) -> Engine:
    """Return an engine that trains `module` on the examples of a `Workload`, without copying them."""
    x, y = (torch.from_numpy(examples[name]).to(device) for name in ("x", "y"))
    return Engine(module, ExampleTable(x, y, examples["starts"], examples["stops"], task))


class RowMapper(Protocol):
    """Maps a function over blocks of updates: `Executor.map_rows`, or `map_inline`."""

    def __call__(
        self,
        function: Callable[..., T],
        rows_ND: Float32,
        *columns: Sequence[Any],
        block_rows: int = 1,
        access: Access = "r",
    ) -> Iterator[T]:
        """Yield what `function(rows_BD, *blocks)` returns for each block of rows, in the order of the blocks.

        Args:
          function: called with a block of the rows and with the same block of each column. It may be called in another
            process, so pickle must be able to write it, the columns and what it returns.
          rows_ND: updates, float32 [N, D].
          columns: sequences of length N.
          block_rows: the size of a block is a multiple of this, except that of the last one.
          access: what the function does with its rows: "r" only reads them, "w" fills all of them, "r+" changes them.
        """


def map_inline(
    function: Callable[..., T], rows_ND: Float32, *columns: Sequence[Any], block_rows: int = 1, access: Access = "r"
) -> Iterator[T]:
    """Apply the function to all rows as one block, in this process and on one thread: the plainest `RowMapper`.

    >>> list(map_inline(lambda rows_BD, names: (rows_BD.shape, names), np.ones((2, 3), np.float32), ["a", "b"]))
    [((2, 3), ['a', 'b'])]
    """
    _ = block_rows, access
    with one_thread():
        result = function(rows_ND, *columns)
    yield result


class Executor(ABC):
    """Runs the work of clients. The choice of the executor, and of its size, changes no bit of a result.

    Attributes:
      on_shard: called for each trained shard with its name, its start and end (seconds since the epoch) and the id of
        the process that trained it.
    """

    on_shard: OnShard = staticmethod(lambda name, began, ended, process: None)

    @abstractmethod
    def train(
        self, rule: SGD, base_M: Float32, shards: Sequence[Shard], streaming: StreamingSum | None
    ) -> Iterator[tuple[ShardReport, NDArray[np.floating]]]:
        """Yield each shard's report and result, in the order of the shards.

        A result is the sum of the shard's updates [D] with `streaming`, and the updates [n, D] without. It is valid
        until the next one is requested.

        Raises:
          ModelError: the model failed. The message names the clients.
          RunFailed: workers were lost again and again while they trained the same shard.
        """

    def map_rows(
        self,
        function: Callable[..., T],
        rows_ND: Float32,
        *columns: Sequence[Any],
        block_rows: int = 1,
        access: Access = "r",
    ) -> Iterator[T]:
        """Map a function over blocks of updates, wherever training runs (see `RowMapper`). Raises what `train` does."""
        return map_inline(function, rows_ND, *columns, block_rows=block_rows, access=access)

    def close(self) -> None:  # noqa: B027 (an executor without workers has nothing to end)
        """End the workers."""

    @property
    def peak_memory_bytes(self) -> int:
        """The peak memory of this process and of the workers."""
        return peak_memory_bytes()


def peak_memory_bytes() -> int:
    """Return the peak memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def private_memory_bytes() -> int:
    """Return the memory that this process does not share with others.

    Where the system does not report it (Linux does), the peak memory of the process.
    """
    try:
        resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
    except OSError:
        return peak_memory_bytes()
    return (resident - shared) * resource.getpagesize()


def empty(array_type: ArrayType) -> NDArray[np.floating]:
    """Return an array of this type and shape whose values are arbitrary."""
    dtype, shape = array_type
    return np.empty(shape, dtype)


def name_of(shard: Shard) -> str:
    """Return a shard's name in a profile."""
    return f"{len(shard)} clients from {shard[0].client_id}" if shard else "no clients"
