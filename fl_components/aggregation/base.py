"""Aggregators: how the updates of a cohort become one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fedrounds.fl_components.aggregation.prepare import Preparation
from fedrounds.fl_components.aggregation.updates import Updates
from fedrounds.fl_components.arrays import Float32, Float64, Tensors
from fedrounds.fl_components.rules import Rule
from fedrounds.fl_components.values import Accumulator


@dataclass(frozen=True, slots=True, eq=False)
class AggregationResult:
    """The result of an aggregator.

    Args:
      aggregate_M: the aggregated update, float64 [M].
      state: the aggregator's new state, which the checkpoint keeps.
      metrics: what the aggregator measured, by name.
      excluded: the clients whose updates it left out, each with the reason.
    """

    aggregate_M: Float64
    state: Tensors = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    excluded: Mapping[str, str] = field(default_factory=dict)


class Aggregator(Rule):
    """Base of the aggregators.

    `prepare` is a chain of pre-aggregations, which are applied to the updates in this order before they are aggregated.
    """

    kind: str
    prepare: tuple[Preparation, ...] = ()

    @property
    def min_updates(self) -> int:
        """The fewest updates that the rule itself can aggregate. An empty cohort aggregates to zeros all the same."""
        return 1

    @property
    def num_needed(self) -> int:
        """The fewest updates that the rule and its preparation can work on."""
        return max([self.min_updates, *(preparation.min_updates for preparation in self.prepare)])

    def check(self, cohort_size: int) -> None:
        """Raise `ValueError` where a cohort of `cohort_size` clients is too small for the rule or its preparation.

        A rule with laws of its own extends this.
        """
        if cohort_size < self.num_needed:
            chain = "".join(f" after {preparation.kind}" for preparation in self.prepare)
            raise ValueError(
                f"aggregation.kind {self.kind}{chain} needs {self.num_needed} updates, but a round selects at most "
                f"{cohort_size} clients: no round could succeed; select more clients, or assume fewer Byzantine ones"
            )

    def init(self, num_coordinates: int) -> Tensors:
        """Return the state before the first round, for updates of `num_coordinates` (M)."""
        _ = num_coordinates
        return {}

    def combine(self, updates: Updates, state: Tensors) -> AggregationResult:
        """Prepare the updates, which may overwrite them, and aggregate them; zeros where there are none."""
        if not updates.client_ids:
            return AggregationResult(np.zeros(updates.updates_NM.shape[1]), state)
        for preparation in self.prepare:
            updates = preparation.apply(updates)
        return self.aggregate(updates, state)

    @abstractmethod
    def aggregate(self, updates: Updates, state: Tensors) -> AggregationResult:
        """Return the aggregate of one or more updates."""


class LinearAggregator(Aggregator):
    """Base of the aggregators that need only the weighted sum of the updates: the sum may be streamed.

    `start`, then `add` for each shard in the order of the cohort, then `finish`. A shard is summed in the order of its
    clients, and shards are added in order in float64: the result depends on the shard size, never on the number of
    waves, processes or machines.
    """

    @property
    @abstractmethod
    def max_weight(self) -> float | None:
        """The largest weight that a client can have; None where nothing limits it."""

    @abstractmethod
    def weigh(self, num_examples_N: Float64) -> Float64:
        """Return each client's weight [N], from its number of examples."""

    @abstractmethod
    def finish(self, total: Accumulator) -> Float64:
        """Return the aggregate of a sum, float64 [M]; zeros where the sum is empty."""

    def start(self, num_coordinates: int) -> Accumulator:
        """Return the empty sum."""
        return Accumulator({"sum": np.zeros(num_coordinates), "weight": np.zeros(1)})

    def add(self, total: Accumulator, updates_NM: Float32, num_examples_N: Float64) -> Accumulator:
        """Return `total` and one shard's updates, float32 [N, M], with the clients' numbers of examples [N]."""
        weights_N = self.weigh(num_examples_N)
        sum_M = np.zeros_like(total.tensors["sum"])
        for update_M, weight in zip(updates_NM, weights_N, strict=True):
            sum_M += update_M.astype(np.float64) * weight
        return self.add_sum(total, sum_M, float(weights_N.sum()), len(updates_NM))

    def add_sum(self, total: Accumulator, sum_M: Float32 | Float64, weight: float, count: int) -> Accumulator:
        """Return `total` and the weighted sum of `count` updates, whose weights add up to `weight`."""
        tensors = {"sum": total.tensors["sum"] + sum_M, "weight": total.tensors["weight"] + weight}
        return Accumulator(tensors, total.count + count)

    def aggregate(self, updates: Updates, state: Tensors) -> AggregationResult:
        total = self.add(self.start(updates.updates_NM.shape[1]), updates.updates_NM, updates.num_examples_N)
        return AggregationResult(self.finish(total), state)
