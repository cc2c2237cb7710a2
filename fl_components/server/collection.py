"""What a round has collected so far."""

from __future__ import annotations

import mmap
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedrounds.fl_components.aggregation import Updates
from fedrounds.fl_components.arrays import Float32, Float64
from fedrounds.fl_components.values import Accumulator, CohortStatistics


class UpdateStack:
    """Updates that come in wave by wave: one array [N, M], in memory up to a limit, else in a file that is
    memory-mapped.

    The file has no name, so it ends with this process, whatever ends it.

    Args:
      num_rows: the most updates that may come.
      num_coordinates: M.
      memory_bytes: the limit.
      folder: where a file goes; it must be private.
    """

    def __init__(self, num_rows: int, num_coordinates: int, memory_bytes: int, folder: Path) -> None:
        self._client_ids: list[str] = []
        self._num_examples: list[float] = []
        self._map: mmap.mmap | None = None
        num_bytes = num_rows * num_coordinates * 4
        if num_bytes <= memory_bytes:
            self._rows_NM = np.empty((num_rows, num_coordinates), np.float32)
        else:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.truncate(num_bytes)
                self._map = mmap.mmap(file.fileno(), num_bytes)
            self._rows_NM = np.frombuffer(self._map, np.float32).reshape(num_rows, num_coordinates)

    def __len__(self) -> int:
        return len(self._client_ids)

    def append(self, client_ids: list[str], updates_NM: Float32, num_examples_N: Float64) -> None:
        """Take in updates, float32 [N, M], in the order of the cohort."""
        start = len(self)
        self._rows_NM[start : start + len(client_ids)] = updates_NM
        self._client_ids += client_ids
        self._num_examples += num_examples_N.tolist()
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)  # the file has the pages: this process need not hold them

    def updates(self) -> Updates:
        """Return the updates that came so far. They share memory with the stack."""
        count = len(self)
        return Updates(
            client_ids=tuple(self._client_ids),
            updates_NM=self._rows_NM[:count],
            num_examples_N=np.array(self._num_examples),
            staleness_N=np.zeros(count, np.int64),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Collection:
    """What a round has collected so far: the admitted updates or their running sum, and the statistics."""

    updates: Accumulator | UpdateStack
    statistics: CohortStatistics
