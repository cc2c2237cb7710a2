"""Rounding to whole steps, where what is small becomes zero: few symbols, most of them alike, for the entropy coder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedrounds.fl_components.arrays import Float32, Payload, Symbols
from fedrounds.fl_components.compression.base import CodecContext, Quantiser, expect, numbers, symbols, symbols_of
from fedrounds.fl_components.errors import UpdateRejected
from fedrounds.fl_components.rejections import Rejection, RejectionCode

ROUNDED_UP: Final = np.float32(2 / 3)
"""The part of a step from which on a number goes away from zero, not towards it."""

BITS: Final = 2
LARGER: Final = 2**BITS - 1
"""The symbol of what has a second symbol."""

MAX_STEPS: Final = 2**15 - 1


class DeadZone(Quantiser):
    """Uniform quantisation with a dead zone, and entropy coding (Sullivan 1996, "Efficient scalar quantization of
    exponential and Laplacian random variables", IEEE Transactions on Information Theory 42(5); what H.264 and JPEG 2000
    write their coefficients with).

    All numbers of an update have one step in common, given in root mean squares of the update: so bits are spent where
    the numbers are large. A number is rounded towards zero, or away from it where less than a third of a step is
    missing. Biased: below two thirds of a step nothing is left, no number grows by more than half, and none is off by
    more than two thirds of a step (unless it is beyond 32,767 steps, to which it is cut). Where all numbers are below
    two thirds of a step, the step is the largest of them instead: something always travels.

    Nothing, one step down and one step up are symbols of 2 bits, of which zstandard sees four in a byte. What is larger
    has the fourth symbol, and another one behind. Where numbers have no pattern this takes a quarter of a bit at least.

    >>> rule, context = DeadZone(step=0.5), CodecContext(seeds=[0], round_seed=0, shapes=[(4,)])
    >>> rule.decompress(rule.compress(np.array([[0.3, -3.0, 1.6, -2.0]], np.float32), context), context).round(2)
    array([[ 0.  , -2.97,  0.99, -1.98]], dtype=float32)
    """

    kind: Literal["dead_zone"] = "dead_zone"
    step: float = Field(default=2.0, ge=0.01, description="in root mean squares of the update")

    @property
    def unbiased(self) -> bool:
        return False

    def error_bound(self, num_values: int) -> float:
        """The largest number is off by at most half of itself, or cut to 32,767 steps.

        It is at most the root of `num_values` root mean squares.
        """
        cut = MAX_STEPS * self.step / math.sqrt(num_values)
        return 1 - min(0.75, cut) / num_values

    def compress(self, deltas_ND: Float32, context: CodecContext) -> list[Payload]:
        return [self._written(delta_D) for delta_D in deltas_ND]

    def _written(self, delta_D: Float32) -> Payload:
        with np.errstate(all="ignore"):
            step = np.sqrt(delta_D @ delta_D / np.float32(len(delta_D))) * np.float32(self.step)
            # Where there is no step all is zero; one that is not finite has the server refuse the update.
            one = step * ROUNDED_UP if step > 0 else np.float32(np.inf)
            symbols_D = _beyond(one, delta_D)
            if 0 < step < np.inf and not symbols_D.any():
                step = np.abs(delta_D).max()
                one = step * ROUNDED_UP
                symbols_D = _beyond(one, delta_D)
            places = np.flatnonzero(np.abs(delta_D) > one + step)
            steps = np.clip(np.abs(delta_D[places]) / step + (1 - ROUNDED_UP), 2, MAX_STEPS).astype(np.uint16)
        symbols_D[places] = LARGER
        larger = 2 * steps - 3
        larger -= delta_D[places] < 0  # 2 steps down, 2 up, 3 down, ... as 0, 1, 2, ...
        bits = max(1, int(larger.max(initial=0)).bit_length())
        return {
            "symbols": Symbols(symbols_D, BITS),
            "larger": Symbols(larger.astype(np.uint8) if bits <= 8 else larger.astype(np.uint16), bits),
            "step": step[None],
        }

    def check(self, payload: Payload, context: CodecContext) -> None:
        expect(
            payload,
            symbols=("symbols", context.num_parameters, BITS),
            larger=("symbols", None, None),
            step=("float32", 1, None),
        )
        found, expected = len(symbols_of(payload, "larger")), int((symbols_of(payload, "symbols") == LARGER).sum())
        if found != expected:
            detail = f"expected larger: symbols [{expected}]; got [{found}]"
            raise UpdateRejected(Rejection(RejectionCode.WRONG_SHAPE, detail))

    def decompress(self, payloads: Sequence[Payload], context: CodecContext) -> Float32:
        symbols_ND = symbols(payloads, "symbols")
        levels_ND = np.take(_LEVELS, symbols_ND, mode="clip")
        for symbols_D, levels_D, payload in zip(symbols_ND, levels_ND, payloads, strict=True):
            larger = symbols_of(payload, "larger")
            steps = (larger >> 1).astype(np.float32) + 2
            levels_D[symbols_D == LARGER] = np.where(larger & 1, steps, -steps)
        with np.errstate(all="ignore"):
            levels_ND *= numbers(payloads, "step")
        return levels_ND


def _beyond(one: np.float32, delta_D: Float32) -> NDArray[np.uint8]:
    """1 for a number of at most -`one`, 2 for one of at least `one`, else 0."""
    found: NDArray[np.uint8] = (delta_D <= -one).view(np.uint8) | (delta_D >= one).view(np.uint8) << np.uint8(1)
    return found


_LEVELS: Final = np.array([0, -1, 1, 0], np.float32)
"""In steps, of each symbol; what is larger has another one: 2 steps down, 2 up, 3 down, ..."""
