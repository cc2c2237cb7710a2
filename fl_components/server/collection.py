"""What a round has collected so far."""

from __future__ import annotations

import math
import mmap
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fedrounds.fl_components.admission import Clip
from fedrounds.fl_components.aggregation import LinearAggregator, Updates
from fedrounds.fl_components.arrays import Float32, Float64
from fedrounds.fl_components.privacy.clipping import add_contributions
from fedrounds.fl_components.rejections import Rejection
from fedrounds.fl_components.server.federation import Federation
from fedrounds.fl_components.values import Accumulator, ClientTask, CohortStatistics, RoundPlan


class UpdateStack:
    """Updates that come in wave by wave.

    One array [N, M], in memory up to a limit, else in a file that is memory-mapped.

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


def add_updates(
    federation: Federation,
    plan: RoundPlan,
    updates: Accumulator | UpdateStack,
    tasks: Sequence[ClientTask],
    updates_NM: Float32,
    rejected: Mapping[int, Rejection],
) -> Accumulator | UpdateStack:
    """Return the updates collected so far with those of one wave, taken in shard by shard."""
    rule, clip = federation.config.aggregation, federation.admission(plan).clip
    place_of = {task.client_id: place for place, task in enumerate(tasks)}
    for shard in plan.shards:
        places = [place_of[task.client_id] for task in plan.cohort[shard] if task.client_id in place_of]
        places = [place for place in places if place not in rejected]
        if not places:
            continue
        num_examples_N = np.array([float(tasks[place].num_examples) for place in places])
        is_contiguous = places == [*range(places[0], places[0] + len(places))]  # then there is no need for a copy
        shard_NM = updates_NM[places[0] : places[-1] + 1] if is_contiguous else updates_NM[places]
        if isinstance(updates, UpdateStack):
            updates.append([tasks[place].client_id for place in places], shard_NM, num_examples_N)
            continue
        assert isinstance(rule, LinearAggregator)
        if clip is None:
            updates = rule.add(updates, shard_NM, num_examples_N)
        else:
            updates = _add_clipped(federation, rule, updates, shard_NM, num_examples_N, clip)
    return updates


def _add_clipped(
    federation: Federation,
    rule: LinearAggregator,
    total: Accumulator,
    updates_NM: Float32,
    num_examples_N: Float64,
    clip: Clip,
) -> Accumulator:
    """Return the sum with clipped updates: the server clips what it decoded, whatever compression made of it."""
    assert rule.max_weight is not None
    weights_N, sum_M1 = rule.weigh(num_examples_N), np.zeros(updates_NM.shape[1] + 1)
    sizes = [math.prod(shape) for shape in federation.update_layout.shapes]
    tensors = torch.from_numpy(updates_NM).split_with_sizes(sizes, dim=1)
    add_contributions(sum_M1, tensors, torch.from_numpy(weights_N / rule.max_weight), clip)
    return rule.add_sum(total, sum_M1, float(weights_N.sum()), len(updates_NM))
