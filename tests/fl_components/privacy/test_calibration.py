"""Never less private than asked, and hardly more."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedrounds.fl_components.errors import ConfigError
from fedrounds.fl_components.privacy.accountants import Spent, rdp_epsilon
from fedrounds.fl_components.privacy.calibration import largest_rate, least_noise, most_rounds
from fedrounds.fl_components.privacy.events import Gaussian, PoissonSampled
from tests.support import cases

DELTA = 1e-5


def spent(rate: float, noise: float, rounds: int) -> Spent:
    return {PoissonSampled(sampling_rate=rate, event=Gaussian(noise_multiplier=noise)): rounds}


@settings(max_examples=cases(4), deadline=None)
@given(epsilon=st.floats(0.1, 20), rate=st.floats(0.01, 1), rounds=st.integers(1, 500))
def test_noise(epsilon: float, rate: float, rounds: int) -> None:
    noise = least_noise(lambda noise: spent(rate, noise, rounds), "add_or_remove", epsilon, DELTA)
    assert rdp_epsilon(spent(rate, noise, rounds), "add_or_remove", DELTA) <= epsilon
    assert rdp_epsilon(spent(rate, noise * 0.999, rounds), "add_or_remove", DELTA) > epsilon


@settings(max_examples=cases(4), deadline=None)
@given(epsilon=st.floats(0.5, 20), noise=st.floats(0.6, 5))
def test_rounds(epsilon: float, noise: float) -> None:
    rounds = most_rounds(lambda rounds: spent(0.05, noise, rounds), "add_or_remove", epsilon, DELTA)
    assert rdp_epsilon(spent(0.05, noise, rounds), "add_or_remove", DELTA) <= epsilon
    assert rdp_epsilon(spent(0.05, noise, rounds + 1), "add_or_remove", DELTA) > epsilon


@pytest.mark.ci
@settings(max_examples=cases(4), deadline=None)
@given(epsilon=st.floats(0.5, 20), noise=st.floats(0.6, 5))
def test_rate(epsilon: float, noise: float) -> None:
    try:
        rate = largest_rate(lambda rate: spent(rate, noise, 100), "add_or_remove", epsilon, DELTA)
    except ConfigError:
        assert rdp_epsilon(spent(1e-6, noise, 100), "add_or_remove", DELTA) > epsilon
        return
    assert rdp_epsilon(spent(rate, noise, 100), "add_or_remove", DELTA) <= epsilon
    if rate < 1:
        assert rdp_epsilon(spent(min(1.0, rate * 1.001), noise, 100), "add_or_remove", DELTA) > epsilon


def test_what_cannot_be_kept() -> None:
    with pytest.raises(ConfigError, match="no noise keeps an epsilon of 1e-06 at a delta of 1e-05"):
        least_noise(lambda noise: spent(1.0, noise, 10**9), "add_or_remove", 1e-6, DELTA)
    assert most_rounds(lambda rounds: spent(1.0, 0.3, rounds), "add_or_remove", 0.1, DELTA) == 0
