"""What every selection rule promises; a new rule is one line in CASES."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from pydantic import ValidationError

from fl_components.clients import Clients, SelectionRule, Uniform
from fl_components.randomness import generator

CASES = [Uniform(), Uniform(cohort_size=1), Uniform(cohort_size=7), Uniform(cohort_size=20)]


def clients(num_clients: int, round: int = 1) -> Clients:
    """A table in which nothing is known of the clients, and none has taken part."""
    return Clients(
        num_clients, round, seed=0, attribute=lambda name: np.zeros(num_clients, np.int64), participations=np.zeros_like
    )


@pytest.mark.parametrize("rule", CASES, ids=repr)
class TestSelectionRule:
    @pytest.mark.parametrize("num_clients", [20, 21, 500, 20_000])
    def test_rows_are_distinct_sorted_and_in_range(self, rule: SelectionRule, num_clients: int) -> None:
        for round in range(5):
            rows = rule.select(clients(num_clients), generator(0, round, "selection"))
            assert rows.dtype == np.int64
            assert len(rows) == rule.cohort_size_of(num_clients)
            assert (np.diff(rows) > 0).all()
            assert rows[0] >= 0
            assert rows[-1] < num_clients

    def test_the_same_draw_selects_the_same(self, rule: SelectionRule) -> None:
        first, again = (rule.select(clients(500), generator(3, 4, "selection")) for _ in range(2))
        assert np.array_equal(first, again)

    def test_fewer_than_no_update_makes_no_sense(self, rule: SelectionRule) -> None:
        with pytest.raises(ValidationError, match="min_updates"):
            type(rule).model_validate(rule.model_dump() | {"min_updates": -1})


class TestUniform:
    def test_all_when_no_size_is_given(self) -> None:
        assert Uniform().select(clients(5), generator(0, 1, "selection")).tolist() == [0, 1, 2, 3, 4]
        assert Uniform(cohort_size=5).select(clients(5), generator(0, 1, "selection")).tolist() == [0, 1, 2, 3, 4]

    def test_rounds_differ(self) -> None:
        rounds = {tuple(Uniform(cohort_size=5).select(clients(100), generator(0, r, "selection"))) for r in range(50)}
        assert len(rounds) == 50

    @pytest.mark.parametrize(("num_clients", "size"), [(10, 3), (20_000, 100), (12_000, 500)])
    def test_every_client_is_as_likely_as_any_other(self, num_clients: int, size: int) -> None:
        """Chi-square on 10 equal bins of rows. Three sizes, because numpy draws each in another way."""
        draws = 2000 if size < 100 else 200
        counts = np.zeros(10)
        for round in range(draws):
            rows = Uniform(cohort_size=size).select(clients(num_clients), generator(0, round, "selection"))
            counts += np.bincount(rows * 10 // num_clients, minlength=10)
        expected = draws * size / 10
        statistic = ((counts - expected) ** 2 / expected).sum()
        # Without replacement the counts vary less than multinomial ones, by this factor.
        statistic /= (num_clients - size) / (num_clients - 1)
        assert statistic < 27.88  # chi-square with 9 degrees of freedom, at the level 0.001

    def test_every_pair_is_as_likely_as_any_other(self) -> None:
        counts = dict.fromkeys([(i, j) for i in range(5) for j in range(i + 1, 5)], 0)
        for round in range(5000):
            first, second = Uniform(cohort_size=2).select(clients(5), generator(1, round, "selection")).tolist()
            counts[first, second] += 1
        assert sum((count - 500) ** 2 / 500 for count in counts.values()) < 27.88  # 9 degrees of freedom, level 0.001

    def test_ten_million_clients_cost_what_the_cohort_costs(self) -> None:
        rule, draw = Uniform(cohort_size=1000), generator(0, 1, "selection")
        tracemalloc.start()
        try:
            rows = rule.select(clients(10_000_000), draw)
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert len(rows) == 1000
        assert peak_bytes < 200_000  # the table's rows alone would be 80 MB

    @pytest.mark.parametrize("size", [0, -1, 2.5])
    def test_sizes_that_are_refused(self, size: float) -> None:
        with pytest.raises(ValidationError, match="cohort_size"):
            Uniform.model_validate({"cohort_size": size})
