"""Pre-aggregations: what is done to a round's updates before they are aggregated."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from fedrounds.fl_components.aggregation.updates import Updates
from fedrounds.fl_components.rules import Rule, union


class PreAggregation(Rule):
    """Base of the pre-aggregations."""

    kind: str

    @property
    @abstractmethod
    def min_updates(self) -> int:
        """The fewest updates that the rule can work on."""

    @abstractmethod
    def apply(self, updates: Updates) -> Updates:
        """Return the updates that take the place of these; `updates.updates_NM` may be overwritten."""


class NearestNeighborMixing(PreAggregation):
    """Replace each update by the mean of the N - f updates that are closest to it, itself included, where f is
    `num_byzantine` (Allouah et al. 2023, https://arxiv.org/abs/2302.01772, algorithm 2).

    >>> updates_NM = np.array([[0.0], [1.0], [2.0], [100.0]], np.float32)
    >>> updates = Updates(("a", "b", "c", "d"), updates_NM, np.ones(4), np.zeros(4, np.int64))
    >>> NearestNeighborMixing(num_byzantine=1).apply(updates).updates_NM.ravel()
    array([ 1.     ,  1.     ,  1.     , 34.333332], dtype=float32)
    """

    kind: Literal["nearest_neighbor_mixing"] = "nearest_neighbor_mixing"
    num_byzantine: int = Field(ge=0, description="f, the largest number of Byzantine clients in a cohort")

    @property
    def min_updates(self) -> int:
        return 2 * self.num_byzantine + 1

    def apply(self, updates: Updates) -> Updates:
        num_updates = len(updates.client_ids)
        num_kept = max(1, num_updates - self.num_byzantine)
        nearest = np.argsort(updates.squared_distances(), axis=1, kind="stable")[:, :num_kept]
        mixing_NN = np.zeros((num_updates, num_updates))
        np.put_along_axis(mixing_NN, nearest, 1 / num_kept, axis=1)
        for columns in updates.columns():
            updates.updates_NM[:, columns] = mixing_NN @ updates.updates_NM[:, columns].astype(np.float64)
        return updates


if TYPE_CHECKING:
    Preparation = PreAggregation
else:
    Preparation = union("preaggregations", NearestNeighborMixing)
