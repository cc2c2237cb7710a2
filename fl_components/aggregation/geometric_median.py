"""The geometric median of the updates."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from fedrounds.fl_components.aggregation.base import AggregationResult, Aggregator
from fedrounds.fl_components.aggregation.updates import Updates
from fedrounds.fl_components.arrays import Float64, Tensors


class GeometricMedian(Aggregator):
    """The point with the least sum of distances to the updates, by the smoothed Weiszfeld algorithm (Pillutla et al.
    2022, https://arxiv.org/abs/1912.13445, algorithm 2).

    Fewer than half of the clients cannot move it far, however long their updates are. Every client counts the same:
    the server cannot check a client's number of examples.

    >>> updates_NM = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1e6, 1e6]], np.float32)
    >>> updates = Updates(("a", "b", "c", "d"), updates_NM, np.ones(4), np.zeros(4, np.int64))
    >>> GeometricMedian().aggregate(updates, {}).aggregate_M.round(3)
    array([0.5, 0.5])
    """

    kind: Literal["geometric_median"] = "geometric_median"
    max_iterations: int = Field(default=100, ge=1)
    tolerance: float = Field(
        default=1e-6,
        gt=0,
        description="stop once an iteration moves the median by less than this share of the median distance",
    )

    def aggregate(self, updates: Updates, state: Tensors) -> AggregationResult:
        median_M = _weighted_mean(updates, np.ones(len(updates.client_ids)))
        distances_N = _distances(updates, median_M)
        num_iterations = 0
        while num_iterations < self.max_iterations:
            scale = float(np.median(distances_N))  # the mean would be the attackers' choice
            if scale == 0:
                break
            num_iterations += 1
            previous_M = median_M
            median_M = _weighted_mean(updates, 1 / np.maximum(distances_N, self.tolerance * scale))
            distances_N = _distances(updates, median_M)
            if np.linalg.norm(median_M - previous_M) <= self.tolerance * scale:
                break
        return AggregationResult(median_M, state, {"iterations": num_iterations})


def _weighted_mean(updates: Updates, weights_N: Float64) -> Float64:
    shares_N = weights_N / weights_N.sum()
    mean_M = np.empty(updates.updates_NM.shape[1])
    for columns in updates.columns():
        mean_M[columns] = shares_N @ updates.updates_NM[:, columns].astype(np.float64)
    return mean_M


def _distances(updates: Updates, point_M: Float64) -> Float64:
    """The Euclidean distance of each update from a point, float64 [N]."""
    squares_N = np.zeros(len(updates.client_ids))
    for columns in updates.columns():
        squares_N += np.square(updates.updates_NM[:, columns] - point_M[columns]).sum(axis=1)
    return np.sqrt(squares_N)
