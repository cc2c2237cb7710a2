"""Plans keep the epsilon that is asked for; searches find where an answer changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedrounds.fl_components.privacy.events import Event, Gaussian, PoissonSampled, SelfComposed
from fedrounds.fl_components.privacy.planning import PlannedAccount, choices, curve, spent
from fedrounds.fl_components.privacy.search import bisect


def of_population(noise: float, rate: float) -> Event:
    """With all clients in each round, since sampled events take long to account for."""
    return Gaussian(noise_multiplier=noise)


def of_client(noise: float, rate: float) -> Event:
    return SelfComposed(event=Gaussian(noise_multiplier=noise), count=3)


@pytest.mark.parametrize("event", [of_population, of_client])
@pytest.mark.parametrize("epsilon", [0.5, 3.0, 8.0])
def test_what_is_chosen_keeps_the_epsilon_and_hardly_more(event: Callable[..., Event], epsilon: float) -> None:
    account = PlannedAccount(
        event,
        noise_multiplier=1.0,
        sampling_rate=1.0,
        rounds=20,
        units=1000,
        neighbouring="zero_out",
        delta=1e-5,
    )
    configured, *searched = choices(account, epsilon)
    assert configured.free == "as configured" and configured.epsilon == spent(account, 1.0, 1.0, 20)
    for choice in searched:
        assert choice.epsilon <= epsilon
        if choice.free == "noise":
            assert spent(account, choice.noise_multiplier * 0.999, 1.0, 20) > epsilon
        if choice.free == "rounds":
            assert spent(account, 1.0, 1.0, choice.rounds + 1) > epsilon
        assert curve(account, choice)[-1] == (choice.rounds, choice.epsilon)


@given(st.floats(-1e6, 1e6), st.booleans())
def test_a_bisection_ends_on_the_side_where_it_holds(place: float, upward: bool) -> None:
    def holds(x: float) -> bool:
        return x <= place if upward else x >= place

    true, false = (place - 10, place + 7) if upward else (place + 10, place - 7)
    found = bisect(holds, true, false, atol=1e-3)
    assert holds(found) and abs(found - place) <= 1e-3


@pytest.mark.ci
def test_the_cohort_is_a_choice_where_each_client_is_drawn_by_a_coin() -> None:
    def event(noise: float, rate: float) -> Event:
        return PoissonSampled(sampling_rate=rate, event=Gaussian(noise_multiplier=noise))

    account = PlannedAccount(event, 1.0, 0.1, 20, 1000, "add_or_remove", 1e-5, rate_is_free=True)
    *_, cohort = choices(account, 2.0)
    assert cohort.free == "cohort" and cohort.epsilon <= 2.0
    assert spent(account, 1.0, cohort.sampling_rate * 1.001, 20) > 2.0
