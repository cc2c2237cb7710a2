"""From events to an epsilon.

Two accountants, both dp_accounting's. Renyi differential privacy decides inside a round and guards budgets: it stays
valid where later releases are chosen after earlier ones were seen (Feldman and Zrnic 2021, https://arxiv.org/abs/2008.11193).
Privacy loss distributions are tighter (Doroshenko et al. 2022, https://arxiv.org/abs/2207.04380); they are shown for a
single run whose releases were fixed in advance.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Final

import numpy as np

from fedrounds.fl_components.arrays import Float64
from fedrounds.fl_components.privacy.events import Event, Neighbouring
from fedrounds.fl_components.privacy.search import bisect

ORDERS: Final = (*(1 + step / 10 for step in range(1, 100)), *range(11, 64), 128, 256, 512, 1024)
"""The orders of Renyi divergence. Fixed: an accountant that chose its orders as it went would not be the same twice."""

NAME: Final = "RDP"

MAX_BY_LOSSES: Final = 100.0
"""An epsilon by Renyi differential privacy, which promises nothing."""

Spent = Mapping[Event, int]
"""How often each event happened."""


@cache
def renyi_divergences(event: Event, neighbouring: Neighbouring) -> Float64:
    """What one such event adds, at each of the `ORDERS` (infinity where the bound does not converge).

    The sensitivity of a sum whose terms have norms of at most C is C where one term comes, goes or becomes zero, and 2
    C where it is replaced: dp_accounting's RDP leaves that to its caller.
    """
    from dp_accounting.rdp import RdpAccountant

    scale = 0.5 if neighbouring == "replace_one" else 1.0
    accountant = RdpAccountant(ORDERS, _relation(neighbouring))
    with _quiet(), np.errstate(all="ignore"):  # it warns of each order that does not converge
        try:
            found: Float64 = accountant.compose(event.dp_event(scale)).rdp
        except ArithmeticError:
            found = np.full(len(ORDERS), np.inf)
    divergences = np.where(found >= 0, found, np.inf)  # where its arithmetic ends it says NaN, or less than nothing
    divergences.setflags(write=False)
    return divergences


def rdp_epsilon(spent: Spent, neighbouring: Neighbouring, delta: float) -> float:
    """Epsilon at `delta` of all that was spent, by Renyi differential privacy.

    The conversion is that of Canonne, Kamath and Steinke 2020 (https://arxiv.org/abs/2004.00010), proposition 12. Its
    cost follows the number of different events, not of rounds. Where an event is what its divergences are for only
    with probability 1 - p, all together are (epsilon, delta' + (1 + e^epsilon) p)-private: what holds of some
    distributions holds of others whose distances from them in total variation are at most p, up to that.

    >>> from fedrounds.fl_components.privacy.events import Gaussian
    >>> round(rdp_epsilon({Gaussian(noise_multiplier=1.0): 1}, "zero_out", 1e-5), 4)
    4.7285
    """
    from dp_accounting.rdp import compute_epsilon

    total, exceptions = np.zeros(len(ORDERS)), 0.0
    for event, count in spent.items():
        if count:
            total += count * renyi_divergences(event.untruncated, neighbouring)
            exceptions += count * event.truncation_probability
    if not np.isfinite(total).any():
        return math.inf
    if exceptions:
        return _epsilon_but_for(exceptions, total, delta)
    return float(compute_epsilon(ORDERS, total, delta)[0]) if total.any() else 0.0


def _epsilon_but_for(exceptions: float, divergences: Float64, delta: float) -> float:
    """The least epsilon, to 1e-6 of it and from above, for which delta' + (1 + e^epsilon) exceptions <= delta."""
    from dp_accounting.rdp.rdp_privacy_accountant import compute_delta

    def fits(epsilon: float) -> bool:
        beside = float(compute_delta(ORDERS, divergences, epsilon)[0])
        return beside + (1 + math.exp(min(epsilon, 700.0))) * exceptions <= delta

    low, high = 0.0, 1e-3
    while not fits(high):  # delta' falls as epsilon grows, and the other term rises: it may never fit
        low, high = high, high * 2
        if (1 + math.exp(min(low, 700.0))) * exceptions > delta:
            return math.inf
    return bisect(fits, high, low, rtol=1e-6)


def pld_epsilon(spent: Spent, neighbouring: Neighbouring, delta: float) -> float | None:
    """Epsilon at `delta` of all that was spent, by privacy loss distributions (pessimistic, so never too small).

    None where they are not known for an event (sampling without replacement, and a draw that was released twice), and
    where their arithmetic ends: for a sampling rate next to 1, and beyond `MAX_BY_LOSSES`, where it takes minutes.
    """
    from dp_accounting.pld import PLDAccountant

    known = rdp_epsilon(spent, neighbouring, delta)
    if known > MAX_BY_LOSSES:
        return None
    step = 1e-4 if known < 10 else 1e-3  # between losses that are told apart
    accountant = PLDAccountant(_relation(neighbouring), value_discretization_interval=step)
    for event, count in spent.items():
        if not accountant.supports(event.dp_event()):
            return None
        if count:
            try:
                accountant.compose(event.dp_event(), count)
            except (ValueError, ArithmeticError):
                return None
    return float(accountant.get_epsilon(delta))


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _relation(neighbouring: Neighbouring):  # type: ignore[no-untyped-def]  # dp_accounting has no types
    from dp_accounting import NeighboringRelation

    return {
        "add_or_remove": NeighboringRelation.ADD_OR_REMOVE_ONE,
        "replace_one": NeighboringRelation.REPLACE_ONE,
        "zero_out": NeighboringRelation.REPLACE_SPECIAL,
    }[neighbouring]
