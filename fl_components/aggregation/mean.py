"""The mean of the updates: McMahan et al. 2017, "Communication-efficient learning of deep networks from decentralized
data", algorithm 1 (https://arxiv.org/abs/1602.05629)."""

from __future__ import annotations

from typing import Literal

import numpy as np

from fl_components.aggregation.base import AggregationRule
from fl_components.values import Float32, Float64, Partial


class Mean(AggregationRule):
    """sum_i w_i delta_i / sum_i w_i, where w_i is the client's number of examples, or 1.

    A shard is summed in float64 in the order of the cohort, and shards are added in order: the result depends on the
    shard size, never on the number of waves or processes.

    >>> rule = Mean(weights="num_examples")
    >>> deltas_ND = np.array([[1.0, 0.0], [4.0, 3.0]], np.float32)
    >>> rule.aggregate(rule.add(rule.init(2), deltas_ND, np.array([2.0, 1.0])))
    array([2., 1.])
    """

    kind: Literal["mean"] = "mean"
    weights: Literal["num_examples", "uniform"] = "num_examples"

    def init(self, num_parameters: int) -> Partial:
        return Partial({"sum": np.zeros(num_parameters), "weight": np.zeros(1)})

    def add(self, partial: Partial, deltas_ND: Float32, weights_N: Float64) -> Partial:
        weights_N = weights_N if self.weights == "num_examples" else np.ones(len(deltas_ND))
        shard_D = np.zeros_like(partial.tensors["sum"])
        for delta_D, weight in zip(deltas_ND, weights_N, strict=True):
            shard_D += delta_D.astype(np.float64) * weight
        return Partial(
            {"sum": partial.tensors["sum"] + shard_D, "weight": partial.tensors["weight"] + weights_N.sum()},
            partial.count + len(deltas_ND),
        )

    def aggregate(self, partial: Partial) -> Float64:
        mean_D: Float64 = partial.tensors["sum"] / (partial.tensors["weight"] if partial.count else 1.0)
        return mean_D
