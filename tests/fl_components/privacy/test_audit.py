"""The audit of single examples: its p-values are the theorem's, no honest one is accused, and half the noise is."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import linprog
from scipy.sparse import lil_matrix

from fedrounds.fl_components.arrays import Float64, Int64
from fedrounds.fl_components.errors import ConfigError
from fedrounds.fl_components.privacy import audit as auditing
from fedrounds.fl_components.privacy.accountants import pld_epsilon
from fedrounds.fl_components.privacy.audit import (
    AuditReport,
    audit_releases,
    claimed_event,
    claimed_mu,
    count_right,
    gaussian_epsilon,
    largest_refuted_mu,
    numbers_of_guesses,
    p_value,
    violates_claim,
)
from tests.support import cases


def key_of(seed: int) -> auditing.KeyOf:
    return lambda purpose: f"{seed} {purpose}".encode().ljust(32)


def step(noise_multiplier: float, seed: int = 0) -> auditing.Release:
    """DP-SGD's, as plain as can be: canaries that are in nobody's way, clipped to 1."""

    def release(joined_M: Any, number: int) -> Float64:
        noise_M = np.random.default_rng([seed, number]).normal(0, noise_multiplier, len(joined_M))
        return joined_M + noise_M

    return release


def audited(claimed: float, true: float | auditing.Release, seed: int = 0, **settings: Any) -> AuditReport:
    release = step(true, seed) if isinstance(true, float) else true
    return audit_releases(release, key_of(seed), noise_multiplier=claimed, delta=1e-5, num_parameters=2_000, **settings)


class TestPValue:
    def test_one_canary_is_told_as_well_as_two_normal_distributions_are(self) -> None:
        for mu in (0.0, 0.3, 2.0, 6.0):
            assert p_value(1, 1, 1, mu) == pytest.approx(stats.norm.cdf(mu / 2), rel=2e-4)
            many = p_value(1, 1, 40, mu, num_releases=50)
            assert many == pytest.approx(stats.binom(50, stats.norm.cdf(mu / 2)).sf(39), rel=0.01, abs=2e-12)

    @pytest.mark.parametrize(
        ("canaries", "guesses", "right", "mu"),
        [(5, 5, 4, 0.0), (12, 12, 9, 0.5), (12, 12, 12, 2.0), (30, 10, 9, 1.0), (200, 10, 10, 0.5), (20, 20, 14, 0.2)],
    )
    def test_it_is_the_largest_tail_that_the_theorem_allows(
        self, canaries: int, guesses: int, right: int, mu: float
    ) -> None:
        """By linear programming, without the recursion: over all p, for all sets of counts that go to the top; and for
        all sets whatever, which allow less, but never less than a mechanism that tells each coin on its own."""
        found = p_value(canaries, guesses, right, mu)
        assert found == pytest.approx(largest_tail(canaries, guesses, right, mu, upper_sets=True), rel=2e-3)
        exact = largest_tail(canaries, guesses, right, mu, upper_sets=False)
        assert exact <= found * 1.002 and found <= 1.3 * exact
        if canaries == guesses:
            assert exact >= stats.binom(guesses, stats.norm.cdf(mu / 2)).sf(right - 1) * 0.999

    def test_without_any_knowledge_the_theorem_allows_what_coins_do(self) -> None:
        """At mu = 0, all its sets together give the binomial tail; those that the recursion uses, a little more."""
        for guesses, right in [(5, 4), (12, 9), (20, 18)]:
            binomial = stats.binom(guesses, 0.5).sf(right - 1)
            assert largest_tail(guesses, guesses, right, 0.0, upper_sets=False) == pytest.approx(binomial, rel=1e-6)
            assert binomial < p_value(guesses, guesses, right, 0.0) < 1.3 * binomial
        for right in (60, 65, 70):
            binomial = stats.binom(100, 0.5).sf(right - 1)
            assert binomial < p_value(100, 100, right, 0.0) < 1.3 * binomial

    @pytest.mark.parametrize(("canaries", "guesses", "right"), [(1000, 800, 650), (1000, 20, 20), (100, 100, 90)])
    @pytest.mark.parametrize("mu", [0.3, 1.0, 2.5])
    def test_it_is_the_papers_procedure(self, canaries: int, guesses: int, right: int, mu: float) -> None:
        """As published, with arrays for r and h: what a threshold of the p-value decides, either side of it."""

        def consistent(tail: float) -> bool:
            r, h = np.zeros(right + 1), np.zeros(right + 1)
            r[right] = tail * right / canaries
            h[right] = tail * (guesses - right) / canaries
            for i in range(right - 1, -1, -1):
                h[i] = max(h[i + 1], stats.norm.cdf(stats.norm.ppf(r[i + 1]) - mu))
                r[i] = r[i + 1] + i / (guesses - i) * (h[i] - h[i + 1])
            return bool(r[0] + h[0] <= guesses / canaries)

        found = p_value(canaries, guesses, right, mu)
        assert consistent(found * 0.999)
        assert found == 1.0 or not consistent(min(1.0, found * 1.001))

    @given(
        canaries=st.integers(1, 300),
        share=st.floats(0, 1),
        told=st.floats(0, 1),
        mu=st.floats(0, 5),
        releases=st.integers(1, 3),
    )
    @settings(max_examples=cases(40), deadline=None)
    def test_more_right_is_less_likely_and_a_larger_mu_makes_it_likelier(
        self, canaries: int, share: float, told: float, mu: float, releases: int
    ) -> None:
        guesses = round(share * canaries)
        right = round(told * guesses * releases)
        here = p_value(canaries, guesses, right, mu, releases)
        assert 0 < here <= 1
        assert p_value(canaries, guesses, right, mu + 0.5, releases) >= here * 0.9997 - 2e-12
        if right < guesses * releases:
            assert p_value(canaries, guesses, right + 1, mu, releases) <= here * 1.0003 + 2e-12

    def test_extremes(self) -> None:
        assert p_value(100, 0, 0, 1.0) == p_value(100, 100, 0, 0.0) == p_value(100, 0, 0, 1.0, num_releases=3) == 1
        assert p_value(100, 100, 100, 1e6) == pytest.approx(1, rel=1e-3)
        assert p_value(100, 100, 100, 0.0) < 1e-16
        assert p_value(1000, 1000, 500, 0.0) == 1.0
        assert p_value(100, 50, 200, 0.0, num_releases=4) < 2e-12

    def test_what_cannot_be(self) -> None:
        for canaries, guesses, releases in [(0, 0, 1), (10, 11, 1), (10, -1, 1), (10, 10, 0)]:
            with pytest.raises(ValueError, match=f"{guesses} guesses about {canaries} canaries in {releases}"):
                p_value(canaries, guesses, 0, 1.0, releases)
        for right in (-1, 21):
            with pytest.raises(ValueError, match=f"of 10 guesses in each of 2 releases {right} cannot be right"):
                p_value(10, 10, right, 1.0, 2)
        for mu in (-0.1, math.inf, math.nan):
            with pytest.raises(ValueError, match="mu is a finite number from 0 on"):
                p_value(10, 10, 5, mu)

    def test_it_is_as_rarely_small_as_it_says_for_honest_mechanisms(self) -> None:
        """Each coin told by a normal variable of its own, which is the most that a mu-GDP mechanism tells of one."""
        rng = np.random.default_rng(1)
        for canaries, releases, mu, sims in [
            (1, 50, 1.0, 1000),
            (1000, 30, 2.0, 50),
            (100, 10, 2.0, 300),
            (200, 1, 2.0, 300),
        ]:
            guesses_G = numbers_of_guesses(canaries) if canaries > 1 else np.array([1])
            right_SG = np.array([told(rng, canaries, releases, 1 / mu, guesses_G) for _ in range(sims)])
            for guesses, right_S in zip(guesses_G, right_SG.T, strict=True):
                known = {
                    int(right): p_value(canaries, int(guesses), int(right), mu, releases) for right in set(right_S)
                }
                p_values_S = np.array([known[int(right)] for right in right_S])
                for level in (0.3, 0.1, 0.03):
                    limit = stats.binom(sims, level).ppf(0.999)
                    assert (p_values_S <= level).sum() <= limit, (canaries, guesses, level)
                if canaries == 1:  # and there it is no smaller than it must be
                    assert stats.binom(sims, 0.3).ppf(0.001) / 2 < (p_values_S <= 0.3).sum()

    def test_what_releases_add_up_to(self) -> None:
        """By enumeration, of two releases with these tails."""
        tails = [p_value(40, 6, right, 0.7) for right in range(7)]
        masses = -np.diff(tails, append=0.0)
        for right in range(13):
            by_hand = sum(masses[a] * masses[b] for a in range(7) for b in range(7) if a + b >= right)
            assert p_value(40, 6, right, 0.7, num_releases=2) == pytest.approx(by_hand, abs=1e-11)

    def test_a_coarse_grid_only_errs_upward(self, monkeypatch: pytest.MonkeyPatch) -> None:
        exact = [p_value(300, 150, right, 1.0, 3) for right in range(330, 451, 20)]
        monkeypatch.setattr(auditing, "GRID", 40)
        auditing._sum_masses.cache_clear()
        coarse = [p_value(300, 150, right, 1.0, 3) for right in range(330, 451, 20)]
        auditing._sum_masses.cache_clear()
        assert all(a <= 1.0003 * b for a, b in zip(exact, coarse, strict=True))
        assert max(b / a for a, b in zip(exact, coarse, strict=True)) > 1.05


class TestLargestRefuted:
    def test_it_is_where_the_p_value_meets_the_level(self) -> None:
        for releases, right in [(1, 990), (10, 9300)]:
            mu = largest_refuted_mu(20_000 if releases == 1 else 2000, [(1000, right)], 0.99, releases)
            canaries = 20_000 if releases == 1 else 2000
            assert (
                p_value(canaries, 1000, right, mu, releases)
                <= 0.01
                < p_value(canaries, 1000, right, mu * 1.004, releases)
            )

    def test_the_best_of_several_and_their_correction(self) -> None:
        one = largest_refuted_mu(1000, [(100, 390)], 0.999, 4)
        two = largest_refuted_mu(1000, [(500, 1000), (100, 390)], 0.999, 4)
        assert 0.9 * one < two < one
        assert two == pytest.approx(largest_refuted_mu(1000, [(100, 390)], 0.9995, 4), rel=2e-3)
        assert largest_refuted_mu(1000, [(100, 50), (500, 250)], 0.999) == 0
        assert largest_refuted_mu(1000, [(100, 0)], 0.999) == 0
        assert largest_refuted_mu(1000, [(500, 2000)], 0.999, 4) > 2

    def test_100_000_canaries_take_no_time(self) -> None:
        rng, guesses_G = np.random.default_rng(3), numbers_of_guesses(100_000)
        for releases in (1, 3):
            right_G = told(rng, 100_000, releases, 0.5, guesses_G)
            start = time.perf_counter()
            found = [(int(guesses), int(right)) for guesses, right in zip(guesses_G, right_G, strict=True)]
            assert 1.0 < largest_refuted_mu(100_000, found, 0.999, releases) < 2.0
            assert time.perf_counter() - start < 10


class TestClaim:
    @pytest.mark.parametrize(("noise_multiplier", "steps"), [(1.0, 1), (4.0, 4)])
    def test_it_is_what_the_accountant_says(self, noise_multiplier: float, steps: int) -> None:
        by_accountant = pld_epsilon({claimed_event(noise_multiplier, steps): 1}, "zero_out", 1e-5)
        assert by_accountant == pytest.approx(gaussian_epsilon(claimed_mu(noise_multiplier, steps), 1e-5), rel=1e-3)


class TestAudit:
    def test_half_the_noise_is_accused_and_all_of_it_is_not(self) -> None:
        for noise_multiplier in (0.5, 2.0):
            honest, half = (audited(noise_multiplier, noise_multiplier * part, num_canaries=500) for part in (1.0, 0.5))
            assert not violates_claim(honest) and honest.epsilon_lower_bound < honest.claimed_epsilon
            assert violates_claim(half) and half.claimed_epsilon < half.epsilon_lower_bound
            assert half.epsilon_lower_bound < gaussian_epsilon(2 / noise_multiplier, half.delta)
            assert half.verdict.startswith("claim violated: ") and honest.verdict.startswith(
                "consistent with the claim: "
            )

    def test_no_noise_and_noise_in_some_places_only(self) -> None:
        def partly(joined_M: Any, number: int) -> Float64:
            """A fifth of the canaries are without."""
            return np.concatenate([joined_M[:200], step(1.0)(joined_M[200:], number)])

        assert violates_claim(audited(1.0, 0.0))
        assert not violates_claim(audited(1.0, partly))  # its surest guesses are made where there is noise

    def test_clipping_to_twice_the_norm_is_as_much_as_half_the_noise(self) -> None:
        assert violates_claim(audited(1.0, lambda joined_M, number: step(1.0)(2 * joined_M, number), num_canaries=200))

    def test_coins_are_fair_and_new_ones_in_each_release(self) -> None:
        seen: list[Any] = []

        def release(joined_M: Any, number: int) -> Float64:
            assert number == len(seen) and joined_M.dtype == bool
            seen.append(joined_M)
            return step(1.0)(joined_M, number)

        report = audited(1.0, release, num_canaries=200, num_releases=3)
        assert len({each.tobytes() for each in seen}) == 3
        assert sum(map(np.sum, seen)) == report.num_joined and 240 < report.num_joined < 360

    def test_the_report_is_plain_and_the_same_again(self) -> None:
        report, again = (audited(1.0, 0.5, seed=3, num_canaries=500, num_releases=4) for _ in range(2))
        assert report == again
        assert AuditReport(**json.loads(json.dumps(asdict(report), allow_nan=False))) == report
        assert (report.delta, report.noise_multiplier, report.confidence) == (1e-5, 1.0, 0.999)
        assert (report.num_canaries, report.num_releases, report.num_parameters) == (500, 4, 2_000)
        assert 0 < report.num_right <= report.num_guesses
        assert report.claimed_epsilon == pytest.approx(4.3772, abs=1e-3)
        assert report != audited(1.0, 0.5, seed=4, num_canaries=500, num_releases=4)

    def test_guesses_are_ranks(self) -> None:
        rng = np.random.default_rng(0)
        scores_M, joined_M = rng.standard_normal(400), rng.random(400) < 0.5
        guesses_G = numbers_of_guesses(400)
        right_G = count_right(scores_M, joined_M, guesses_G)
        order = sorted(range(400), key=lambda canary: -scores_M[canary])
        for guesses, right in zip(guesses_G, right_G, strict=True):
            half = guesses // 2
            assert right == sum(joined_M[order[:half]]) + sum(~joined_M[order[-half:]])
        assert (count_right(7 * scores_M - 3, joined_M, guesses_G) == right_G).all()
        assert (count_right(joined_M * 1.0, joined_M, guesses_G) == guesses_G).all()
        assert numbers_of_guesses(50).tolist() == [2, 4, 12, 24]

    def test_what_cannot_be_audited(self) -> None:
        for settings_ in ({"num_canaries": 49}, {"num_releases": 0}):
            with pytest.raises(ConfigError, match="are too few for an audit"):
                audited(1.0, 1.0, **settings_)
        for wrong in (
            lambda joined_M, number: step(1.0)(joined_M, number)[1:],
            lambda joined_M, number: step(1.0)(joined_M, number) * np.nan,
        ):
            with pytest.raises(ConfigError, match="a step over 1000 canaries did not release a finite score of each"):
                audited(1.0, wrong)

    def test_where_nothing_could_be_shown(self) -> None:
        with pytest.raises(ConfigError, match=r"in 10 releases were right, a noise multiplier of 0\.35 could be true"):
            audited(0.35, 0.35)
        assert violates_claim(audited(0.4, 0.2))
        with pytest.raises(
            ConfigError, match=r"50 canaries in 1 releases were right, a noise multiplier of 1 could be"
        ):
            audited(1.0, 1.0, num_canaries=50, num_releases=1)

    def test_it_accuses_at_its_level(self) -> None:
        report = audited(1.0, 0.5)
        assert violates_claim(replace(report, p_value=0.0009)) and not violates_claim(replace(report, p_value=0.0011))


def told(rng: np.random.Generator, canaries: int, releases: int, noise_multiplier: float, guesses_G: Int64) -> Int64:
    """How many guesses are right about Dirac canaries, whose scores are independent, without a mechanism."""
    right_G = np.zeros(len(guesses_G), np.int64)
    for _ in range(releases):
        joined_M = rng.random(canaries) < 0.5
        scores_M = joined_M + noise_multiplier * rng.standard_normal(canaries, dtype=np.float32)
        if canaries == 1:
            right_G += (scores_M > 0.5) == joined_M
        else:
            right_G += count_right(scores_M, joined_M, guesses_G)
    return right_G


def largest_tail(canaries: int, guesses: int, right: int, mu: float, upper_sets: bool) -> float:
    """Linear programming over p_0, ..., p_n. The curve g is the least of its tangents, delta(epsilon) + e^epsilon x.
    Each of them bounds what the sets from a count to the top have, or what the worst set whatever has: that of a slack
    variable for the excess of each count."""
    slopes = np.exp(np.linspace(-2, 4 * mu + 4, 150)) if mu else np.ones(1)
    excess = (np.arange(1, guesses + 1) / canaries, np.arange(guesses, 0, -1) / canaries)  # of p_t, and of p_{t-1}
    variables = guesses + 1 + (0 if upper_sets else len(slopes) * guesses)
    rows, limits = lil_matrix((len(slopes) * (guesses + 1), variables)), np.zeros(len(slopes) * (guesses + 1))
    for i, slope in enumerate(slopes):
        delta = tangent_at_zero(mu, slope)
        for t in range(1, guesses + 1):
            row = i * (guesses + 1) + t - 1
            for s in range(t, guesses + 1 if upper_sets else t + 1):
                rows[row, s] += excess[0][s - 1]
                rows[row, s - 1] -= slope * excess[1][s - 1]
            if upper_sets:
                limits[row] = delta
            else:
                rows[row, guesses + 1 + i * guesses + t - 1] = -1
        if not upper_sets:
            row = i * (guesses + 1) + guesses
            rows[row, guesses + 1 + i * guesses : guesses + 1 + (i + 1) * guesses] = 1
            limits[row] = delta
    wanted, sums = np.zeros(variables), np.zeros((1, variables))
    wanted[right : guesses + 1], sums[0, : guesses + 1] = -1, 1
    found = linprog(wanted, A_ub=rows.tocsr(), b_ub=limits, A_eq=sums, b_eq=[1], bounds=(0, None), method="highs")
    return float(-found.fun)


def tangent_at_zero(mu: float, slope: float) -> Float64 | float:
    if not mu:
        return 0.0
    epsilon = math.log(slope)
    return stats.norm.cdf(mu / 2 - epsilon / mu) - slope * stats.norm.cdf(-mu / 2 - epsilon / mu)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("noise_multiplier", "canaries", "releases"),
    [
        *[(noise_multiplier, 1000, 10) for noise_multiplier in (0.4, 0.5, 1.0, 2.0, 4.0)],
        *[(0.5, 100, 10), (1.0, 70, 10), (2.0, 200, 10), (4.0, 700, 10)],
        *[(1.0, 20_000, 1), (2.0, 30_000, 1), (4.0, 100_000, 1)],
    ],
)
def test_half_the_noise_is_caught_and_nobody_else_over_many_seeds(
    noise_multiplier: float, canaries: int, releases: int
) -> None:
    """Of 1,000 honest ones none is accused, and half the noise is 19 times in 20: the table of docs/privacy.md. (Where
    95 % are caught, fewer than 90 of 100 are so once in 100 times.)"""
    rng, guesses_G = np.random.default_rng(11), numbers_of_guesses(canaries)
    known: dict[tuple[int, int], bool] = {}

    def accused(true: float) -> bool:
        right_G = told(rng, canaries, releases, true, guesses_G)
        for guesses, right in zip(map(int, guesses_G), map(int, right_G), strict=True):
            if (guesses, right) not in known:
                p = p_value(canaries, guesses, right, claimed_mu(noise_multiplier), releases)
                known[guesses, right] = p * len(guesses_G) <= 1e-3
        return any(known[pair] for pair in zip(map(int, guesses_G), map(int, right_G), strict=True))

    assert sum(accused(noise_multiplier / 2) for _ in range(100)) >= 90
    assert sum(accused(noise_multiplier) for _ in range(1_000)) == 0
