"""What every aggregator promises; a new rule is one line in CASES."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize

from fedrounds.fl_components.aggregation import (
    Aggregator,
    GeometricMedian,
    LinearAggregator,
    Mean,
    NearestNeighborMixing,
    Updates,
)
from fedrounds.fl_components.arrays import Float32, Float64
from fedrounds.fl_components.values import Accumulator


def least_sum_of_distances(deltas: Float64, weights: Float64) -> Float64:
    """The geometric median by its definition, found by SciPy's BFGS."""
    _ = weights
    found = minimize(lambda point: np.linalg.norm(deltas - point, axis=1).sum(), deltas.mean(0), method="BFGS")
    return np.asarray(found.x)


def mixed_mean(deltas: Float64, weights: Float64) -> Float64:
    """The mean after each update became the mean of the 20 of 23 that are closest to it, in plain loops."""
    _ = weights
    mixed = []
    for delta in deltas:
        nearest = sorted(range(len(deltas)), key=lambda other: float(np.sum((deltas[other] - delta) ** 2)))[:20]
        mixed.append(deltas[nearest].mean(0))
    return np.mean(mixed, axis=0)


# Each rule, and what it makes of deltas [N, M] and numbers of examples [N], in other words.
CASES: list[tuple[Aggregator, Any]] = [
    (Mean(), lambda deltas, weights: np.average(deltas, axis=0, weights=weights)),
    (Mean(weights="uniform"), lambda deltas, weights: np.average(deltas, axis=0)),
    (Mean(weights="uniform", prepare=(NearestNeighborMixing(num_byzantine=3),)), mixed_mean),
    (GeometricMedian(), least_sum_of_distances),
]
LINEAR = [rule for rule, _ in CASES if isinstance(rule, LinearAggregator) and not rule.prepare]


def name_of(rule: Any) -> str:
    chain = "".join(f" after {each.kind}" for each in rule.prepare) if isinstance(rule, Aggregator) else ""
    return f"{rule.kind} {getattr(rule, 'weights', '')}{chain}" if isinstance(rule, Aggregator) else ""


def updates(num_clients: int = 23, num_coordinates: int = 40, seed: int = 0) -> Updates:
    generator = np.random.default_rng(seed)
    updates_NM = generator.standard_normal((num_clients, num_coordinates)).astype(np.float32)
    num_examples_N = generator.integers(1, 300, num_clients).astype(np.float64)
    names = tuple(f"c{client}" for client in range(num_clients))
    return Updates(names, updates_NM, num_examples_N, np.zeros(num_clients, np.int64))


def permuted(given: Updates, order: NDArray[Any]) -> Updates:
    names = tuple(given.client_ids[place] for place in order)
    return Updates(names, given.updates_NM[order], given.num_examples_N[order], given.staleness_N[order])


def combine(rule: Aggregator, given: Updates) -> Float64:
    """What a rule makes of a copy of the updates, which it may overwrite."""
    own = Updates(given.client_ids, given.updates_NM.copy(), given.num_examples_N, given.staleness_N)
    return rule.combine(own, rule.init(given.updates_NM.shape[1])).aggregate_M


@pytest.mark.parametrize(("rule", "expected"), CASES, ids=name_of)
class TestAggregator:
    def test_it_computes_what_it_says(self, rule: Aggregator, expected: Any) -> None:
        given = updates()
        aggregate_M = combine(rule, given)
        assert (aggregate_M.dtype, aggregate_M.shape) == (np.float64, (40,))
        exact = isinstance(rule, Mean)
        want = expected(given.updates_NM.astype(np.float64), given.num_examples_N)
        np.testing.assert_allclose(aggregate_M, want, rtol=1e-6 if exact else 0, atol=1e-7 if exact else 1e-4)

    def test_the_order_of_clients_does_not_matter(self, rule: Aggregator, expected: Any) -> None:
        given = updates()
        order = np.random.default_rng(1).permutation(23)
        np.testing.assert_allclose(combine(rule, given), combine(rule, permuted(given, order)), rtol=1e-5, atol=1e-6)

    def test_one_update_is_its_own_aggregate(self, rule: Aggregator, expected: Any) -> None:
        given = updates(1)
        np.testing.assert_allclose(combine(rule, given), given.updates_NM[0], rtol=1e-6)

    def test_equal_updates_are_their_own_aggregate(self, rule: Aggregator, expected: Any) -> None:
        given = updates()
        given.updates_NM[:] = given.updates_NM[0]
        np.testing.assert_allclose(combine(rule, given), given.updates_NM[0], rtol=1e-6)

    def test_it_moves_with_the_updates(self, rule: Aggregator, expected: Any) -> None:
        """Adding the same vector to all updates adds it to the aggregate; so does scaling."""
        given, before_M = updates(), combine(rule, updates())
        moved = Updates(given.client_ids, 2 * given.updates_NM + 3, given.num_examples_N, given.staleness_N)
        np.testing.assert_allclose(combine(rule, moved), 2 * before_M + 3, rtol=1e-4, atol=1e-4)

    def test_no_updates_aggregate_to_zeros(self, rule: Aggregator, expected: Any) -> None:
        assert combine(rule, updates(0)).tolist() == [0.0] * 40

    def test_a_cohort_that_is_too_small_is_refused(self, rule: Aggregator, expected: Any) -> None:
        rule.check(rule.num_needed)
        if rule.num_needed > 1:
            with pytest.raises(ValueError, match=f"needs {rule.num_needed} updates, but a round selects at most"):
                rule.check(rule.num_needed - 1)


def collect(rule: LinearAggregator, given: Updates, shard_size: int) -> Accumulator:
    total = rule.start(given.updates_NM.shape[1])
    for start in range(0, len(given.client_ids), shard_size):
        shard = slice(start, start + shard_size)
        total = rule.add(total, given.updates_NM[shard], given.num_examples_N[shard])
    return total


def same_bits(one: Accumulator, other: Accumulator) -> bool:
    return one.count == other.count and all(
        tensor.tobytes() == other.tensors[name].tobytes() for name, tensor in one.tensors.items()
    )


@pytest.mark.parametrize("rule", LINEAR, ids=name_of)
class TestLinearAggregator:
    @pytest.mark.parametrize("shard_size", [1, 5, 23, 100])
    def test_the_streamed_sum_is_what_all_updates_come_to(self, rule: LinearAggregator, shard_size: int) -> None:
        total = collect(rule, updates(), shard_size)
        assert total.count == 23
        np.testing.assert_allclose(rule.finish(total), combine(rule, updates()), rtol=1e-12, atol=1e-14)

    @given(cuts=st.lists(st.integers(0, 6), max_size=6), shard_size=st.integers(1, 6))
    def test_where_waves_are_cut_changes_no_bit(self, rule: LinearAggregator, cuts: list[int], shard_size: int) -> None:
        """A wave is whole shards, summed by itself where it was computed."""
        given = updates()
        whole, total = collect(rule, given, shard_size), rule.start(40)
        edges = [0, *sorted(min(cut * shard_size, 23) for cut in cuts), 23]
        for start, stop in pairwise(edges):
            for begin in range(start, stop, shard_size):
                shard = slice(begin, min(begin + shard_size, stop))
                total = rule.add(total, given.updates_NM[shard], given.num_examples_N[shard])
        assert same_bits(total, whole)

    def test_adding_changes_no_argument(self, rule: LinearAggregator) -> None:
        given = updates()
        first = rule.add(rule.start(40), given.updates_NM, given.num_examples_N)
        before = [each.tobytes() for each in (*first.tensors.values(), given.updates_NM, given.num_examples_N)]
        rule.add(first, given.updates_NM, given.num_examples_N)
        rule.finish(first)
        after = [each.tobytes() for each in (*first.tensors.values(), given.updates_NM, given.num_examples_N)]
        assert after == before


class TestMean:
    def test_by_hand(self) -> None:
        deltas_NM: Float32 = np.array([[1, 0], [4, 3]], np.float32)
        given = Updates(("a", "b"), deltas_NM, np.array([30.0, 10.0]), np.zeros(2, np.int64))
        assert combine(Mean(), given).tolist() == [1.75, 0.75]
        assert combine(Mean(weights="uniform"), given).tolist() == [2.5, 1.5]

    def test_the_sum_is_not_rounded_to_float32(self) -> None:
        deltas_NM = np.array([[1.0], [2**-30], [-1.0]], np.float32)
        given = Updates(("a", "b", "c"), deltas_NM, np.ones(3), np.zeros(3, np.int64))
        assert combine(Mean(), given)[0] == 2**-30 / 3

    def test_memory_does_not_grow_with_the_cohort(self) -> None:
        rule, deltas_NM, weights_N = Mean(), np.ones((4, 50_000), np.float32), np.ones(4)
        total = rule.start(50_000)
        tracemalloc.start()
        try:
            for _ in range(20):
                total = rule.add(total, deltas_NM, weights_N)
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert total.count == 80
        assert peak_bytes < 6 * 8 * 50_000  # a few float64 vectors, of which the 80 updates would be 40


class TestGeometricMedian:
    def test_of_a_triangle_it_is_the_fermat_point(self) -> None:
        """From which each side is seen under 120 degrees."""
        corners = np.array([[0.0, 0.0], [4.0, 0.0], [1.0, 3.0]], np.float32)
        given = Updates(("a", "b", "c"), corners, np.ones(3), np.zeros(3, np.int64))
        away = corners - combine(GeometricMedian(), given)
        units = away / np.linalg.norm(away, axis=1, keepdims=True)
        cosines = [float(units[one] @ units[other]) for one, other in ((0, 1), (1, 2), (2, 0))]
        np.testing.assert_allclose(cosines, [-0.5] * 3, atol=1e-4)

    @given(scale=st.sampled_from([1e3, 1e10, 1e18]), seed=st.integers(0, 2**32))
    def test_fewer_than_half_cannot_move_it_far(self, scale: float, seed: int) -> None:
        """The bound of Lopuhaa and Rousseeuw 1991, theorem 2.2: 2 (1 - a) / (1 - 2 a) times the largest distance of an
        honest update from the median, with a share a of attackers."""
        given = updates(20, 10, seed)
        honest_M = combine(GeometricMedian(), Updates(given.client_ids[:13], given.updates_NM[:13], *[np.ones(13)] * 2))
        given.updates_NM[13:] = scale * np.random.default_rng(seed).standard_normal((7, 10))
        moved = np.linalg.norm(combine(GeometricMedian(), given) - honest_M)
        radius = np.linalg.norm(given.updates_NM[:13] - honest_M, axis=1).max()
        assert moved <= 2 * (1 - 7 / 20) / (1 - 14 / 20) * radius


class TestNearestNeighborMixing:
    def test_after_it_attackers_among_few_no_longer_stand_out(self) -> None:
        given = updates(11, 5)
        given.updates_NM[9:] = 1e6
        mixed = NearestNeighborMixing(num_byzantine=2).apply(
            Updates(given.client_ids, given.updates_NM.copy(), given.num_examples_N, given.staleness_N)
        )
        assert np.abs(mixed.updates_NM[:9]).max() < 10  # the mean of honest ones alone

    def test_it_is_a_step_of_the_configuration(self) -> None:
        rule = Mean.model_validate({"prepare": [{"kind": "nearest_neighbor_mixing", "num_byzantine": 1}]})
        assert rule.prepare == (NearestNeighborMixing(num_byzantine=1),) and rule.num_needed == 3
