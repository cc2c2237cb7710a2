"""What every aggregation rule promises; a new rule is one line in CASES."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedrounds.fl_components.aggregation import AggregationRule, Mean
from fedrounds.fl_components.arrays import Float64
from fedrounds.fl_components.values import Accumulator, CohortResult

# Each rule, and what it makes of deltas [N, D] and numbers of examples [N], in other words.
CASES = [
    (Mean(), lambda deltas, weights: np.average(deltas, axis=0, weights=weights)),
    (Mean(weights="uniform"), lambda deltas, weights: np.average(deltas, axis=0)),
]


def updates(num_clients: int = 23, num_parameters: int = 40, seed: int = 0) -> tuple[Any, Float64]:
    generator = np.random.default_rng(seed)
    deltas_ND = generator.standard_normal((num_clients, num_parameters)).astype(np.float32)
    return deltas_ND, generator.integers(1, 300, num_clients).astype(np.float64)


def collect(rule: AggregationRule, deltas_ND: Any, weights_N: Float64, shard_size: int) -> Accumulator:
    partial = rule.init(deltas_ND.shape[1])
    for start in range(0, len(deltas_ND), shard_size):
        shard = slice(start, start + shard_size)
        partial = rule.add(partial, deltas_ND[shard], weights_N[shard])
    return partial


def same_bits(a: Accumulator, b: Accumulator) -> bool:
    return a.count == b.count and CohortResult(a).to_bytes() == CohortResult(b).to_bytes()


@pytest.mark.parametrize(("rule", "expected"), CASES, ids=lambda case: getattr(case, "weights", ""))
class TestAggregationRule:
    @pytest.mark.parametrize("shard_size", [1, 5, 23, 100])
    def test_it_computes_what_it_says(self, rule: AggregationRule, expected: Any, shard_size: int) -> None:
        deltas_ND, weights_N = updates()
        partial = collect(rule, deltas_ND, weights_N, shard_size)
        aggregate_D = rule.aggregate(partial)
        assert (partial.count, aggregate_D.dtype, aggregate_D.shape) == (23, np.float64, (40,))
        np.testing.assert_allclose(
            aggregate_D, expected(deltas_ND.astype(np.float64), weights_N), rtol=1e-12, atol=1e-14
        )

    def test_the_order_of_clients_does_not_matter(self, rule: AggregationRule, expected: Any) -> None:
        deltas_ND, weights_N = updates()
        order = np.random.default_rng(1).permutation(23)
        aggregates = [
            rule.aggregate(collect(rule, deltas, weights, 4))
            for deltas, weights in ((deltas_ND, weights_N), (deltas_ND[order], weights_N[order]))
        ]
        np.testing.assert_allclose(*aggregates, rtol=1e-12, atol=1e-14)

    @given(cuts=st.lists(st.integers(0, 6), max_size=6), shard_size=st.integers(1, 6))
    def test_where_waves_are_cut_changes_no_bit(
        self, rule: AggregationRule, expected: Any, cuts: list[int], shard_size: int
    ) -> None:
        deltas_ND, weights_N = updates()
        whole = collect(rule, deltas_ND, weights_N, shard_size)
        partial = rule.init(40)
        edges = [0, *sorted(min(cut * shard_size, 23) for cut in cuts), 23]
        for start, stop in pairwise(edges):  # a wave is whole shards; between two waves the partial may rest
            partial = CohortResult.from_bytes(CohortResult(partial).to_bytes()).partial
            for begin in range(start, stop, shard_size):
                shard = slice(begin, min(begin + shard_size, stop))
                partial = rule.add(partial, deltas_ND[shard], weights_N[shard])
        assert same_bits(partial, whole)

    def test_a_partial_is_kept_bit_for_bit(self, rule: AggregationRule, expected: Any) -> None:
        partial = collect(rule, *updates(), 4)
        kept = CohortResult.from_bytes(CohortResult(partial).to_bytes()).partial
        assert same_bits(kept, partial)
        assert rule.aggregate(kept).tobytes() == rule.aggregate(partial).tobytes()

    def test_adding_changes_no_argument(self, rule: AggregationRule, expected: Any) -> None:
        deltas_ND, weights_N = updates()
        first = rule.add(rule.init(40), deltas_ND, weights_N)
        before = CohortResult(first).to_bytes(), deltas_ND.tobytes(), weights_N.tobytes()
        rule.add(first, deltas_ND, weights_N)
        rule.aggregate(first)
        assert (CohortResult(first).to_bytes(), deltas_ND.tobytes(), weights_N.tobytes()) == before

    def test_one_update_is_its_own_aggregate(self, rule: AggregationRule, expected: Any) -> None:
        deltas_ND, weights_N = updates(1)
        np.testing.assert_allclose(rule.aggregate(collect(rule, deltas_ND, weights_N, 1)), deltas_ND[0], rtol=1e-12)

    def test_equal_updates_are_their_own_aggregate(self, rule: AggregationRule, expected: Any) -> None:
        deltas_ND, weights_N = updates()
        deltas_ND = np.repeat(deltas_ND[:1], 23, axis=0)
        np.testing.assert_allclose(rule.aggregate(collect(rule, deltas_ND, weights_N, 4)), deltas_ND[0], rtol=1e-6)


class TestMean:
    def test_by_hand(self) -> None:
        deltas_ND, weights_N = np.array([[1, 0], [4, 3]], np.float32), np.array([30.0, 10.0])
        assert Mean().aggregate(collect(Mean(), deltas_ND, weights_N, 2)).tolist() == [1.75, 0.75]
        uniform = Mean(weights="uniform")
        assert uniform.aggregate(collect(uniform, deltas_ND, weights_N, 2)).tolist() == [2.5, 1.5]

    def test_the_sum_is_not_rounded_to_float32(self) -> None:
        deltas_ND = np.array([[1.0], [2**-30], [-1.0]], np.float32)
        assert Mean().aggregate(collect(Mean(), deltas_ND, np.ones(3), 3))[0] == 2**-30 / 3

    def test_memory_does_not_grow_with_the_cohort(self) -> None:
        rule, deltas_ND, weights_N = Mean(), np.ones((4, 50_000), np.float32), np.ones(4)
        partial = rule.init(50_000)
        tracemalloc.start()
        try:
            for _ in range(20):
                partial = rule.add(partial, deltas_ND, weights_N)
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert partial.count == 80
        assert peak_bytes < 6 * 8 * 50_000  # a few float64 vectors, of which the 80 updates would be 40
