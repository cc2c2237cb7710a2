"""An aggregator: the mean of updates, of which none counts for more than a given length."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from fedrounds.fl_components.aggregation import AggregationResult, Aggregator, Updates
from fedrounds.fl_components.arrays import Tensors


class CappedMean(Aggregator):
    """The mean of updates, each of which is scaled down to length `cap` where it is longer.

    >>> updates_NM = np.array([[30.0, 40.0], [0.0, 1.0]], np.float32)  # lengths 50 and 1
    >>> updates = Updates(("a", "b"), updates_NM, np.ones(2), np.zeros(2, np.int64))
    >>> CappedMean(cap=5.0).aggregate(updates, {}).aggregate_M
    array([1.5, 2.5])
    """

    kind: Literal["capped_mean"] = "capped_mean"
    cap: float = Field(default=1.0, gt=0)

    def aggregate(self, updates: Updates, state: Tensors) -> AggregationResult:
        """Return the mean, and how many updates were scaled down."""
        sum_M, num_capped = np.zeros(updates.updates_NM.shape[1]), 0
        for update_M in updates.updates_NM:  # one after the other: they may be in a file
            length = float(np.linalg.norm(update_M.astype(np.float64)))
            sum_M += update_M * min(1.0, self.cap / max(length, 1e-12))
            num_capped += length > self.cap
        return AggregationResult(sum_M / len(updates.client_ids), state, {"capped": num_capped})
