"""The audit violates_claim a mechanism that is less private than it claims, and no other."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from fedrounds.fl_components.arrays import Float64
from fedrounds.fl_components.errors import ConfigError
from fedrounds.fl_components.privacy import central_audit as auditing
from fedrounds.fl_components.privacy.accountants import pld_epsilon
from fedrounds.fl_components.privacy.audit import AuditReport, violates_claim
from fedrounds.fl_components.privacy.central import AdaptiveClipping, CentralPrivacy, Clipping, FixedClipping, KeyOf
from fedrounds.fl_components.privacy.central_audit import CHUNK, audit_central, noncentrality_interval, statistic
from fedrounds.fl_components.privacy.clipping import UNITS
from fedrounds.fl_components.privacy.events import Gaussian
from fedrounds.fl_components.training import one_thread
from fedrounds.fl_components.values import Sampling
from tests.support import parameters

NOISE = {1: 3.730632, 2: 1.993812, 4: 1.081162, 8: 0.600229}
"""By epsilon: the noise multiplier of the exact Gaussian mechanism at a delta of 1e-5."""

FIXED = FixedClipping(norm=0.3)


class Honest(CentralPrivacy):
    """Keeps what it was given to release, and what it released."""

    def release(
        self, sum_D1: Float64, clipping: Clipping, sampling: Sampling, key_of: KeyOf
    ) -> tuple[Float64, Clipping]:
        released_D, state = super().release(sum_D1, clipping, sampling, key_of)
        SEEN.append((sum_D1[:-1].copy(), released_D))
        return released_D, state


SEEN: list[tuple[Float64, Float64]] = []


class HalfNoise(CentralPrivacy):
    def sum_noise_multiplier(self, expected_cohort_size: float) -> float:
        return super().sum_noise_multiplier(expected_cohort_size) / 2


class NoNoise(CentralPrivacy):
    def sum_noise_multiplier(self, expected_cohort_size: float) -> float:
        return 0.0


class HalfCountNoise(CentralPrivacy):
    """The noise of the count alone is half of what is said."""

    def release(
        self, sum_D1: Float64, clipping: Clipping, sampling: Sampling, key_of: KeyOf
    ) -> tuple[Float64, Clipping]:
        released_D, state = super().release(sum_D1, clipping, sampling, key_of)
        true = np.array([sum_D1[-1] / sampling.cohort_size + 0.5])
        return released_D, {**state, "unclipped_fraction": (state["unclipped_fraction"] + true) / 2}


class WrongVector(CentralPrivacy):
    """Releases noise around a sum of somebody else."""

    def release(self, sum_D1: Float64, *rest: Any) -> tuple[Float64, Clipping]:
        return super().release(np.append(np.roll(sum_D1[:-1], 1), sum_D1[-1]), *rest)


@pytest.fixture(autouse=True)
def few_threads() -> Iterator[None]:
    SEEN.clear()
    with one_thread():
        yield


def key_of(seed: object, **others: object) -> KeyOf:
    """Keys of a seed; of another seed for the purposes that begin with a word in `others`."""
    return lambda purpose: hashlib.sha256(f"{others.get(purpose.split()[0], seed)} {purpose}".encode()).digest()


def audited(rule: type[CentralPrivacy], noise: float, seed: object, size: int = 5_000, **options: Any) -> AuditReport:
    return audit_central(rule(noise_multiplier=noise, clipping=FIXED), [size], key_of(seed), **options)


class TestVerdict:
    @pytest.mark.parametrize("epsilon", parameters(NOISE, quick=(2,)))
    def test_half_the_noise_is_caught_and_all_of_it_is_not(self, epsilon: int) -> None:
        honest, half = (audited(rule, NOISE[epsilon], seed=1) for rule in (CentralPrivacy, HalfNoise))
        assert not violates_claim(honest) and honest.verdict.startswith("consistent with the claim: ")
        assert violates_claim(half) and half.verdict.startswith("claim violated: ")
        for report in (honest, half):
            assert report.claimed_epsilon == pytest.approx(epsilon, rel=1e-5)
            assert "if the noise is Gaussian" in report.verdict and "99.9 %" in report.verdict
            low, high = report.epsilon_interval
            true = report.claimed_epsilon if report is honest else exact_epsilon(NOISE[epsilon] / 2)
            assert low < true < high
            assert report.epsilon_lower_bound < true

    @pytest.mark.slow
    @pytest.mark.timeout(1200)  # 120 audits: the machine may be busy
    @pytest.mark.parametrize("epsilon", NOISE)
    def test_none_of_100_honest_mechanisms_is_accused_and_19_of_20_others_are(self, epsilon: int) -> None:
        honest = [audited(CentralPrivacy, NOISE[epsilon], f"honest {seed}", 20_000) for seed in range(100)]
        half = [audited(HalfNoise, NOISE[epsilon], f"half {seed}", 20_000) for seed in range(20)]
        accused, caught = sum(map(violates_claim, honest)), sum(map(violates_claim, half))
        outside = sum(not low <= epsilon <= high for low, high in (each.epsilon_interval for each in honest))
        bounds = [max(each.epsilon_lower_bound for each in reports) for reports in (honest, half)]
        print(
            f"epsilon {epsilon}: {accused} of 100 accused, {outside} intervals miss the truth; {caught} of 20 caught;"
        )
        print(f"  the largest lower bounds are {bounds[0]:.2f} and, with half the noise, {bounds[1]:.2f}")
        assert accused == 0
        assert caught >= 19
        assert bounds[0] <= epsilon

    @pytest.mark.parametrize("seed", range(5))
    def test_without_noise_it_is_always_accused(self, seed: int) -> None:
        report = audited(NoNoise, 0.05, seed, size=1000, num_canaries=50)  # the claim itself is next to nothing
        assert report.claimed_epsilon > 250
        assert violates_claim(report) and math.isfinite(report.epsilon_interval[1])
        assert report.mean_cosine == pytest.approx(report.mean_cosine_interval[0], rel=1e-6)

    def test_a_release_of_something_else_shows_nothing(self) -> None:
        report = audited(WrongVector, NOISE[8], seed=1, num_canaries=200)
        assert report.epsilon_interval[0] == 0 and report.mean_cosine_interval[0] < 0 < report.mean_cosine_interval[1]
        assert report.epsilon_interval[1] < 1 and report.epsilon_lower_bound == 0

    @pytest.mark.parametrize("mechanism", [CentralPrivacy, HalfNoise])
    @pytest.mark.parametrize(
        "fields", [{"clipping": FIXED, "per_layer": True}, {"clipping": AdaptiveClipping()}], ids=["layers", "adaptive"]
    )
    def test_other_ways_to_clip(self, mechanism: type[CentralPrivacy], fields: dict[str, Any]) -> None:
        rule = mechanism(noise_multiplier=1.0, **fields)
        report = audit_central(rule, [3_000, 1, 499, 1_500], key_of(2), num_canaries=400)
        assert violates_claim(report) == (mechanism is HalfNoise)
        assert report.epsilon_interval[0] < exact_epsilon(0.5 if mechanism is HalfNoise else 1.0)

    @pytest.mark.parametrize("seed", range(3))
    def test_the_count_of_adaptive_clipping_is_part_of_it(self, seed: int) -> None:
        """Here it is most of what the claim pays for: a deviation of 0.6 alone costs a noise multiplier of 1.2."""
        fields = {"noise_multiplier": 1.0, "clipping": AdaptiveClipping(count_noise=0.6)}
        honest, half = (
            audit_central(rule(**fields), [2_000], key_of(seed), num_canaries=500)
            for rule in (CentralPrivacy, HalfCountNoise)
        )
        assert not violates_claim(honest) and honest.epsilon_interval[0] > honest.claimed_epsilon / 2
        assert violates_claim(half)
        true = exact_epsilon((1.0 + 3 / (2 * 0.6) ** 2) ** -0.5)
        assert half.epsilon_interval[0] < true < half.epsilon_interval[1]

    def test_the_report_is_plain_and_the_same_again(self) -> None:
        report, again = (audited(CentralPrivacy, 1.0, seed=3, size=1000, num_canaries=100) for _ in range(2))
        assert report == again
        read = json.loads(json.dumps(asdict(report), allow_nan=False))
        assert (
            AuditReport(**{name: tuple(each) if isinstance(each, list) else each for name, each in read.items()})
            == report
        )
        assert (report.delta, report.noise_multiplier, report.confidence) == (1e-5, 1.0, 0.999)
        assert (report.num_canaries, report.num_parameters) == (100, 1000) and 30 < report.num_joined < 70

    def test_what_cannot_be_audited(self) -> None:
        for size, canaries in [(1000, 49), (999, 50)]:
            with pytest.raises(ConfigError, match=f"{canaries} canaries in {size} parameters are too few"):
                audited(CentralPrivacy, 1.0, 0, size, num_canaries=canaries)
        simulated = CentralPrivacy(noise_multiplier=1.0, clipping=FIXED, simulate_noise_cohort=10_000)
        with pytest.raises(ConfigError, match=r"privacy\.simulate_noise_cohort scales the noise down"):
            audit_central(simulated, [1000], key_of(0))


class TestGaussianModel:
    def test_the_mean_cosine_is_that_of_the_canaries_that_joined_with_what_was_released(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By a dense matrix; with the noiseless sum, and with the canaries that stayed out, it is another number."""
        joined, everybody, rows = [], [], []
        add, contribute = auditing.add_contributions, auditing.contributions

        def spy_on_adding(sum_D1: Float64, parts: Sequence[torch.Tensor], *rest: Any) -> None:
            rows.append(len(parts[0]))
            joined.append(torch.cat(list(parts), 1).double().numpy())
            add(sum_D1, parts, *rest)

        def spy_on_all(parts: Sequence[torch.Tensor], *rest: Any) -> torch.Tensor:
            rows.append(len(parts[0]))
            everybody.append(torch.cat(list(parts), 1).double().numpy())
            return contribute(parts, *rest)

        monkeypatch.setattr(auditing, "add_contributions", spy_on_adding)
        monkeypatch.setattr(auditing, "contributions", spy_on_all)
        report = audited(Honest, NOISE[4], seed=4, size=3_000, num_canaries=300)
        assert max(rows) == CHUNK  # never more of them at once

        joined_KD, everybody_MD = np.concatenate(joined), np.concatenate(everybody)
        assert (len(joined_KD), len(everybody_MD)) == (report.num_joined, 300)
        np.testing.assert_allclose(np.linalg.norm(everybody_MD, axis=1), FIXED.norm, rtol=1e-6)
        ((sum_D, released_D),) = SEEN
        exact_D = joined_KD.sum(0)
        np.testing.assert_allclose(exact_D / np.linalg.norm(exact_D), sum_D / np.linalg.norm(sum_D), atol=1e-5)

        def cosines(rows_CD: Float64, vector_D: Float64) -> Float64:
            return rows_CD @ vector_D / (np.linalg.norm(rows_CD, axis=1) * np.linalg.norm(vector_D))

        assert report.mean_cosine == pytest.approx(cosines(joined_KD, released_D).mean(), rel=1e-4)
        known = set(map(bytes, joined_KD))
        held_out = np.stack([row for row in everybody_MD if bytes(row) not in known])
        assert len(held_out) == 300 - report.num_joined
        assert abs(cosines(held_out, released_D).mean()) < 4 / math.sqrt(len(held_out) * 3_000)
        assert cosines(joined_KD, sum_D).mean() > 3 * report.mean_cosine
        assert report.mean_cosine_interval[0] < report.mean_cosine < report.mean_cosine_interval[1]

    @pytest.mark.ci
    def test_it_is_a_noncentral_t_over_the_keys_of_the_noise(self) -> None:
        """The same canaries: every noise gives other numbers, of the known distribution; and so the mean cosine."""
        reports = [
            audit_central(
                Honest(noise_multiplier=2.0, clipping=FIXED), [2_000], key_of(5, noise=f"n{noise}"), num_canaries=100
            )
            for noise in range(60)
        ]
        assert len({report.mean_cosine for report in reports}) == 60
        assert len({report.num_joined for report in reports}) == 1
        assert all(np.array_equal(sum_D, SEEN[0][0]) for sum_D, _ in SEEN)
        noncentrality = float(np.linalg.norm(SEEN[0][0])) / (2.0 * UNITS)
        found = [statistic(released_D, sum_D) for sum_D, released_D in SEEN]
        assert stats.kstest(found, stats.nct(1_999, noncentrality).cdf).pvalue > 0.01
        k = reports[0].num_joined
        deviation = 1 / math.sqrt(k * 2_000)
        mean = np.mean([report.mean_cosine for report in reports])
        assert mean == pytest.approx(1 / math.sqrt(k + 2_000 * 2.0**2), abs=4 * deviation / math.sqrt(60))
        assert np.std([report.mean_cosine for report in reports]) == pytest.approx(deviation, rel=0.3)

    @pytest.mark.ci
    def test_the_known_mean_over_the_keys_of_the_canaries(self) -> None:
        """Nothing but the seed is fixed: 1 / sqrt(k + D z^2)."""
        reports = [audited(CentralPrivacy, 0.2, seed, size=2_000, num_canaries=100) for seed in range(30)]
        errors = [each.mean_cosine * math.sqrt(each.num_joined + 2_000 * 0.2**2) - 1 for each in reports]
        assert abs(np.mean(errors)) < 4 * np.std(errors) / math.sqrt(30)
        assert np.std(errors) < 0.05

    @pytest.mark.parametrize("size", [1_000, 20_000])
    @pytest.mark.parametrize("t", [-4.0, 0.0, 6.0, 40.0, 200.0])
    def test_the_interval_is_that_of_the_noncentral_t(self, size: int, t: float) -> None:
        low, high = noncentrality_interval(t, size, 0.999)
        deviations = stats.norm.ppf(0.9995)
        assert stats.norm.ppf(stats.nct.cdf(t, size - 1, low)) == pytest.approx(deviations, abs=0.04)
        assert stats.norm.ppf(stats.nct.cdf(t, size - 1, high)) == pytest.approx(-deviations, abs=0.04)

    def test_the_statistic_of_what_is_scaled_zero_or_without_noise(self) -> None:
        sum_D, noise_D = np.random.default_rng(1).normal(0, UNITS, (2, 1_000)).round()
        t = statistic(sum_D + noise_D, sum_D)
        assert statistic((sum_D + noise_D) * 1e-9, sum_D) == pytest.approx(t)
        assert statistic(-sum_D - noise_D, sum_D) == pytest.approx(-t)
        cosine = (sum_D + noise_D) @ sum_D / np.linalg.norm(sum_D + noise_D) / np.linalg.norm(sum_D)
        assert t == pytest.approx(math.sqrt(999) * cosine / math.sqrt(1 - cosine**2))
        assert statistic(np.zeros(1_000), sum_D) == 0
        most = 2 * np.linalg.norm(sum_D)  # the noise of half a unit
        assert statistic(sum_D * 1e-7, sum_D) == statistic(sum_D, sum_D) == pytest.approx(most)
        assert statistic(-sum_D, sum_D) == pytest.approx(-most)

    @pytest.mark.parametrize("epsilon", NOISE)
    def test_the_claim_is_what_the_accountant_says(self, epsilon: int) -> None:
        by_accountant = pld_epsilon({Gaussian(noise_multiplier=NOISE[epsilon]): 1}, "zero_out", 1e-5)
        assert by_accountant == pytest.approx(exact_epsilon(NOISE[epsilon]), rel=1e-3)
        assert exact_epsilon(NOISE[epsilon]) == pytest.approx(epsilon, rel=1e-5)


class TestGuesses:
    """The other reading: it rests on the coins alone (`audit`)."""

    @pytest.mark.parametrize("mechanism", [CentralPrivacy, HalfNoise])
    def test_they_bound_the_true_epsilon_from_below(self, mechanism: type[CentralPrivacy]) -> None:
        report = audited(mechanism, 1.0, seed=7, size=5_000, num_canaries=200)
        true = exact_epsilon(1.0 if mechanism is CentralPrivacy else 0.5)
        assert 0 <= report.epsilon_lower_bound <= true
        assert 0 < report.num_right <= report.num_guesses <= 200 and 0 < report.p_value <= 1

    def test_without_noise_they_are_nearly_all_right(self) -> None:
        report = audited(NoNoise, 1.0, seed=7, size=5_000, num_canaries=50)
        assert report.num_right == report.num_guesses and report.epsilon_lower_bound > 0


def exact_epsilon(noise_multiplier: float) -> float:
    """At a delta of 1e-5, by the formula of Balle and Wang written out."""
    from scipy.optimize import brentq

    def excess(epsilon: float) -> float:
        half, shift = 1 / (2 * noise_multiplier), epsilon * noise_multiplier
        return float(stats.norm.cdf(half - shift) - math.exp(epsilon + stats.norm.logcdf(-half - shift)) - 1e-5)

    return float(brentq(excess, 0, 300, xtol=1e-10))
