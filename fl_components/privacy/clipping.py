"""Contributions: updates clipped to an L2 norm, in whole units of which `UNITS` make that norm.

Sums of whole numbers are exact, so they come out the same in any order and on any number of machines, and one client
more or less moves them by no more than the clipping norm: not by what rounding would add (Mironov 2012, "On
significance of the least significant bits for differential privacy"; Casacuberta et al. 2022, https://arxiv.org/abs/2207.10635).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrounds.fl_components.admission import Clip

UNITS: Final = 1 << 19
"""Whole units in a clipping norm. A float32 holds the sum of 32 contributions exactly, a float64 that of 2^34."""

EXACT_IN_FLOAT32: Final = (1 << 24) // UNITS

BLOCK: Final = 256
"""Coordinates whose squares are added up in float32: whatever the order, the sum is right to `BLOCK` * 2^-24 of it."""


def clip_norm_in_units(num_parameters: int) -> float:
    """The length to which an update of the clipping norm is scaled.

    What is left is for rounding D coordinates to whole numbers (at most half the square root of D), and for what
    float32 makes of a norm and of a product.

    >>> clip_norm_in_units(199_210) / UNITS  # how much of the clipping norm is used
    0.9995419...
    """
    return UNITS * (1 - 2 * BLOCK * 2.0**-24) - math.sqrt(num_parameters) / 2 - 1


def contributions(parts: Sequence[Tensor], shares_C: Tensor, clip: Clip) -> Tensor:
    """Make updates contributions, in place: whole numbers whose L2 norm is at most `UNITS`.

    Args:
      parts: the updates in pieces, float32 [C, d] each; with `per_layer` each piece is a layer.
      shares_C: each client's weight over the largest possible one, float64 [C] in [0, 1].

    Returns which were not clipped, bool [C]. An update that is not finite contributes zero, and counts as clipped.
    """
    kept = clip_norm_in_units(sum(part.shape[1] for part in parts))
    squares = [squared_norms(part) for part in parts]
    finite_C = torch.isfinite(torch.stack(squares).sum(0))
    if not finite_C.all():
        for part in parts:
            part[~finite_C] = 0
    share = 1 / math.sqrt(len(parts)) if clip.per_layer else 1.0  # of the norm, for each layer
    norms = squares if clip.per_layer else [torch.stack(squares).sum(0)] * len(parts)
    unclipped_C = finite_C.clone()
    for part, squares_C in zip(parts, norms, strict=True):
        norms_C = torch.where(finite_C, squares_C, 0).sqrt_()
        unclipped_C &= norms_C <= clip.norm * share
        scales_C = shares_C.to(norms_C) * (kept * share) / norms_C.clamp(min=clip.norm * share)
        part.mul_(scales_C.to(torch.float32)[:, None]).round_()
    return unclipped_C.cpu()


def squared_norms(part: Tensor) -> Tensor:
    """Return the squared norm of each row, float64 [C].

    Squares are added up in float32 within blocks, where that is fast and its error is bounded, and the blocks in
    float64.
    """
    whole = part.shape[1] // BLOCK * BLOCK
    blocks = [part[:, :whole].view(len(part), whole // BLOCK, BLOCK), part[:, whole:].unsqueeze(1)]
    squares = torch.stack([torch.linalg.vector_norm(each, dim=2).double().square_().sum(1) for each in blocks]).sum(0)
    rest = ~torch.isfinite(squares)
    if rest.any():  # too long for a float32's square; the others' norms must not depend on that
        squares[rest] = torch.linalg.vector_norm(part[rest], dim=1, dtype=torch.float64).square_()
    return squares


def add_contributions(sum_D1: NDArray[np.floating], parts: Sequence[Tensor], shares_C: Tensor, clip: Clip) -> None:
    """Add the contributions of updates (in pieces, used up) to a sum, float64 [D + 1], whose last coordinate gets 1/2
    for each client that was not clipped and -1/2 for each of the others. Exact: the order of calls does not matter."""
    unclipped_C, start = contributions(parts, shares_C, clip), 0
    for part in parts:
        into = sum_D1[start : (start := start + part.shape[1])]
        for row in range(0, len(part), EXACT_IN_FLOAT32):
            into += part[row : row + EXACT_IN_FLOAT32].sum(0).cpu().numpy()
    sum_D1[-1] += float(unclipped_C.sum()) - len(unclipped_C) / 2
