"""The updates of a round, as aggregators see them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np

from fedrounds.fl_components.arrays import Float32, Float64, Int64

FLOATS_PER_BLOCK: Final = 1 << 18
"""Numbers of updates that are worked on at a time: 2 MB as float64."""


@dataclass(frozen=True, slots=True, eq=False)
class Updates:
    """The admitted updates of a round, in the order of the cohort.

    Args:
      client_ids: [N].
      updates_NM: float32, one update in each row. It is memory-mapped where all of them exceed `execution.memory_mb`,
        so work on blocks of it. A pre-aggregation may overwrite it.
      num_examples_N: the clients' numbers of training examples, float64.
      staleness_N: how many rounds old the parameters are that each update started from, int64.
    """

    client_ids: tuple[str, ...]
    updates_NM: Float32
    num_examples_N: Float64
    staleness_N: Int64

    def columns(self) -> list[slice]:
        """Return slices of coordinates, in order, of about `FLOATS_PER_BLOCK` numbers each.

        >>> Updates(("a",), np.zeros((1, 3), np.float32), np.ones(1), np.zeros(1, np.int64)).columns()
        [slice(0, 3, None)]
        """
        num_clients, num_coordinates = self.updates_NM.shape
        width = max(1, FLOATS_PER_BLOCK // max(1, num_clients))
        edges = [*range(0, num_coordinates, width), num_coordinates]
        return [slice(start, stop) for start, stop in pairwise(edges)]

    def squared_distances(self) -> Float64:
        """Return the squared Euclidean distance of each pair of updates, float64 [N, N]."""
        distances_NN = np.zeros((len(self.client_ids),) * 2)
        for columns in self.columns():
            block = self.updates_NM[:, columns].astype(np.float64)
            squares_N = np.square(block).sum(axis=1)
            distances_NN += squares_N[:, None] + squares_N[None, :] - 2 * block @ block.T
        np.fill_diagonal(distances_NN, 0)
        return np.maximum(distances_NN, 0)
