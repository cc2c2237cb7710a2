"""The other way round: from an epsilon to the noise, the rounds or the sampling rate that keep it.

Never less private than asked: each search returns the end of its interval that keeps the epsilon.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Final

from fedrounds.fl_components.errors import ConfigError
from fedrounds.fl_components.privacy.accountants import Spent, rdp_epsilon
from fedrounds.fl_components.privacy.events import Neighbouring
from fedrounds.fl_components.privacy.search import bisect

PRECISION: Final = 1e-4  # relative
MAX_NOISE: Final = 1e6
MAX_ROUNDS: Final = 10**9


def least_noise(
    spent_with: Callable[[float], Spent], neighbouring: Neighbouring, epsilon: float, delta: float
) -> float:
    """The smallest noise multiplier with which what is spent stays within `epsilon`.

    Raises `ConfigError` when no noise is enough (delta is too small for the orders of the accountant).

    >>> from fedrounds.fl_components.privacy.events import Gaussian
    >>> round(least_noise(lambda noise: {Gaussian(noise_multiplier=noise): 1}, "zero_out", 4.7285, 1e-5), 3)
    1.0
    """
    high = 1.0
    while rdp_epsilon(spent_with(high), neighbouring, delta) > epsilon:
        high *= 2
        if high > MAX_NOISE:
            raise ConfigError(
                f"no noise keeps an epsilon of {epsilon:g} at a delta of {delta:g}",
                hint="ask for a larger epsilon or delta, for fewer rounds, or for a smaller cohort or batch",
            )
    low = high / 2
    while low > 1e-3 and rdp_epsilon(spent_with(low), neighbouring, delta) <= epsilon:
        low, high = low / 2, low
    return bisect(
        lambda noise: rdp_epsilon(spent_with(noise), neighbouring, delta) <= epsilon, high, low, rtol=PRECISION
    )


def most_rounds(spent_after: Callable[[int], Spent], neighbouring: Neighbouring, epsilon: float, delta: float) -> int:
    """The most rounds after which what is spent stays within `epsilon`; 0 where the first one would pass it.

    >>> from fedrounds.fl_components.privacy.events import Gaussian
    >>> most_rounds(lambda rounds: {Gaussian(noise_multiplier=1.0): rounds}, "zero_out", 4.8, 1e-5)
    1
    """
    low, high = 0, 1
    while high < MAX_ROUNDS and rdp_epsilon(spent_after(high), neighbouring, delta) <= epsilon:
        low, high = high, high * 2
    exceeding = range(low + 1, high)
    first = bisect_left(exceeding, True, key=lambda n: rdp_epsilon(spent_after(n), neighbouring, delta) > epsilon)
    return low + first


def largest_rate(
    spent_with: Callable[[float], Spent], neighbouring: Neighbouring, epsilon: float, delta: float
) -> float:
    """The largest sampling rate with which what is spent stays within `epsilon`.

    Raises `ConfigError` when none does.
    """
    if rdp_epsilon(spent_with(1.0), neighbouring, delta) <= epsilon:
        return 1.0
    low, high = 0.5, 1.0
    while rdp_epsilon(spent_with(low), neighbouring, delta) > epsilon:
        low, high = low / 2, low
        if low < 1e-9:
            raise ConfigError(
                f"no sampling rate keeps an epsilon of {epsilon:g} at a delta of {delta:g}",
                hint="ask for a larger epsilon or delta, for fewer rounds or more noise",
            )

    def keeps(rate: float) -> bool:
        return rdp_epsilon(spent_with(rate), neighbouring, delta) <= epsilon

    return bisect(keeps, low, high, rtol=PRECISION)
