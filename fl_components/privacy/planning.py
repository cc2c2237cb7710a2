"""Which noise, how many rounds or how large a cohort keep an epsilon: the same search for all claims."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from fedrounds.fl_components.privacy.accountants import rdp_epsilon
from fedrounds.fl_components.privacy.calibration import largest_rate, least_noise, most_rounds
from fedrounds.fl_components.privacy.events import Event, Neighbouring

POINTS: Final = 60  # of a curve


@dataclass(frozen=True, slots=True)
class PlannedAccount:
    """An account whose spending is planned.

    Args:
      event: what a round costs the account with a noise multiplier and a sampling rate.
      noise_multiplier, sampling_rate, rounds: as configured.
      units: among how many units (clients of a population, or examples of a client) a round draws.
      neighbouring, delta: what gives an epsilon its meaning.
      min_noise: the least noise multiplier that a configuration may have.
      rate_is_free: whether another sampling rate is a choice.
    """

    event: Callable[[float, float], Event]
    noise_multiplier: float
    sampling_rate: float
    rounds: int
    units: float
    neighbouring: Neighbouring
    delta: float
    min_noise: float = 0.0
    rate_is_free: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """A way to train, and the epsilon that an account spends with it.

    Args:
      free: what was searched for: "noise", "rounds" or "cohort"; "as configured" for nothing.
      epsilon: after all rounds.
    """

    free: str
    noise_multiplier: float
    sampling_rate: float
    rounds: int
    epsilon: float


def choices(account: PlannedAccount, epsilon: float) -> list[Choice]:
    """Return the configured way to train, and for each thing that can be chosen the value that keeps `epsilon`, with
    the others as configured. None of these is ever less private than asked.

    A choice that no configuration may make is left out: no rounds at all, or less than one unit a round. Raises
    `ConfigError` when no noise is enough.

    >>> from fedrounds.fl_components.privacy.events import Gaussian
    >>> account = PlannedAccount(lambda noise, rate: Gaussian(noise_multiplier=noise), noise_multiplier=2.0,
    ...     sampling_rate=1.0, rounds=10, units=8, neighbouring="zero_out", delta=1e-5)
    >>> [(each.free, round(each.noise_multiplier, 1), each.rounds) for each in choices(account, epsilon=6.0)]
    [('as configured', 2.0, 10), ('noise', 2.6, 10), ('rounds', 2.0, 6)]
    """
    noise, rate, rounds = account.noise_multiplier, account.sampling_rate, account.rounds
    target = (account.neighbouring, epsilon, account.delta)

    def choice(free: str, noise: float, rate: float, rounds: int) -> Choice:
        return Choice(free, noise, rate, rounds, spent(account, noise, rate, rounds))

    enough = least_noise(lambda each: {account.event(each, rate): rounds}, *target)
    found = [choice("as configured", noise, rate, rounds)]
    found.append(choice("noise", max(account.min_noise, enough), rate, rounds))
    configured = account.event(noise, rate)
    affordable = most_rounds(lambda each: {configured: each}, *target)
    if affordable:  # else not even one keeps it
        found.append(choice("rounds", noise, rate, affordable))
    if account.rate_is_free:
        largest = largest_rate(lambda each: {account.event(noise, each): rounds}, *target)
        if largest * account.units >= 1:  # a configuration refuses fewer
            found.append(choice("cohort", noise, largest, rounds))
    return found


def spent(account: PlannedAccount, noise_multiplier: float, sampling_rate: float, rounds: int) -> float:
    """Return the epsilon that an account spends in so many rounds."""
    event = account.event(noise_multiplier, sampling_rate)
    return rdp_epsilon({event: rounds}, account.neighbouring, account.delta)


def curve(account: PlannedAccount, choice: Choice) -> list[tuple[int, float]]:
    """Return the epsilon of a choice after some of its rounds, at most `POINTS`, the last one included."""
    steps = sorted({max(1, round(choice.rounds * point / POINTS)) for point in range(1, POINTS + 1)})
    return [(step, spent(account, choice.noise_multiplier, choice.sampling_rate, step)) for step in steps]
