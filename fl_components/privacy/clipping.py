"""Contributions: updates clipped to an L2 norm, in whole units of which `UNITS` make that norm.

Sums of whole numbers are exact, so they come out the same in any order and on any number of machines, and one client
more or less moves them by no more than the clipping norm: not by what rounding would add (Mironov 2012, "On
significance of the least significant bits for differential privacy"; Casacuberta et al. 2022, https://arxiv.org/abs/2207.10635).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

UNITS: Final = 1 << 19
"""Whole units in a clipping norm. A float32 holds the sum of 32 contributions exactly, a float64 that of 2^34."""

EXACT_IN_FLOAT32: Final = (1 << 24) // UNITS


def kept_units(num_parameters: int) -> float:
    """The length to which an update of the clipping norm is scaled. Rounding D coordinates to the nearest whole number
    then adds at most half the square root of D, and float32 arithmetic less than the unit that is left.

    >>> kept_units(199_210) / UNITS  # how much of the clipping norm is used
    0.9995724396946757
    """
    return UNITS - math.sqrt(num_parameters) / 2 - 1


@dataclass(frozen=True, slots=True)
class Clip:
    """How long a contribution may be: `norm` over all parameters. With `per_layer` each of L parameter tensors is
    clipped for itself, to norm / sqrt(L) (McMahan et al. 2018, section 3)."""

    norm: float
    per_layer: bool = False


def contributions(deltas_CD: Tensor, shares_C: Tensor, clip: Clip, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Updates float32 [C, D], changed in place, as contributions: whole numbers whose L2 norm is at most `UNITS`.

    Args:
      shares_C: each client's weight over the largest possible one, float64 [C] in [0, 1].
      sizes: of the D parameters, how many each tensor has.

    Also which were not clipped, bool [C]. An update that is not finite contributes zero, and counts as clipped.
    """
    kept, unclipped_C = kept_units(deltas_CD.shape[1]), torch.ones(len(deltas_CD), dtype=torch.bool)
    parts = deltas_CD.split_with_sizes(list(sizes), dim=1) if clip.per_layer else (deltas_CD,)
    share = 1 / math.sqrt(len(parts))  # of the norm, for each part
    norms = [torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in parts]
    finite_C = torch.isfinite(torch.stack(norms).sum(0))
    if not finite_C.all():
        deltas_CD[~finite_C] = 0
    for part, norms_C in zip(parts, norms, strict=True):
        norms_C = torch.where(finite_C, norms_C, 0)
        scales_C = shares_C.to(norms_C) * (kept * share) / norms_C.clamp(min=clip.norm * share)
        part.mul_(scales_C.to(torch.float32)[:, None])
        unclipped_C &= (norms_C <= clip.norm * share).cpu()
    return deltas_CD.round_(), unclipped_C & finite_C.cpu()


def add_contributions(
    sum_D1: NDArray[np.floating], deltas_CD: Tensor, shares_C: Tensor, clip: Clip, sizes: Sequence[int]
) -> None:
    """Add the contributions of updates (float32 [C, D], used up) to a sum, float64 [D + 1], whose last coordinate gets
    1/2 for each client that was not clipped and -1/2 for each of the others. Exact: the order of calls does not
    matter."""
    units_CD, unclipped_C = contributions(deltas_CD, shares_C, clip, sizes)
    for start in range(0, len(units_CD), EXACT_IN_FLOAT32):
        sum_D1[:-1] += units_CD[start : start + EXACT_IN_FLOAT32].sum(0).cpu().numpy()
    sum_D1[-1] += float(unclipped_C.sum()) - len(unclipped_C) / 2
