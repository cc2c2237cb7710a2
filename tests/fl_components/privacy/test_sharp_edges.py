"""The pitfalls of private training that the authors of JAX Privacy have met in practice, one test for each, by the
names that they give them ("Common pitfalls in DP training" and the other sharp edges of its documentation, McKenna and
McMahan 2026, https://jax-privacy.readthedocs.io). What is tested here in short, other files test at length."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedrounds.fl_components.admission import Clip
from fedrounds.fl_components.config import parse_config
from fedrounds.fl_components.errors import ConfigError, ModelError
from fedrounds.fl_components.parameters import check_trainable
from fedrounds.fl_components.population import Clients, Poisson, UniformSampling
from fedrounds.fl_components.privacy import AdaptiveClipping, CentralPrivacy, FixedClipping, neighbouring_of
from fedrounds.fl_components.privacy.accountants import pld_epsilon, rdp_epsilon
from fedrounds.fl_components.privacy.calibration import least_noise
from fedrounds.fl_components.privacy.clipping import UNITS, add_contributions, clip_norm_in_units, contributions
from fedrounds.fl_components.privacy.events import Gaussian, PoissonSampled
from fedrounds.fl_components.privacy.noise import gaussian
from fedrounds.fl_components.rejections import Rejection, RejectionCode
from fedrounds.fl_components.server.results import round_result
from fedrounds.fl_components.store.secrets import RunSecret
from fedrounds.fl_components.training import Evaluation
from fedrounds.fl_components.values import CohortStatistics, Sampling, ServerState, Weighted
from tests.support import PRIVATE

NUM_PARAMETERS = 300
POISSON = Sampling("poisson", 1000, 100.0, 0.1)
RULE = CentralPrivacy(noise_multiplier=1.5, clipping=FixedClipping(norm=0.5))


def key_of(purpose: str) -> bytes:
    return purpose.encode().ljust(32)


def updates(count: int, length: float = 3.0) -> torch.Tensor:
    """Updates longer than the clipping norm, float32 [count, NUM_PARAMETERS]."""
    deltas_CD = torch.randn(count, NUM_PARAMETERS, generator=torch.Generator().manual_seed(7))
    return deltas_CD * (length / deltas_CD.norm(dim=1, keepdim=True))


def total(deltas_CD: torch.Tensor, clip: Clip = Clip(0.5), pieces: int = 1) -> np.ndarray:  # noqa: B008  # frozen
    """The exact sum of contributions, added up in so many pieces."""
    sum_D1 = np.zeros(NUM_PARAMETERS + 1)
    for piece in deltas_CD.clone().tensor_split(pieces):
        add_contributions(sum_D1, [piece], torch.ones(len(piece), dtype=torch.float64), clip)
    return sum_D1


class TestDivisionByBatchSize:
    @pytest.mark.parametrize("received", [0, 1, 99, 250])
    def test_the_denominator_is_the_expected_cohort_whoever_came(self, received: int) -> None:
        """One client more moves the mean by the same, however many came."""
        deltas_CD = updates(received + 1)
        with_it, without = (
            RULE.release(total(deltas_CD[:count]), RULE.init(), POISSON, key_of)[0]
            for count in (received + 1, received)
        )
        moved = np.linalg.norm(with_it - without)
        assert moved == pytest.approx(0.5 / POISSON.cohort_size, rel=1e-3)


class TestSensitivityAlignment:
    @pytest.mark.parametrize("per_layer", [False, True])
    @pytest.mark.parametrize("share", [1.0, 0.25])
    def test_the_noise_is_for_the_longest_contribution_however_it_is_clipped(
        self, per_layer: bool, share: float
    ) -> None:
        parts = list(updates(4, length=1e6).split_with_sizes([100, 200], dim=1))
        contributions(parts, torch.full((4,), share, dtype=torch.float64), Clip(0.5, per_layer))
        longest = max(float(each.norm()) for each in torch.cat(parts, dim=1).double())
        assert longest <= UNITS * share
        rule = RULE.model_copy(update={"per_layer": per_layer})
        mean_D, state = rule.release(np.zeros(NUM_PARAMETERS + 1), rule.init(), POISSON, key_of)
        unit = 0.5 / clip_norm_in_units(NUM_PARAMETERS) / POISSON.cohort_size
        assert state["noise"][0] >= 1.5 * unit * longest
        assert mean_D.std() == pytest.approx(state["noise"][0], rel=0.15)


class TestAccountingAndBatchSelectionMismatch:
    def test_poisson_selection_takes_each_client_as_often_as_its_event_says(self) -> None:
        selection = Poisson(sampling_rate=0.1)
        sampling = selection.sampling(1000)
        event = RULE.event(sampling)
        assert isinstance(event, PoissonSampled)
        draws = [selection.select(clients(1000), np.random.default_rng(seed)) for seed in range(300)]
        counts_n = np.bincount(np.concatenate(draws), minlength=1000)
        assert counts_n.mean() / 300 == pytest.approx(event.sampling_rate, rel=0.02)
        assert counts_n.var() == pytest.approx(300 * 0.1 * 0.9, rel=0.2)  # coins: a fixed size would give less by pairs
        assert np.std([len(each) for each in draws]) == pytest.approx((1000 * 0.1 * 0.9) ** 0.5, rel=0.2)

    def test_a_cohort_of_a_fixed_size_is_never_accounted_for_as_poisson(self) -> None:
        selection = UniformSampling(cohort_size=100)
        event = RULE.event(selection.sampling(1000))
        assert event.kind == "sampled_without_replacement"
        assert {len(selection.select(clients(1000), np.random.default_rng(seed))) for seed in range(20)} == {100}

    def test_what_no_accounting_is_known_for_is_refused(self) -> None:
        away = {"availability": {"kind": "bernoulli", "probability": 0.5}}
        with pytest.raises(ConfigError, match="no privacy accounting is known"):
            parse_config(PRIVATE | {"selection": {"cohort_size": 2}, "simulation": away})


class TestPublicAndPrivateMetadata:
    def test_who_came_and_how_many_is_withheld(self) -> None:
        result = shown_of_a_round()
        assert not result.metrics.keys() & {"clients/selected", "clients/received", "clients/rejected"}
        assert not result.rejected and not result.seconds
        assert result.withheld["metrics"]["clients/received"] == 3


class TestNeighbouringRelationClarity:
    def test_a_replaced_client_moves_a_sum_by_twice_the_norm(self) -> None:
        for noise in (0.8, 2.0):
            full, half = Gaussian(noise_multiplier=noise), Gaussian(noise_multiplier=noise / 2)
            replaced = rdp_epsilon({full: 3}, "replace_one", 1e-5)
            assert replaced == rdp_epsilon({half: 3}, "add_or_remove", 1e-5) > rdp_epsilon({full: 3}, "zero_out", 1e-5)

    def test_no_epsilon_is_told_without_its_relation(self) -> None:
        from fedrounds.fl_components.store import BudgetTerms

        assert {"unit", "neighbouring", "delta", "accountant"} < {each.name for each in fields(BudgetTerms)}
        assert {neighbouring_of(Sampling(kind, 10, 5, 0.5)) for kind in ("poisson", "fixed_size", "everyone")} == {
            "add_or_remove",
            "replace_one",
            "zero_out",
        }


class TestZeroSizedBatchesAndNonFiniteGradients:
    def test_nobody_is_noise_as_somebody_is(self) -> None:
        mean_D, _ = RULE.release(total(updates(0)), RULE.init(), POISSON, key_of)
        assert np.isfinite(mean_D).all() and np.abs(mean_D).max() > 0

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_what_is_not_finite_adds_zeros_and_spoils_nothing(self, value: float) -> None:
        deltas_CD = updates(3)
        deltas_CD[1, 5] = value
        others = total(deltas_CD[[0, 2]])
        assert np.array_equal(total(deltas_CD)[:-1], others[:-1])


class TestGradientAccumulation:
    @pytest.mark.parametrize("pieces", [2, 3, 40])
    def test_however_a_cohort_is_cut_the_sum_is_the_same(self, pieces: int) -> None:
        """And noise is added once, to the whole: `release` is the only caller of the noise."""
        assert total(updates(40), pieces=pieces).tobytes() == total(updates(40)).tobytes()
        assert total(updates(40).flip(0), pieces=pieces).tobytes() == total(updates(40)).tobytes()


class TestCrossExampleOperations:
    def test_batch_normalisation_is_refused(self) -> None:
        """Its running statistics would be a release of their own."""
        with pytest.raises(ModelError, match="BatchNorm") as caught:
            check_trainable(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
        assert "GroupNorm" in str(caught.value.hint)


class TestAuxiliaryInformation:
    def test_losses_and_test_metrics_are_withheld(self) -> None:
        result = shown_of_a_round()
        assert not result.metrics.keys() & {"train/loss", "eval/accuracy"}
        assert result.withheld["metrics"]["train/loss"] == pytest.approx(0.7)


class TestRandomness:
    def test_no_seed_is_taken(self) -> None:
        with pytest.raises(ConfigError, match="privacy has no seed for its noise"):
            parse_config(PRIVATE | {"privacy": PRIVATE["privacy"] | {"seed": 1}})

    def test_each_run_and_round_and_purpose_has_a_key_of_its_own(self, tmp_path: Any) -> None:
        runs = [RunSecret.create(tmp_path, name) for name in ("a", "b")]
        keys = {run.key(1, purpose) for run in runs for purpose in ("noise of the sum", "noise of the count")}
        for run in runs:
            run.advance(2)
        keys |= {run.key(2, "noise of the sum") for run in runs}
        assert len(keys) == 6

    def test_one_key_twice_is_one_noise(self) -> None:
        """Which is why a key never serves two sums."""
        assert np.array_equal(gaussian(b"k" * 32, 1e6, 1000), gaussian(b"k" * 32, 1e6, 1000))
        assert not np.array_equal(gaussian(b"k" * 32, 1e6, 1000), gaussian(b"l" * 32, 1e6, 1000))


class TestFloatingPointRobustness:
    def test_what_is_released_are_whole_units(self) -> None:
        mean_D, _ = RULE.release(total(updates(9)), RULE.init(), POISSON, key_of)
        units_D = mean_D * POISSON.cohort_size / 0.5 * clip_norm_in_units(NUM_PARAMETERS)
        np.testing.assert_allclose(units_D, np.rint(units_D), rtol=0, atol=1e-4)


class TestFinitePrecisionNumericalError:
    def test_a_contribution_is_never_a_hair_too_long(self) -> None:
        deltas_CD = updates(200, length=0.5 * (1 + 1e-7))
        contributions([deltas_CD], torch.ones(200, dtype=torch.float64), Clip(0.5))
        assert all(sum(int(each) ** 2 for each in row) <= UNITS**2 for row in deltas_CD.tolist())

    @pytest.mark.ci
    def test_calibration_errs_towards_more_noise(self) -> None:
        for epsilon in (0.3, 1.0, 7.7):
            noise = least_noise(
                lambda noise: {PoissonSampled(sampling_rate=0.01, event=Gaussian(noise_multiplier=noise)): 500},
                "add_or_remove",
                epsilon,
                1e-6,
            )
            event = PoissonSampled(sampling_rate=0.01, event=Gaussian(noise_multiplier=noise))
            assert rdp_epsilon({event: 500}, "add_or_remove", 1e-6) <= epsilon

    def test_the_accountant_that_decides_errs_towards_a_larger_epsilon(self) -> None:
        event = PoissonSampled(sampling_rate=0.05, event=Gaussian(noise_multiplier=1.0))
        tightest = pld_epsilon({event: 200}, "add_or_remove", 1e-5)
        assert tightest is not None and rdp_epsilon({event: 200}, "add_or_remove", 1e-5) >= tightest


class TestVariableBatchSizes:
    def test_no_cohort_is_cut_to_a_size(self) -> None:
        """A Poisson draw that is larger than expected is taken whole: a truncated one is another mechanism."""
        selection = Poisson(sampling_rate=0.5)
        sizes = [len(selection.select(clients(100), np.random.default_rng(seed))) for seed in range(100)]
        assert max(sizes) > 60 and min(sizes) < 40
        assert selection.max_cohort_size_of(100) == 100


class TestMixedPrecision:
    def test_sums_and_noise_are_wider_than_a_float32(self) -> None:
        assert total(updates(1)).dtype == np.float64 and gaussian(bytes(32), 1.0, 2).dtype == np.int64
        many = total(updates(33, length=1e9).abs())  # a float32 would have had to round the last of them
        assert np.array_equal(many[:-1], np.rint(many[:-1]))


class TestAdaptiveClippingIsPaidFor:
    """Not on their list, but of its kind: a second release in the shadow of the first."""

    def test_the_sum_gets_more_noise_where_a_count_is_released_beside_it(self) -> None:
        adaptive = CentralPrivacy(noise_multiplier=1.5, clipping=AdaptiveClipping())
        assert adaptive.sum_noise_multiplier(100) > RULE.sum_noise_multiplier(100) == 1.5


def clients(number: int) -> Clients:
    def nothing(*_: object) -> Any:
        raise AssertionError("selection under a claim looks at nothing but who is there")

    return Clients(number, 1, 0, nothing, nothing)


def shown_of_a_round() -> Any:
    """What is told of a round on private data."""
    collected = CohortStatistics(
        received=3,
        train_loss=Weighted(2.1, 3.0),
        selected=4,
        rejected={"ward-1": Rejection(RejectionCode.NOT_FINITE, "NaN")},
        upload_bytes=12,
        download_bytes=12,
    )
    state = ServerState(1, np.zeros(2, np.float32), {}, "digest")
    found = Evaluation().releases({"eval/accuracy": 0.5})
    return round_result(state, collected, found, {"train": 1.0}, 1.0, 10, withholds=True, hides_participation=True)
