"""What every selection rule promises; a new rule is one line in CASES."""

from __future__ import annotations

import tracemalloc
from functools import cache
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from fedrounds.fl_components.population import (
    Always,
    AvailabilityRule,
    Bernoulli,
    Clients,
    Diurnal,
    Fair,
    Poisson,
    Selection,
    SelectionRule,
    Strata,
    Stratified,
    UniformSampling,
)
from fedrounds.fl_components.randomness import generator

HALF, BY_DAY = Bernoulli(probability=0.5), Diurnal(low=0.1, high=0.9)
CASES = [
    (UniformSampling(), Always()),
    (UniformSampling(cohort_size=1), Always()),
    (UniformSampling(cohort_size=7), Always()),
    (UniformSampling(cohort_size=20), Always()),
    (UniformSampling(cohort_size=7), HALF),
    (UniformSampling(), BY_DAY),
    (Poisson(sampling_rate=0.1), Always()),
    (Poisson(sampling_rate=1.0), Always()),
    (Poisson(sampling_rate=0.3), HALF),
    (Stratified(by="region", cohort_size=7), Always()),
    (Stratified(by="region", cohort_size=20, shares="equal"), Always()),
    (Stratified(by="region", cohort_size=7), HALF),
    (Fair(cohort_size=7), Always()),
    (Fair(cohort_size=20, oversampling=1), Always()),
    (Fair(cohort_size=7), BY_DAY),
]


def clients(
    num_clients: int, round: int = 1, participations: Any = None, availability: AvailabilityRule | None = None
) -> Clients:
    """A table of clients in four regions of unequal size, who by default are all there and never took part."""
    counts = np.zeros(num_clients, np.int64) if participations is None else participations
    return Clients(
        num_clients,
        round,
        seed=0,
        strata=lambda name: strata(num_clients),
        participations=lambda rows: counts[rows],
        availability=availability or Always(),
    )


def regions(num_clients: int) -> Any:
    return np.sort(np.arange(num_clients) % 10 % 4)


@cache
def strata(num_clients: int) -> Strata:
    return Strata.of(regions(num_clients))


SEVEN_AND_FIFTEEN = np.repeat([0, 1], [7, 15])


def peak_bytes(rule: SelectionRule, table: Clients) -> int:
    rule.select(table, generator(0, 1, "selection"))  # strata are sorted once
    tracemalloc.start()
    try:
        rule.select(table, generator(0, 2, "selection"))
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("rule", "there"), CASES, ids=repr)
class TestSelectionRule:
    @pytest.mark.parametrize("num_clients", [20, 21, 500, 20_000])
    def test_rows_are_distinct_sorted_in_range_and_available(
        self, rule: SelectionRule, there: AvailabilityRule, num_clients: int
    ) -> None:
        for round in range(1, 6):
            table = clients(num_clients, round, availability=there)
            rows = rule.select(table, generator(0, round, "selection"))
            assert rows.dtype == np.int64
            assert (np.diff(rows) > 0).all()
            assert not len(rows) or 0 <= rows[0] <= rows[-1] < num_clients
            assert there.available(rows, round, seed=0).all()

    def test_its_size_is_what_it_says(self, rule: SelectionRule, there: AvailabilityRule) -> None:
        tables = [clients(500, round, availability=there) for round in range(1, 41)]
        sizes = [len(rule.select(table, generator(0, table.round, "selection"))) for table in tables]
        expected = rule.cohort_size_of(500)
        if isinstance(rule, Poisson):
            share = getattr(there, "probability", 1.0)
            assert np.mean(sizes) == pytest.approx(expected * share, rel=0.1)
        elif expected == 500 and not isinstance(there, Always):
            assert np.mean(sizes) == pytest.approx(250, rel=0.2)  # all that are there
        else:
            assert set(sizes) == {expected}

    def test_where_too_few_are_there_fewer_are_selected(self, rule: SelectionRule, there: AvailabilityRule) -> None:
        rare = Bernoulli(probability=0.03)
        for round in range(1, 11):
            rows = rule.select(clients(100, round, availability=rare), generator(0, round, "selection"))
            available = np.flatnonzero(rare.available(np.arange(100), round, seed=0))
            assert set(rows.tolist()) <= set(available.tolist())
            if not isinstance(rule, Poisson | Stratified):  # whose absent clients, or strata without any, stay empty
                assert len(rows) == min(len(available), rule.cohort_size_of(100))

    def test_nobody_is_selected_where_nobody_is_there(self, rule: SelectionRule, there: AvailabilityRule) -> None:
        table = clients(20_000, availability=Bernoulli(probability=1e-12))
        rows = rule.select(table, generator(0, 1, "selection"))
        assert (rows.dtype, rows.shape) == (np.int64, (0,))

    def test_its_cohort_is_never_larger_than_it_says(self, rule: SelectionRule, there: AvailabilityRule) -> None:
        sizes = [len(rule.select(clients(20, r), generator(0, r, "selection"))) for r in range(1, 40)]
        assert max(sizes) <= rule.max_cohort_size_of(20) <= 20

    def test_the_same_draw_selects_the_same(self, rule: SelectionRule, there: AvailabilityRule) -> None:
        first, again = (rule.select(clients(500), generator(3, 4, "selection")) for _ in range(2))
        assert np.array_equal(first, again)

    def test_every_client_s_turn_comes(self, rule: SelectionRule, there: AvailabilityRule) -> None:
        counts = np.zeros(20, np.int64)
        for round in range(1, 400):
            counts[rule.select(clients(20, round, counts), generator(0, round, "selection"))] += 1
        assert counts.min() > 0

    def test_fewer_than_no_update_makes_no_sense(self, rule: SelectionRule, there: AvailabilityRule) -> None:
        with pytest.raises(ValidationError, match="min_updates"):
            type(rule).model_validate(rule.model_dump() | {"min_updates": -1})

    def test_written_and_read_again_it_is_the_same_rule(self, rule: SelectionRule, there: AvailabilityRule) -> None:
        assert TypeAdapter(Selection).validate_json(rule.model_dump_json()) == rule

    def test_a_round_costs_what_its_cohort_costs(self, rule: SelectionRule, there: AvailabilityRule) -> None:
        if rule.cohort_size_of(10**6) > 20:
            rule = Poisson(sampling_rate=1e-6)  # its cohort grows with the population
        # Bytes; a single table of ten million clients would be 80 million, and the strata's of one million 8 million.
        size = 1_000_000 if isinstance(rule, Stratified) else 10_000_000
        table = clients(size, availability=there)
        assert peak_bytes(rule, table) < 200_000
        if not isinstance(there, Always):
            rare = clients(size, availability=Bernoulli(probability=1e-9))
            assert peak_bytes(rule, rare) < 2_000_000  # it gives up


class TestPoisson:
    def test_an_absent_client_is_not_replaced(self) -> None:
        rule = Poisson(sampling_rate=0.2)
        for round in range(1, 20):
            coins = rule.select(clients(300, round), generator(0, round, "selection"))
            selected = rule.select(clients(300, round, availability=HALF), generator(0, round, "selection"))
            assert selected.tolist() == coins[HALF.available(coins, round, seed=0)].tolist()

    def test_each_client_has_a_coin_of_its_own(self) -> None:
        """Sizes vary as those of a binomial distribution: a fixed-size draw would have no variance."""
        sizes = [
            len(Poisson(sampling_rate=0.1).select(clients(200, r), generator(1, r, "selection"))) for r in range(2000)
        ]
        assert np.var(sizes) == pytest.approx(200 * 0.1 * 0.9, rel=0.15)

    def test_nobody_is_a_cohort(self) -> None:
        assert Poisson(sampling_rate=0.001).select(clients(5), generator(0, 1, "selection")).tolist() == []
        assert Poisson(sampling_rate=0.001).min_updates == 0


class TestStratified:
    def test_shares_are_proportional_by_the_largest_remainders(self) -> None:
        # 100 clients: regions 0 and 1 have 30 each, 2 and 3 have 20 each (0..9 modulo 4).
        rows = Stratified(by="region", cohort_size=10).select(clients(100), generator(0, 1, "selection"))
        assert np.bincount(regions(100)[rows]).tolist() == [3, 3, 2, 2]

    def test_shares_are_equal(self) -> None:
        found = [
            np.bincount(
                regions(100)[
                    Stratified(by="region", cohort_size=10, shares="equal").select(
                        clients(100), generator(0, round, "selection")
                    )
                ]
            )
            for round in range(50)
        ]
        assert {tuple(sorted(each)) for each in found} == {(2, 2, 3, 3)}
        assert (np.sum(found, axis=0) > 110).all()  # the two seats more go to other regions each time

    def test_equal_remainders_are_drawn_lots_for(self) -> None:
        table = Clients(22, 1, 0, strata=lambda name: Strata.of(SEVEN_AND_FIFTEEN), participations=np.zeros_like)
        rule = Stratified(by="x", cohort_size=11)  # 3.5 and 7.5 seats: exact halves, which floats would not see
        seats = [rule.select(table, generator(0, round, "selection")) for round in range(200)]
        assert {len(rows) for rows in seats} == {11}
        assert 70 < sum(int((rows < 7).sum()) == 4 for rows in seats) < 130

    def test_a_stratum_never_has_more_seats_than_clients(self) -> None:
        table = Clients(10, 1, 0, strata=lambda name: Strata.of(np.array([0] * 9 + [1])), participations=np.zeros_like)
        rows = Stratified(by="x", cohort_size=6, shares="equal").select(table, generator(0, 1, "selection"))
        assert len(rows) == 6 and rows[-1] == 9


class TestFair:
    def test_participations_differ_by_one_at_most(self) -> None:
        counts = np.zeros(23, np.int64)
        for round in range(1, 60):
            counts[Fair(cohort_size=5).select(clients(23, round, counts), generator(0, round, "selection"))] += 1
            assert counts.max() - counts.min() <= 1

    def test_of_a_large_population_those_who_took_part_are_passed_over(self) -> None:
        counts = np.zeros(100_000, np.int64)
        counts[:50_000] = 1
        rows = Fair(cohort_size=50).select(clients(100_000, 1, counts), generator(0, 1, "selection"))
        assert (rows >= 50_000).all()

    def test_it_asks_the_store_for_history(self) -> None:
        assert Fair(cohort_size=1).uses_history
        assert not UniformSampling().uses_history


class TestUniform:
    def test_all_when_no_size_is_given(self) -> None:
        assert UniformSampling().select(clients(5), generator(0, 1, "selection")).tolist() == [0, 1, 2, 3, 4]
        assert UniformSampling(cohort_size=5).select(clients(5), generator(0, 1, "selection")).tolist() == [
            0,
            1,
            2,
            3,
            4,
        ]

    def test_rounds_differ(self) -> None:
        rounds = {
            tuple(UniformSampling(cohort_size=5).select(clients(100), generator(0, r, "selection"))) for r in range(50)
        }
        assert len(rounds) == 50

    @pytest.mark.parametrize(("num_clients", "size"), [(10, 3), (20_000, 100), (12_000, 500)])
    def test_every_client_is_as_likely_as_any_other(self, num_clients: int, size: int) -> None:
        """Chi-square on 10 equal bins of rows. Three sizes, because numpy draws each in another way."""
        draws = 2000 if size < 100 else 200
        counts = np.zeros(10)
        for round in range(draws):
            rows = UniformSampling(cohort_size=size).select(clients(num_clients), generator(0, round, "selection"))
            counts += np.bincount(rows * 10 // num_clients, minlength=10)
        expected = draws * size / 10
        statistic = ((counts - expected) ** 2 / expected).sum()
        # Without replacement the counts vary less than multinomial ones, by this factor.
        statistic /= (num_clients - size) / (num_clients - 1)
        assert statistic < 27.88  # chi-square with 9 degrees of freedom, at the level 0.001

    def test_every_pair_is_as_likely_as_any_other(self) -> None:
        counts = dict.fromkeys([(i, j) for i in range(5) for j in range(i + 1, 5)], 0)
        for round in range(5000):
            first, second = UniformSampling(cohort_size=2).select(clients(5), generator(1, round, "selection")).tolist()
            counts[first, second] += 1
        assert sum((count - 500) ** 2 / 500 for count in counts.values()) < 27.88  # 9 degrees of freedom, level 0.001

    @pytest.mark.parametrize("size", [0, -1, 2.5])
    def test_sizes_that_are_refused(self, size: float) -> None:
        with pytest.raises(ValidationError, match="cohort_size"):
            UniformSampling.model_validate({"cohort_size": size})
