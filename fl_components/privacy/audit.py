"""An audit of differential privacy that rests on nothing but coins (Mahloujifar, Melis and Chaudhuri
2024, "Auditing f-Differential Privacy in One Run", https://arxiv.org/abs/2410.22235).

Of m canaries (examples in a step of DP-SGD, or clients in a round) each joins a release by a fair coin. Whoever sees
what comes out guesses n of the coins, those it is surest of, and is right about N of them. What is claimed is a release
without sampling: normal noise of z times the most that a canary moves, which is mu-GDP with mu = 1 / z: what happens
with probability x without a canary happens with at most g(x) = Phi(Phi^-1(x) + mu) with it, and the other way round.

**What the claim allows.** Let canary i be guessed right and N be in a set T. Had its coin fallen otherwise, the same
guesses would have i wrong and one fewer right, so by the claim, for any coins of the others,

    Pr[i right, N in T] <= g(Pr[i wrong, N + 1 in T | its coin turned]).

The turned coins are fair as well, and g is concave, so this holds for the mean over the coins and over the m canaries.
With p_t = Pr[N = t], of which a canary is guessed right in t of m and wrong in n - t of m, it is the paper's theorem:

    sum over t in T of (t / m) p_t  <=  g(sum over t in T of ((n - t + 1) / m) p_{t-1}).

**The recursion.** Let T be all counts from t on, a_t = sum over s >= t of (s / m) p_s, and b_t the same sum of
((n - s) / m) p_s: then b_{t-1} >= g^-1(a_t). Let Pr[N >= c] be tau. All of it at exactly c makes a_c least and b_c
largest. Below c, let each p_t be the least that is allowed. With k = t / (n - t), a_t is then the larger of a_{t+1} and
a_{t+1} - k b_{t+1} + k g^-1(a_{t+1}): it grows with a_{t+1} and with a_{t+1} - k b_{t+1}. Any other choice has more of
both, at this t and so at all below it, and so more in total. So tau is possible only if this least total is at most 1,
and the largest such tau is the p-value of c right guesses. So the paper computes it too. That uses a part of the
theorem: all sets T together allow up to a fifth less in what was tried (at mu = 0, exactly the binomial tail).

**Several releases.** One release may give everything away once in 1,000 times and yet keep its claim, and no number of
canaries tells that from a lie. Such luck does not repeat. Each release has coins of its own, so whatever the ones
before it showed, the claim bounds Pr[N >= c] by the p-value of c. So the sum over R releases is at most as large as
that of R independent variables with these tails: a convolution. A few releases say far more than one of many canaries.

**Canaries.** Each is as long as clipping allows, in a coordinate of its own ("Dirac canaries"): none is in another's
way, and each is one normal variable, N(0 or C, (z C)^2). Random directions, which are in each other's way, were never
better, and much worse with few parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedrounds.fl_components.arrays import Float64, Int64
from fedrounds.fl_components.errors import ConfigError
from fedrounds.fl_components.privacy.central import KeyOf
from fedrounds.fl_components.privacy.events import Gaussian, SelfComposed
from fedrounds.fl_components.privacy.search import bisect
from fedrounds.fl_components.randomness import generator

Release = Callable[[NDArray[np.bool_], int], NDArray[np.floating]]
"""A release: from who of the canaries joined [M], and the number of the release (0, 1, ...; noise is drawn anew
for each), to a score of each [M]: the larger, the likelier it joined."""

MIN_CANARIES: Final = 50

GUESSED: Final = (0.02, 0.05, 0.1, 0.25, 0.5)
"""Of the canaries, how many are guessed: each share is a test of its own. Few where little is told of each."""

GRID: Final = 256
"""So many counts of a release have a p-value of their own when releases are added up."""

MIN_LOG_P: Final = -40.0
"""What is less likely than e to this is called as likely."""


@dataclass(frozen=True, slots=True)
class AuditReport:
    """The result of an audit: plain values, all finite.

    Args:
      claimed_epsilon, delta, noise_multiplier: of one release without sampling; a canary contributes something or zero.
      num_canaries, num_releases: canaries in each release.
      num_joined: over all releases; about half of them.
      num_guesses, num_right: over all releases, for that share of `GUESSED` which says most.
      p_value: the most likely that so many are right, or as surprisingly many for another share, if the claim is true.
      epsilon_lower_bound: at `confidence`: the largest epsilon of a Gaussian mechanism that the guesses refute; 0 if
        none.
      verdict: in words.
      epsilon_interval, mean_cosine, mean_cosine_interval: a second reading, if the noise is Gaussian, both ends at once
        at `confidence`; None where it has no power (`central_audit`).
    """

    claimed_epsilon: float
    delta: float
    noise_multiplier: float
    num_canaries: int
    num_releases: int
    num_joined: int
    num_parameters: int
    num_guesses: int
    num_right: int
    p_value: float
    epsilon_lower_bound: float
    confidence: float
    verdict: str = ""
    epsilon_interval: tuple[float, float] | None = None
    mean_cosine: float | None = None
    mean_cosine_interval: tuple[float, float] | None = None


def violates_claim(report: AuditReport) -> bool:
    """Return whether a reading is next to impossible under the claim: the right guesses, or an interval above it."""
    above = report.epsilon_interval is not None and report.claimed_epsilon < report.epsilon_interval[0]
    return above or report.p_value <= 1 - report.confidence


def audit_releases(
    release: Release,
    key_of: KeyOf,
    *,
    noise_multiplier: float,
    delta: float,
    num_parameters: int,
    num_canaries: int = 1000,
    num_releases: int = 10,
    confidence: float = 0.999,
) -> AuditReport:
    """Return the audit of a mechanism by some of its releases.

    Args:
      release: as it is made in training, without sampling.
      key_of: the key of a purpose, 32 bytes: the canaries' coins.
      noise_multiplier: z, that is claimed: `ExampleLevel.noise` in the run.
      num_parameters: of what is trained, for the report.

    Raises `ConfigError` when there are too few canaries to refute any claim, and when what is released is not a score
    of each.

    >>> def release(joined_M, number):
    ...     return 0.5 * joined_M + np.random.default_rng(number).normal(0, 1.0 * 0.5, len(joined_M))
    >>> report = audit_releases(
    ...     release, lambda purpose: purpose.encode().ljust(32), noise_multiplier=1.0, delta=1e-5, num_parameters=2000)
    >>> print(report.verdict)
    consistent with the claim: an epsilon of 4.38 is claimed for one release, and 96 % of 200 guesses were right; ...
    """
    if num_canaries < MIN_CANARIES or num_releases < 1:
        raise ConfigError(
            f"{num_canaries} canaries in {num_releases} releases are too few for an audit",
            hint=f"draw at least {MIN_CANARIES} canaries",
        )
    guesses_G, mu = numbers_of_guesses(num_canaries), claimed_mu(noise_multiplier)
    all_right = min(p_value(num_canaries, int(guesses), int(guesses), mu) ** num_releases for guesses in guesses_G)
    if len(guesses_G) * all_right > 1 - confidence:
        raise ConfigError(
            f"even if all guesses about {num_canaries} canaries in {num_releases} releases were right, "
            f"a noise multiplier of {noise_multiplier:g} could be true",
            hint="audit more releases, of at least 1,000 canaries",
        )
    right_G, num_joined = np.zeros(len(guesses_G), np.int64), 0
    for number in range(num_releases):
        joined_M = generator(key_of("coins of the canaries"), number, "coins").random(num_canaries) < 0.5
        scores_M = release(joined_M, number)
        if scores_M.shape != (num_canaries,) or not np.isfinite(scores_M).all():
            raise ConfigError(f"a step over {num_canaries} canaries did not release a finite score of each")
        right_G += count_right(scores_M, joined_M, guesses_G)
        num_joined += int(joined_M.sum())

    report = AuditReport(
        claimed_epsilon=gaussian_epsilon(mu, delta),
        delta=delta,
        noise_multiplier=noise_multiplier,
        num_canaries=num_canaries,
        num_releases=num_releases,
        num_joined=num_joined,
        num_parameters=num_parameters,
        confidence=confidence,
        **read_guesses(num_canaries, guesses_G, right_G, mu, delta, confidence, num_releases),
    )
    return replace(report, verdict=in_words(report))


def read_guesses(
    num_canaries: int,
    guesses_G: Int64,
    right_G: Int64,
    mu: float,
    delta: float,
    confidence: float,
    num_releases: int = 1,
) -> dict[str, Any]:
    """Return what the right guesses say of a claim of mu.

    `num_guesses`, `num_right`, `p_value` and `epsilon_lower_bound` of an `AuditReport`.
    """
    found = [(int(guesses), int(right)) for guesses, right in zip(guesses_G, right_G, strict=True)]
    p_values = [p_value(num_canaries, guesses, right, mu, num_releases) for guesses, right in found]
    most = int(np.argmin(p_values))
    refuted = largest_refuted_mu(num_canaries, found, confidence, num_releases)
    return {
        "num_guesses": found[most][0] * num_releases,
        "num_right": found[most][1],
        "p_value": min(1.0, len(found) * p_values[most]),
        "epsilon_lower_bound": gaussian_epsilon(refuted, delta),
    }


def gaussian_epsilon(sensitivity: float, delta: float) -> float:
    """Return the exact epsilon of normal noise whose deviation is 1 (Balle and Wang 2018,
    https://arxiv.org/abs/1805.06530)."""
    from dp_accounting import get_epsilon_gaussian

    return float(get_epsilon_gaussian(1 / sensitivity, delta)) if sensitivity > 0 else 0.0


def claimed_event(noise_multiplier: float, steps: int = 1) -> Gaussian | SelfComposed:
    """What a shadow of a run costs: so many steps without sampling, over the same examples."""
    step = Gaussian(noise_multiplier=noise_multiplier)
    return step if steps == 1 else SelfComposed(event=step, count=steps)


def claimed_mu(noise_multiplier: float, steps: int = 1) -> float:
    """The mu of `claimed_event`.

    T Gaussian mechanisms are one with noise that is sqrt(T) times smaller (Dong, Roth and Su 2022, "Gaussian
    differential privacy", corollary 3.3).

    >>> claimed_mu(2.0), claimed_mu(2.0, steps=16)
    (0.5, 2.0)
    """
    return math.sqrt(steps) / noise_multiplier


def numbers_of_guesses(num_canaries: int) -> Int64:
    """Of a release, one for each of `GUESSED`: even numbers, half of them to have joined.

    >>> numbers_of_guesses(150)
    array([ 2,  6, 14, 36, 74])
    """
    halves_G = np.array([int(share * num_canaries / 2) for share in GUESSED])
    return np.unique(2 * halves_G[halves_G > 0])


def count_right(scores_M: NDArray[np.floating], joined_M: NDArray[np.bool_], guesses_G: Int64) -> Int64:
    """How many are right if the canaries with the largest scores are guessed to have joined, and as many with the
    smallest not to have.

    >>> count_right(np.array([0.9, 0.1, 0.5, 0.4]), np.array([True, False, False, True]), np.array([2, 4]))
    array([2, 2])
    """
    joined_M = joined_M[np.argsort(-scores_M, kind="stable")]
    found_M1 = np.concatenate([[0], joined_M.cumsum()])
    left_out_M1 = np.concatenate([[0], (~joined_M[::-1]).cumsum()])
    right_G: Int64 = found_M1[guesses_G // 2] + left_out_M1[guesses_G // 2]
    return right_G


def p_value(num_canaries: int, num_guesses: int, num_right: int, mu: float, num_releases: int = 1) -> float:
    """The most likely that any mu-GDP mechanism lets so many guesses or more be right, rounded upward.

    Args:
      num_canaries, num_guesses: of each release. How many are guessed is fixed beforehand.
      num_right: in all releases together.

    Raises ValueError for counts that cannot be.

    One canary is guessed as well as a mechanism's mu lets anybody tell two cases apart, Phi(mu / 2):

    >>> round(p_value(1, 1, 1, mu=1.0), 4), round(NormalDist().cdf(0.5), 4)
    (0.6915, 0.6915)

    One release may be unlucky. Ten are not:

    >>> round(p_value(100, 50, 48, mu=1.0), 3), p_value(100, 50, 480, mu=1.0, num_releases=10) < 1e-6
    (0.073, True)
    """
    if num_canaries < 1 or num_releases < 1 or not 0 <= num_guesses <= num_canaries:
        raise ValueError(f"{num_guesses} guesses about {num_canaries} canaries in {num_releases} releases cannot be")
    if not 0 <= num_right <= num_guesses * num_releases:
        raise ValueError(f"of {num_guesses} guesses in each of {num_releases} releases {num_right} cannot be right")
    if not 0 <= mu < math.inf:
        raise ValueError(f"mu is a finite number from 0 on, not {mu}")
    if num_releases == 1:
        return _most_likely(num_canaries, num_guesses, num_right, mu)
    sum_masses = _sum_masses(num_canaries, num_guesses, mu, num_releases)
    return min(1.0, float(sum_masses[num_right:].sum()) + 1e-12)  # more than the convolution's rounding


def largest_refuted_mu(
    num_canaries: int, found: Sequence[tuple[int, int]], confidence: float, num_releases: int = 1
) -> float:
    """The largest mu (to 1 in 1,000, downward) that is refuted; 0 if none is.

    Args:
      found: of a fixed few numbers of guesses in each release, how many were right in all releases: Bonferroni's
        correction is for having tried them all.

    >>> round(largest_refuted_mu(1000, [(100, 600), (500, 2600)], 0.999, num_releases=10), 2)
    0.06
    """
    level, best = (1 - confidence) / len(found), 0.0
    for num_guesses, num_right in found:

        def refuted(mu: float, guesses: int = num_guesses, right: int = num_right) -> bool:
            if num_releases == 1:
                return right > 0 and _least_total(num_canaries, guesses, right, mu, level) > 1
            return p_value(num_canaries, guesses, right, mu, num_releases) <= level

        if not refuted(best):
            continue
        # What is mu-GDP is so for any larger mu: what is refuted refutes all below it.
        low, high = best, max(2 * best, 0.125)
        while refuted(high):
            low, high = high, 2 * high
        best = bisect(refuted, low, high, rtol=1e-3)
    return best


def _least_total(num_canaries: int, num_guesses: int, num_right: int, mu: float, tail: float) -> float:
    """Return the least total of all p_t, by the recursion.

    It holds if `num_right` or more are right with the probability `tail`. It is not followed further once it exceeds 1.
    """
    right, wrong = tail * num_right / num_canaries, tail * (num_guesses - num_right) / num_canaries  # a and b
    total, quantile = tail, NormalDist().inv_cdf
    for t in range(num_right - 1, -1, -1):
        if right >= 1:
            return math.inf
        needed = 0.5 * math.erfc((mu - quantile(right)) / math.sqrt(2))  # g^-1(a), and exact in the tails
        if needed <= wrong:  # and so at all smaller counts
            return total
        mass = (needed - wrong) * num_canaries / (num_guesses - t)
        right, wrong, total = right + t * mass / num_canaries, needed, total + mass
        if total > 1:
            return total
    return total


def _most_likely(num_canaries: int, num_guesses: int, num_right: int, mu: float) -> float:
    """By bisection, to 1 in 10,000 upward: the least total grows with the tail."""
    if num_right == 0 or _least_total(num_canaries, num_guesses, num_right, mu, 1.0) <= 1:
        return 1.0

    def impossible(log_p: float) -> bool:
        return _least_total(num_canaries, num_guesses, num_right, mu, math.exp(log_p)) > 1

    if impossible(MIN_LOG_P):
        return math.exp(MIN_LOG_P)
    return math.exp(bisect(impossible, 0.0, MIN_LOG_P, atol=1e-4))


@lru_cache(maxsize=len(GUESSED))
def _sum_masses(num_canaries: int, num_guesses: int, mu: float, num_releases: int) -> Float64:
    """The distribution, float64 [R n + 1], of the sum of R independent variables whose tails are the p-values of a
    release. Between the counts of the grid a tail is that of the count below: it is not smaller than its own."""
    from scipy.signal import fftconvolve

    counts_K = np.unique(np.linspace(0, num_guesses, GRID + 1).astype(np.int64))
    tails_K = np.array([_most_likely(num_canaries, num_guesses, int(count), mu) for count in counts_K])
    tails_K = np.maximum.accumulate(tails_K[::-1])[::-1]  # what rounding left out of order
    tails = tails_K[np.searchsorted(counts_K, np.arange(num_guesses + 1), side="right") - 1]
    masses, total, left = -np.diff(tails, append=0.0), np.ones(1), num_releases
    while left:  # as powers are computed, by squaring
        if left % 2:
            total = np.maximum(fftconvolve(total, masses), 0.0)
        left //= 2
        masses = np.maximum(fftconvolve(masses, masses), 0.0) if left else masses
    return total


def in_words(report: AuditReport) -> str:
    """Return the verdict of an audit, and what it rests on."""
    right = 100 * report.num_right / report.num_guesses
    verdict = "claim violated" if violates_claim(report) else "consistent with the claim"
    words = (
        f"{verdict}: an epsilon of {report.claimed_epsilon:.3g} is claimed for "
        f"one release, and {right:.3g} % of {report.num_guesses} guesses were right; so it is at least "
        f"{report.epsilon_lower_bound:.3g} at a confidence of {100 * report.confidence:g} %"
    )
    if report.epsilon_interval is not None:
        low, high = report.epsilon_interval
        words += f", and if the noise is Gaussian, it is between {low:.3g} and {high:.3g}"
    return words
