"""An aggregation: the mean of updates, of which none counts for more than a given length."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from fedrounds.fl_components.aggregation import AggregationRule
from fedrounds.fl_components.arrays import Float32, Float64
from fedrounds.fl_components.values import Accumulator


class CappedMean(AggregationRule):
    """Every client weighs the same; an update longer than `cap` is scaled down to that length.

    >>> rule = CappedMean(cap=5.0)
    >>> deltas_ND = np.array([[30.0, 40.0], [0.0, 1.0]], np.float32)  # lengths 50 and 1
    >>> rule.aggregate(rule.add(rule.init(2), deltas_ND, np.ones(2)))
    array([1.5, 2.5])
    """

    kind: Literal["capped_mean"] = "capped_mean"
    cap: float = Field(default=1.0, gt=0)

    def init(self, num_parameters: int) -> Accumulator:
        return Accumulator({"sum": np.zeros(num_parameters)})

    def add(self, partial: Accumulator, deltas_ND: Float32, weights_N: Float64) -> Accumulator:
        deltas_ND = deltas_ND.astype(np.float64)
        lengths_N = np.linalg.norm(deltas_ND, axis=1)
        scales_N = np.minimum(1.0, self.cap / np.maximum(lengths_N, 1e-12))
        return Accumulator({"sum": partial.tensors["sum"] + scales_N @ deltas_ND}, partial.count + len(deltas_ND))

    def aggregate(self, partial: Accumulator) -> Float64:
        return partial.tensors["sum"] / max(1, partial.count)
