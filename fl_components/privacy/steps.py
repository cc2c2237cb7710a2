"""The steps of DP-SGD at one client.

Which examples are in a batch, how their gradients are clipped and added up, and what is released of the sum (Abadi et
al. 2016, https://arxiv.org/abs/1607.00133).

What is released is a function of a sum of whole numbers plus noise that is whole numbers: it shows nothing of the
floating point numbers that they came from (Mironov 2012). A unit is such a part of the noise that both are exact in
float32.
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

from fedrounds.fl_components import randomness
from fedrounds.fl_components.errors import ModelError
from fedrounds.fl_components.privacy.clipping import BLOCK
from fedrounds.fl_components.privacy.example_level import ExampleLevel
from fedrounds.fl_components.privacy.noise import MOST_OF_FLOAT32, WholeNormals

PIECE_ROWS: Final = 32
"""The most examples of a batch whose gradients are added up in float32. Pieces are rounded to whole units and added up
exactly, so an example disturbs the rounding of its own piece only."""

LARGEST: Final = 2.0**100
"""An example whose gradient is longer contributes zero, as one that is not finite does: none of its numbers, nor of the
factors that it is made of, has left float32 by then."""

_ROUNDING: Final = 2.0**-24  # the relative error of one operation in float32


def private_batches(rule: ExampleLevel, key: bytes, num_examples: int, steps: int) -> list[NDArray[np.int64]]:
    """The rows of each step's batch, each row by a coin of its own; a batch may be empty.

    One that comes out larger than `max_batch_size` is cut to a part of that size, all parts being equally likely.

    >>> rule = ExampleLevel(noise_multiplier=1.0, max_grad_norm=1.0, sampling_rate=0.5, max_batch_size=3)
    >>> [len(rows) <= 3 for rows in private_batches(rule, bytes(32), 100, 2)]
    [True, True]
    """
    coins = randomness.generator(key, 0, "batches")
    batches = []
    for _ in range(steps):
        rows = np.flatnonzero(coins.random(num_examples) < rule.sampling_rate).astype(np.int64)
        if rule.max_batch_size is not None and len(rows) > rule.max_batch_size:
            rows = np.sort(coins.permutation(rows)[: rule.max_batch_size])
        batches.append(rows)
    return batches


@dataclass(frozen=True, slots=True)
class Mechanism:
    """How a step's gradients of single examples become what is released.

    Attributes:
      num_parameters: D.
      kept: the norm to which each example's gradient is clipped, a little less than `max_grad_norm` (C).
      unit: of sums and noise. The noise has a deviation of 2^20 units, which are z * C.

    With u = 2^-24 and R = `PIECE_ROWS`, one example more or less moves a sum of whole numbers by at most, in this
    order: its clipped gradient, `kept` (1 + (BLOCK + 2) u), as the float32 norm and factor come out; what it changes in
    the rounding of a float32 sum of R such, in any order: R terms of at most R + 8 operations each, at either of the
    two neighbours, 2 R (R + 8) u `kept`; and rounding D coordinates at both, sqrt(D) units. `kept` is chosen so that
    all of it together is at most C.
    """

    num_parameters: int
    kept: float
    unit: float

    @classmethod
    def of(cls, rule: ExampleLevel, num_parameters: int) -> Mechanism:
        """Raises `ModelError` where so much noise on so many parameters leaves less than half of the norm."""
        assert rule.noise_multiplier is not None, "SGD.resolve sets it"
        unit = rule.noise_multiplier * rule.max_grad_norm / MOST_OF_FLOAT32
        margin = (BLOCK + 2 + 2 * PIECE_ROWS * (PIECE_ROWS + 8)) * _ROUNDING
        kept = (rule.max_grad_norm - math.sqrt(num_parameters) * unit) / (1 + 1.01 * margin)
        if kept < rule.max_grad_norm / 2:
            raise ModelError(
                f"with training.privacy.noise_multiplier {rule.noise_multiplier:g}, rounding the {num_parameters} "
                "parameters of the model to parts of the noise would take more than half of the clipping norm",
                hint="give less noise, or a smaller model",
            )
        return cls(num_parameters, kept, unit)

    def noise(self, key: bytes | None) -> WholeNormals:
        """The noise of a client's round, from its key of that round: one stream for all steps.

        Raises ValueError where there is no key: noise that anybody could draw again would be none.
        """
        from fedrounds.fl_components.randomness import hkdf

        if not key:
            raise ValueError("a client that makes a claim about its examples draws its noise from a key of its own")
        return WholeNormals(hkdf(key, "noise of the steps"), MOST_OF_FLOAT32)

    def factors(self, squares: Tensor) -> Tensor:
        """By what gradients are multiplied to be clipped and in units, float32, from their squared norms, float64. 0
        for those that do not count.

        >>> Mechanism(4, kept=1.0, unit=0.5).factors(torch.tensor([0.25, 16.0, float("nan")], dtype=torch.float64))
        tensor([2.0000, 0.5000, 0.0000])
        """
        scales = self.kept / self.unit / squares.sqrt().clamp_(min=self.kept)
        return torch.where(counts(squares), scales, 0).to(torch.float32)

    def release(
        self, sums: Sequence[Tensor], noise: WholeNormals, into: Sequence[Tensor], alpha: float, *, fresh: bool = False
    ) -> None:
        """into += alpha times what is released of one client's step: whole units with noise.

        Args:
          sums: in units, [d] each, d adding up to D; either float32, of one piece, or float64: the sum of rounded
            pieces. Used up.
          into: float32 [d] each.
          alpha: with `per_example` in it the sum becomes a mean.
          fresh: into = alpha times it.
        """
        part = start = 0
        sizes = [each.numel() for each in sums]
        for block in noise.blocks(self.num_parameters):
            taken, size = 0, block.numel()
            while taken < size:
                stop = min(sizes[part], start + size - taken)
                own = block[taken : taken + stop - start]
                whole, target = sums[part][start:stop], into[part][start:stop]
                # Rounded once, from the exact sum of two whole numbers: the same bits for either type of sums.
                own = whole.round_().add_(own.to(whole.device)).to(torch.float32)
                if fresh:
                    torch.mul(own, alpha, out=target)
                else:
                    target.add_(own, alpha=alpha)
                taken, start = taken + stop - start, stop
                if start == sizes[part]:
                    part, start = part + 1, 0

    def per_example(self, sampling_rate: float, num_examples: int) -> float:
        """A unit over the expected size of a batch, which is public; how many came is not."""
        return self.unit / (sampling_rate * num_examples)


def counts(squares: Tensor) -> Tensor:
    """Whether gradients of these squared norms, float64, count."""
    return squares < LARGEST**2  # false for what is not a number
