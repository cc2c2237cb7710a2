"""Epsilons against published values, and the traps in which each accountant gives a false one."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedrounds.fl_components.privacy.accountants import ORDERS, pld_epsilon, rdp_epsilon, renyi_divergences
from fedrounds.fl_components.privacy.events import (
    Event,
    Gaussian,
    Neighbouring,
    NoOpEvent,
    PoissonSampled,
    SampledWithoutReplacement,
    SelfComposed,
    TruncatedPoissonSampled,
    parse_event,
)
from tests.support import cases, parameters


def poisson(q: float, z: float) -> Event:
    return PoissonSampled(sampling_rate=q, event=Gaussian(noise_multiplier=z))


def fixed_size(population: int, cohort: int, z: float) -> Event:
    return SampledWithoutReplacement(population_size=population, sample_size=cohort, event=Gaussian(noise_multiplier=z))


@pytest.mark.parametrize(
    ("noise", "epochs", "rdp", "pld"),
    [
        (1.3, 15, 0.954, 0.864),
        pytest.param(1.1, 60, 2.597, 2.382, marks=pytest.mark.ci),
        pytest.param(0.7, 45, 6.319, 5.639, marks=pytest.mark.ci),
    ],
)
def test_dp_sgd_on_mnist(noise: float, epochs: int, rdp: float, pld: float) -> None:
    """The three settings of TensorFlow Privacy's MNIST tutorial (lots of 256, delta 1e-5), by today's conversion."""
    spent = {poisson(256 / 60_000, noise): epochs * 60_000 // 256}
    assert rdp_epsilon(spent, "add_or_remove", 1e-5) == pytest.approx(rdp, abs=1e-3)
    assert pld_epsilon(spent, "add_or_remove", 1e-5) == pytest.approx(pld, abs=1e-3)


@pytest.mark.parametrize(
    ("neighbouring", "rdp", "pld"),
    [("zero_out", 4.7285, 4.377), ("add_or_remove", 4.7285, 4.377), ("replace_one", None, 9.997)],
)
def test_one_gaussian(neighbouring: Neighbouring, rdp: float | None, pld: float) -> None:
    """Noise multiplier 1, delta 1e-5. The exact values are those of Balle and Wang 2018 (arXiv 1805.06530, theorem
    8)."""
    spent: Mapping[Event, int] = {Gaussian(noise_multiplier=1.0): 1}
    assert pld_epsilon(spent, neighbouring, 1e-5) == pytest.approx(pld, abs=1e-3)
    if rdp is not None:
        assert rdp_epsilon(spent, neighbouring, 1e-5) == pytest.approx(rdp, abs=1e-3)


def test_a_client_that_is_replaced_moves_the_sum_twice_as_far() -> None:
    """jax_privacy's first sharp edge: the accountant must be told half the noise."""
    replaced = rdp_epsilon({Gaussian(noise_multiplier=2.0): 1}, "replace_one", 1e-5)
    assert replaced == rdp_epsilon({Gaussian(noise_multiplier=1.0): 1}, "zero_out", 1e-5)


def test_ten_of_a_thousand_without_replacement() -> None:
    """Never 2.101 (as if a coin had been flipped for each client), never 3.576 (as if the sensitivity were C)."""
    assert rdp_epsilon({fixed_size(1000, 10, 1.0): 1000}, "replace_one", 1e-5) == pytest.approx(20.99, abs=5e-3)
    assert rdp_epsilon({poisson(0.01, 1.0): 1000}, "add_or_remove", 1e-5) == pytest.approx(2.101, abs=1e-3)
    assert pld_epsilon({fixed_size(1000, 10, 1.0): 1000}, "replace_one", 1e-5) is None


def test_a_cohort_collected_twice_is_one_draw() -> None:
    """Two Gaussians over one Poisson draw: the second cohort is no second coin."""
    once = PoissonSampled(sampling_rate=0.1, event=Gaussian(noise_multiplier=1.0))
    twice = PoissonSampled(sampling_rate=0.1, event=SelfComposed(event=Gaussian(noise_multiplier=1.0), count=2))
    as_one_draw = rdp_epsilon({once: 9, twice: 1}, "add_or_remove", 1e-5)
    assert as_one_draw > rdp_epsilon({once: 11}, "add_or_remove", 1e-5)


class TestStepsOfAClient:
    """DP-SGD: a round is so many steps, each with a batch of its own."""

    @pytest.mark.parametrize(
        ("noise", "steps", "rdp", "pld"),
        [(1.3, 3515, 0.954, 0.864), pytest.param(0.7, 10_546, 6.319, 5.639, marks=pytest.mark.ci)],
    )
    def test_as_published(self, noise: float, steps: int, rdp: float, pld: float) -> None:
        """The settings of `test_dp_sgd_on_mnist`, with one example's contribution exchanged for zero."""
        spent: Mapping[Event, int] = {SelfComposed(event=poisson(256 / 60_000, noise), count=steps): 1}
        assert rdp_epsilon(spent, "zero_out", 1e-5) == pytest.approx(rdp, abs=1e-3)
        assert pld_epsilon(spent, "zero_out", 1e-5) == pytest.approx(pld, abs=1e-3)

    @staticmethod
    def cut(size: int, noise: float = 5.9) -> TruncatedPoissonSampled:
        """100 examples, of which 10 are expected."""
        return TruncatedPoissonSampled(
            dataset_size=100, sampling_rate=0.1, truncated_batch_size=size, noise_multiplier=noise
        )

    @pytest.mark.parametrize(
        ("noise", "size"),
        [
            (5.9, 30),
            (5.9, 40),
            (5.9, 100),
            (1.0, 30),
            *(pytest.param(1.0, size, marks=pytest.mark.ci) for size in (40, 100)),
        ],
    )
    def test_cut_batches_are_never_cheaper(self, size: int, noise: float) -> None:
        spent: Mapping[Event, int] = {SelfComposed(event=self.cut(size, noise), count=10): 20}
        uncut = rdp_epsilon({poisson(0.1, noise): 200}, "zero_out", 1e-3)
        exact = pld_epsilon(spent, "zero_out", 1e-3)
        assert rdp_epsilon(spent, "zero_out", 1e-3) >= uncut * (1 - 1e-9)
        assert exact is None or rdp_epsilon(spent, "zero_out", 1e-3) >= exact

    def test_what_cutting_adds_to_delta(self) -> None:
        """All of it: (1 + e^epsilon) times the probability that any of the 200 batches is cut, by a sum of it here."""
        cut_at_all = 200 * sum(math.comb(100, k) * 0.1**k * 0.9 ** (100 - k) for k in range(31, 101))
        found = rdp_epsilon({self.cut(30): 200}, "zero_out", 1e-3)
        left = 1e-3 - (1 + math.exp(found)) * cut_at_all
        assert left < 1e-3 and found == pytest.approx(rdp_epsilon({poisson(0.1, 5.9): 200}, "zero_out", left), rel=1e-4)

    def test_often_cut_batches_promise_nothing(self) -> None:
        assert rdp_epsilon({self.cut(15): 200}, "zero_out", 1e-3) == math.inf

    def test_each_of_the_steps_may_be_cut(self) -> None:
        """The exceptions of single steps add up, in one event as in many."""
        one = self.cut(30).truncation_probability
        assert SelfComposed(event=self.cut(30), count=7).truncation_probability == pytest.approx(7 * one)
        assert one > 0

    def test_a_draw_within_a_draw_is_refused(self) -> None:
        with pytest.raises(ValueError, match="a draw within a draw"):
            PoissonSampled(sampling_rate=0.1, event=SelfComposed(event=poisson(0.1, 1.0), count=2))

    def test_they_are_json_and_back(self) -> None:
        for event in (self.cut(30), SelfComposed(event=self.cut(30), count=3)):
            assert parse_event(event.model_dump(mode="json")) == event


noises = st.floats(1e-3, 1e6)
events = st.one_of(
    st.builds(Gaussian, noise_multiplier=noises),
    st.builds(
        PoissonSampled,
        sampling_rate=st.floats(0.001, 1),
        event=st.builds(Gaussian, noise_multiplier=noises),
    ),
)


class TestProperties:
    @pytest.mark.parametrize("examples", [4, pytest.param(100, marks=pytest.mark.slow)])
    def test_rdp_is_never_below_pld(self, examples: int) -> None:
        @settings(max_examples=cases(examples), deadline=None)
        @given(event=events, count=st.integers(1, 200))
        def holds(event: Event, count: int) -> None:
            self.rdp_is_not_below_pld(event, count)

        holds()

    def rdp_is_not_below_pld(self, event: Event, count: int) -> None:
        for neighbouring in ("add_or_remove", "zero_out"):
            pld = pld_epsilon({event: count}, neighbouring, 1e-5)
            finest = 1e-4  # between losses that are told apart
            assert pld is None or rdp_epsilon({event: count}, neighbouring, 1e-5) >= pld * (1 - 1e-3) - finest

    @settings(max_examples=cases(8), deadline=None)
    @given(event=events, count=st.integers(0, 10_000), more=st.integers(1, 100))
    def test_more_releases_cost_more(self, event: Event, count: int, more: int) -> None:
        before = rdp_epsilon({event: count}, "add_or_remove", 1e-6)
        assert 0 <= before <= rdp_epsilon({event: count + more}, "add_or_remove", 1e-6)

    @given(event=events)
    def test_an_event_is_json_and_back(self, event: Event) -> None:
        assert parse_event(event.model_dump(mode="json")) == event
        assert hash(parse_event(event.model_dump())) == hash(event)


def test_where_the_arithmetic_of_privacy_losses_ends() -> None:
    """Found by the property above: dp_accounting then divides by nothing, and says so."""
    next_to_everyone = poisson(1 - 1e-16, 0.3)
    assert pld_epsilon({next_to_everyone: 1}, "add_or_remove", 1e-5) is None
    assert rdp_epsilon({next_to_everyone: 1}, "add_or_remove", 1e-5) > 10
    assert pld_epsilon({poisson(0.999, 0.3): 1}, "add_or_remove", 1e-5) is not None


def test_losses_are_told_apart_finely_enough() -> None:
    """With steps of 1e-4 it is 25.2046, which takes three times as long."""
    assert pld_epsilon({poisson(0.1, 1.0): 1000}, "add_or_remove", 1e-5) == pytest.approx(25.2046, abs=2e-3)


@pytest.mark.parametrize("noise", parameters([1e-200, 1e-160, 1e-154, 1e-100], quick=(1e-160,)))
@pytest.mark.parametrize("relation", ["add_or_remove", "replace_one", "zero_out"])
def test_next_to_no_noise_is_never_next_to_nothing(noise: float, relation: Neighbouring) -> None:
    """dp_accounting's arithmetic then ends in NaN, which its conversion takes for an epsilon of 0."""
    without_replacement = SampledWithoutReplacement(
        population_size=100, sample_size=10, event=Gaussian(noise_multiplier=noise)
    )
    for event in (Gaussian(noise_multiplier=noise), poisson(0.1, noise), without_replacement):
        if (event is without_replacement) == (relation == "replace_one"):
            assert rdp_epsilon({event: 1, Gaussian(noise_multiplier=1.5): 3}, relation, 1e-5) > 1e6
            assert pld_epsilon({event: 1}, relation, 1e-5) is None


def test_nothing_costs_nothing() -> None:
    assert rdp_epsilon({}, "add_or_remove", 1e-5) == rdp_epsilon({NoOpEvent(): 5}, "add_or_remove", 1e-5) == 0
    assert pld_epsilon({NoOpEvent(): 5}, "add_or_remove", 1e-5) == 0


def test_the_orders_are_fixed() -> None:
    divergences = renyi_divergences(poisson(0.01, 0.4), "add_or_remove")
    assert divergences.shape == (len(ORDERS),) and not np.isnan(divergences).any()
    with pytest.raises(ValueError, match="read-only"):
        divergences[0] = 0


def test_by_the_definition_of_the_gaussian() -> None:
    """alpha / (2 z^2) at every order (Mironov 2017, proposition 7)."""
    np.testing.assert_allclose(renyi_divergences(Gaussian(noise_multiplier=3.0), "zero_out"), np.array(ORDERS) / 18)
    assert math.isfinite(rdp_epsilon({Gaussian(noise_multiplier=0.05): 1}, "zero_out", 1e-5))


def test_opacus_says_the_same() -> None:
    from opacus.accountants import PRVAccountant, RDPAccountant

    for accountant, ours in ((RDPAccountant, rdp_epsilon), (PRVAccountant, pld_epsilon)):
        theirs = accountant()
        theirs.history = [(1.1, 0.01, 1000)]
        expected = theirs.get_epsilon(1e-5)
        assert ours({poisson(0.01, 1.1): 1000}, "add_or_remove", 1e-5) == pytest.approx(expected, rel=1e-2)
