"""An audit of central differential privacy.

Canary clients join one release, and how well they are found in what it gives away tells how much noise there was
(Andrew et al. 2023, "One-shot empirical privacy estimation for federated learning", https://arxiv.org/abs/2302.03098).

A canary's update is a random direction as long as clipping allows. Of M canaries each joins by a fair coin, and nobody
else does: a release without any draw of a cohort. It has two readings.

**An interval by a Gaussian model.** The k canaries that joined have the sum A, which the audit knows; its length is
about sqrt(k) C. Where the noise is Gaussian with deviation z C in each of D coordinates, the release points along
A + z C G. The part of G along A is one normal deviate g, and the rest of it has the length of a chi variable with D - 1
degrees of freedom, so the cotangent of the angle between A and the release, times sqrt(D - 1), is

    t = (|A| / (z C) + g) / (chi / sqrt(D - 1)),

a noncentral t, whatever A is: an interval for its noncentrality |A| / (z C) is one for the noise multiplier z, and so
for epsilon. The mean of the canaries' cosines is the same statistic: each has the length C, so it is the cosine of that
angle times |A| / (k C), about 1 / sqrt(k + D z^2). Canaries that did not join have a mean of about 0.

Its power is that of telling sqrt(k) / z from twice that, where the deviation is sqrt(1 + t^2 / 2D): k decides, and D
hardly matters while it is much larger than k / z^2.

**The count of adaptive clipping** is a release of its own, of one number. Its noise is drawn `COUNTS` times around a
count of nobody, each time under other keys, and the mean square is a chi-square variable: an interval for its
deviation s. A client moves the count by 1/2, so the two releases together are as private as one with noise of
(z^-2 + (2 s)^-2)^-1/2 (Andrew et al. 2021, theorem 1).

**The coins.** The canaries with the largest cosines are guessed to have joined, those with the smallest not to have,
and the right guesses are read as in `audit`, whatever the mechanism is. That is loose here: the canaries of one release
are random directions, which are in each other's way, and epsilon is paid for the least likely outputs, of which one
release shows few.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import NormalDist
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from fedrounds.fl_components.admission import Clip
from fedrounds.fl_components.arrays import Float32, Float64
from fedrounds.fl_components.errors import ConfigError
from fedrounds.fl_components.privacy.audit import (
    MIN_CANARIES,
    AuditReport,
    claimed_mu,
    count_right,
    gaussian_epsilon,
    in_words,
    numbers_of_guesses,
    read_guesses,
)
from fedrounds.fl_components.privacy.central import CentralPrivacy, Clipping, KeyOf
from fedrounds.fl_components.privacy.clipping import UNITS, add_contributions, contributions
from fedrounds.fl_components.randomness import generator
from fedrounds.fl_components.values import Sampling

CHUNK: Final = 8
"""Canaries that exist at once."""

COUNTS: Final = 1000

MIN_PARAMETERS: Final = 1000


def audit_central(
    rule: CentralPrivacy,
    sizes: Sequence[int],
    key_of: KeyOf,
    *,
    num_canaries: int = 1000,
    confidence: float = 0.999,
) -> AuditReport:
    """Return the audit of the release of a rule, in memory for `CHUNK` canaries.

    They are drawn again where they are needed again.

    Args:
      sizes: of the D parameters, how many each tensor has.
      key_of: the key of a purpose, 32 bytes: the canaries, their coins and the release's own noise. Never the keys of a
        round: the audit knows its sum, so what it releases tells the noise.

    Raises `ConfigError` when there are too few canaries or parameters to say anything, and for a simulated cohort,
    whose noise is not there.

    >>> from fedrounds.fl_components.privacy.central import FixedClipping
    >>> rule = CentralPrivacy(noise_multiplier=1.0, clipping=FixedClipping(norm=0.5))
    >>> report = audit_central(rule, [2000], lambda purpose: purpose.encode().ljust(32), num_canaries=200)
    >>> print(report.verdict)
    consistent with the claim: an epsilon of 4.38 is claimed for one release, ...
    """
    num_parameters = sum(sizes)
    if num_canaries < MIN_CANARIES or num_parameters < MIN_PARAMETERS:
        raise ConfigError(
            f"{num_canaries} canaries in {num_parameters} parameters are too few for an audit",
            hint=f"draw at least {MIN_CANARIES} canaries, for a model of at least {MIN_PARAMETERS} parameters",
        )
    if rule.simulate_noise_cohort is not None:
        raise ConfigError(
            "privacy.simulate_noise_cohort scales the noise down: the release is not as private as its epsilon says",
            hint="leave the field out of the privacy that is audited",
        )
    clipping, everyone = rule.init(), Sampling("everyone", num_canaries, num_canaries, 1.0)
    clip = Clip(float(clipping["norm"][0]), rule.per_layer)
    joined_M = generator(key_of("coins of the canaries"), 0, "coins").random(num_canaries) < 0.5
    key = key_of("canaries")

    sum_D1 = np.zeros(num_parameters + 1)
    for _, deltas_CD in _canaries(key, np.flatnonzero(joined_M), clip, sizes):
        add_contributions(sum_D1, _parts(deltas_CD, sizes), _equal_shares(deltas_CD), clip)
    released_D, _ = rule.release(sum_D1, clipping, everyone, key_of)

    lengths_M, products_M = np.zeros((2, num_canaries))
    for rows, deltas_CD in _canaries(key, np.arange(num_canaries), clip, sizes):
        contributions(_parts(deltas_CD, sizes), _equal_shares(deltas_CD), clip)
        units_CD = torch.from_numpy(deltas_CD)
        lengths_M[rows] = torch.linalg.vector_norm(units_CD, dim=1, dtype=torch.float64).numpy()
        products_M[rows] = [float(units_D.double() @ torch.from_numpy(released_D)) for units_D in units_CD]
    released = float(np.linalg.norm(released_D)) or 1.0  # nothing is along a release of zeros
    cosines_M = products_M / (lengths_M * released)

    length = float(np.linalg.norm(sum_D1[:-1]))
    counts = _count_interval(rule, clipping, everyone, key_of, (1 + confidence) / 2)
    each_confidence = confidence if counts == (0.0, 0.0) else (1 + confidence) / 2  # both hold at once
    low, high = noncentrality_interval(statistic(released_D, sum_D1[:-1]), num_parameters, each_confidence)
    fullest = length / float(lengths_M[joined_M].sum())  # the mean cosine of a release without noise
    claimed = gaussian_epsilon(1 / rule.noise_multiplier, rule.delta)
    epsilons = (
        gaussian_epsilon(math.hypot(max(low, 0) * UNITS / length, counts[0]), rule.delta),
        gaussian_epsilon(math.hypot(high * UNITS / length, counts[1]), rule.delta),
    )
    guesses_G, mu = numbers_of_guesses(num_canaries), claimed_mu(rule.noise_multiplier)
    right_G = count_right(cosines_M, joined_M, guesses_G)
    report = AuditReport(
        claimed_epsilon=claimed,
        delta=rule.delta,
        noise_multiplier=rule.noise_multiplier,
        num_canaries=num_canaries,
        num_releases=1,
        num_joined=int(joined_M.sum()),
        num_parameters=num_parameters,
        confidence=confidence,
        **read_guesses(num_canaries, guesses_G, right_G, mu, rule.delta, confidence),
        epsilon_interval=epsilons,
        mean_cosine=float(cosines_M[joined_M].mean()),
        mean_cosine_interval=(
            fullest * low / math.hypot(low, math.sqrt(num_parameters - 1)),
            fullest * high / math.hypot(high, math.sqrt(num_parameters - 1)),
        ),
    )
    return replace(report, verdict=in_words(report))


def _count_interval(
    rule: CentralPrivacy, clipping: Clipping, sampling: Sampling, key_of: KeyOf, confidence: float
) -> tuple[float, float]:
    """How far a client moves the count of unclipped updates, in deviations of its noise; 0 where nobody counts."""
    from scipy.stats import chi2

    if rule.clipping.count_deviation(sampling.cohort_size) is None:
        return 0.0, 0.0

    def noise(draw: int) -> float:
        _, state = rule.release(np.zeros(1), clipping, sampling, lambda purpose: key_of(f"{purpose} {draw}"))
        return (float(state["unclipped_fraction"][0]) - 0.5) * sampling.cohort_size

    squares = sum(noise(draw) ** 2 for draw in range(COUNTS))
    least, most = chi2.ppf([(1 - confidence) / 2, (1 + confidence) / 2], COUNTS) / COUNTS
    deviation = math.sqrt(squares / COUNTS)
    return 0.5 * math.sqrt(float(least)) / deviation, 0.5 * math.sqrt(float(most)) / deviation


def statistic(released_D: Float64, sum_D: Float64) -> float:
    """sqrt(D - 1) times the cotangent of the angle between a release, in any unit, and a sum in whole units.

    At most what noise of half a unit would make it: such noise is rounded away, and nothing tells it from none.

    >>> float(statistic(np.array([3.0, 4.0]), np.array([7.0, 0.0])))
    0.75
    """
    length, degrees = float(np.linalg.norm(sum_D)), len(sum_D) - 1
    along = float(released_D @ sum_D) / length
    across = float(
        np.linalg.norm(released_D - sum_D * (along / length))
    )  # not by Pythagoras: it may be next to nothing
    most = 2 * length
    if abs(along) * math.sqrt(degrees) >= most * across:
        return math.copysign(most, along) if along else 0.0
    return along * math.sqrt(degrees) / across


def noncentrality_interval(t: float, num_parameters: int, confidence: float) -> tuple[float, float]:
    """The noncentralities under which a noncentral t with D - 1 degrees of freedom is neither so large nor so small.

    By Johnson and Welch (1940, "Applications of the non-central t-distribution"): a chi variable with n degrees of
    freedom, over sqrt(n), is next to normal with mean 1 - 1/4n and deviation 1 / sqrt(2n). From 1,000 parameters on
    both ends are right to 0.04 deviations, and too low rather than too high.

    >>> [round(end, 2) for end in noncentrality_interval(10.0, 20_000, 0.999)]
    [6.71, 13.29]
    """
    degrees = num_parameters - 1
    margin = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(1 + t * t / (2 * degrees))
    middle = t * (1 - 1 / (4 * degrees))
    return middle - margin, middle + margin


def _canaries(
    key: bytes, rows: NDArray[np.int64], clip: Clip, sizes: Sequence[int]
) -> Iterator[tuple[NDArray[np.int64], Float32]]:
    """Yield canaries, at most CHUNK at a time, with their updates, float32 [C, D].

    They are the same for a key and a row, and in the same memory each time, to be used up before the next.
    """
    parts = list(sizes) if clip.per_layer else [sum(sizes)]
    buffer = np.empty((CHUNK, sum(sizes)), np.float32)
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        deltas_CD = buffer[: len(chunk)]
        for row, delta_D in zip(chunk, deltas_CD, strict=True):
            generator(key, 0, "canary", str(row)).standard_normal(out=delta_D, dtype=np.float32)
            for part in np.split(delta_D, np.cumsum(parts)[:-1]):
                part *= clip.norm / math.sqrt(len(parts)) / float(np.linalg.norm(part))
        yield chunk, deltas_CD


def _parts(deltas_CD: Float32, sizes: Sequence[int]) -> Sequence[torch.Tensor]:
    """The same memory, in a piece for each tensor."""
    return torch.from_numpy(deltas_CD).split_with_sizes(list(sizes), dim=1)


def _equal_shares(deltas_CD: NDArray[Any]) -> torch.Tensor:
    return torch.ones(len(deltas_CD), dtype=torch.float64)
