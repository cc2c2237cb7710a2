"""What every aggregation rule does."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from fedrounds.fl_components.arrays import Float32, Float64
from fedrounds.fl_components.rules import Rule
from fedrounds.fl_components.values import Accumulator


class AggregationRule(Rule):
    """Updates of a cohort, taken in piece by piece, to one update.

    `init`, then `add` for each shard in the order of the cohort, then `aggregate`. A rule keeps in its `Accumulator` no
    more than it needs, so that an additive one never holds N x D.
    """

    kind: str

    @abstractmethod
    def init(self, num_parameters: int) -> Accumulator:
        """The partial of no updates."""

    @abstractmethod
    def add(self, partial: Accumulator, deltas_ND: Float32, weights_N: Float64) -> Accumulator:
        """`partial` and one shard's updates (float32 [N, D]) with the clients' numbers of examples (float64 [N])."""

    @abstractmethod
    def aggregate(self, partial: Accumulator) -> Float64:
        """The aggregated update, float64 [D]; zeros where no update came (a round may do without: min_updates 0)."""


class AdditiveRule(AggregationRule):
    """A rule that needs no more than the weighted sum of the updates: they may be added up where they are made.

    A shard is summed in the order of its clients, and shards are added in order in float64: the result depends on the
    shard size, never on the number of waves, processes or machines.
    """

    @property
    @abstractmethod
    def max_weight(self) -> float | None:
        """The largest weight that a client can have; None where nothing limits it."""

    @abstractmethod
    def weigh(self, num_examples_N: Float64) -> Float64:
        """Each client's weight [N], from its number of examples."""

    def init(self, num_parameters: int) -> Accumulator:
        return Accumulator({"sum": np.zeros(num_parameters), "weight": np.zeros(1)})

    def add(self, partial: Accumulator, deltas_ND: Float32, weights_N: Float64) -> Accumulator:
        weights_N = self.weigh(weights_N)
        sum_D = np.zeros_like(partial.tensors["sum"])
        for delta_D, weight in zip(deltas_ND, weights_N, strict=True):
            sum_D += delta_D.astype(np.float64) * weight
        return self.add_sum(partial, sum_D, float(weights_N.sum()), len(deltas_ND))

    def add_sum(self, partial: Accumulator, sum_D: Float32 | Float64, weight: float, count: int) -> Accumulator:
        """`partial` and the weighted sum of `count` updates, whose weights add up to `weight`."""
        tensors = {"sum": partial.tensors["sum"] + sum_D, "weight": partial.tensors["weight"] + weight}
        return Accumulator(tensors, partial.count + count)
