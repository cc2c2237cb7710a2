"""A rotation that makes all numbers look normal, and a few bits for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedrounds.fl_components.arrays import Float32, Payload, Symbols
from fedrounds.fl_components.compression.base import CodecContext, Quantiser, expect, num_buckets, numbers, symbols
from fedrounds.fl_components.compression.rotation import block_of, rotate, rotate_back

CENTROIDS: Final = {
    1: (0.7978845608028654,),
    2: (0.4527800399, 1.5104176087),
    3: (0.2450941791, 0.7560052959, 1.3439092613, 2.1519457917),
    4: (
        0.1283950300, 0.3880483004, 0.6567591062, 0.9423404906,
        1.2562311736, 1.6180464157, 2.0690172265, 2.7326357758,
    ),
}  # fmt: skip
"""The positive levels of the best quantiser of a normal variable for 1 to 4 bits (Max 1960, table I; Lloyd 1982)."""

LOST: Final = {
    True: (1.0, 0.5708, 0.1331, 0.0358, 0.0096),
    False: (1.0, 0.3634, 0.1175, 0.03454, 0.009497),
}
"""The share of the squared norm that is lost with 0, 1, ... 4 bits a number, by whether the scale makes it unbiased
(Vargaftik et al. 2022, table 1) or the error least (Max 1960, table I)."""


class Eden(Quantiser):
    """Symbols of a rotated vector, whose scale makes them unbiased or the error least.

    Vargaftik et al. 2022, "EDEN: Communication-efficient and robust distributed mean estimation for federated
    learning" (https://arxiv.org/abs/2108.08842); with one bit it is DRIVE (Vargaftik et al. 2021,
    https://arxiv.org/abs/2105.08339).

    Both ends rotate by the same seed; each rotated number becomes one of the 2^bits best levels for a normal variable.
    One scale for each block makes it unbiased (`scale: unbiased`, with a mean squared error of .571, .133, .0358 or
    .0096 of the squared norm at 1, 2, 3 or 4 bits) or the error least (`scale: least_error`, biased: .363, .117, .0345,
    .0095).
    """

    kind: Literal["eden"] = "eden"
    bits: int = Field(default=1, ge=1, le=4, description="of a number")
    scale: Literal["unbiased", "least_error"] = "unbiased"

    @property
    def unbiased(self) -> bool:
        return self.scale == "unbiased"

    def error_bound(self, num_values: int) -> float:
        """Vargaftik et al. 2022, table 1, and Max 1960, table I: what many numbers come to; fewer lose less.

        A Hadamard transform is not quite a uniform rotation: a twentieth is room for that.
        """
        return 1.05 * LOST[self.unbiased][self.bits]

    def compress(self, deltas_ND: Float32, context: CodecContext) -> list[Payload]:
        symbols_NKB, scales_NK = quantised(
            rotate(deltas_ND, block_of(deltas_ND.shape[1]), context), self.bits, unbiased=self.unbiased
        )
        return [
            {"symbols": Symbols(symbols_KB.ravel(), self.bits), "scales": scales_K}
            for symbols_KB, scales_K in zip(symbols_NKB, scales_NK, strict=True)
        ]

    def check(self, payload: Payload, context: CodecContext) -> None:
        block = block_of(context.num_parameters)
        blocks = num_buckets(context.num_parameters, block)
        expect(payload, symbols=("symbols", blocks * block, self.bits), scales=("float32", blocks, None))

    def decompress(self, payloads: Sequence[Payload], context: CodecContext) -> Float32:
        size = context.num_parameters
        rotated_ND = np.take(levels_of(self.bits), symbols(payloads, "symbols"), mode="clip")  # faster than by brackets
        rotated_NKB = rotated_ND.reshape(len(payloads), -1, block_of(size))
        with np.errstate(all="ignore"):
            rotated_NKB *= numbers(payloads, "scales")[..., None]
        return rotate_back(rotated_NKB, size, context)


def levels_of(bits: int) -> Float32:
    """The level of each symbol, in deviations of a block, ascending."""
    positive = np.array(CENTROIDS[bits], np.float32)
    return np.concatenate([-positive[::-1], positive])


def quantised(rotated_MKB: Float32, bits: int, *, unbiased: bool) -> tuple[NDArray[np.uint8], Float32]:
    """The symbols of rotated numbers, uint8 [M, K, B], and the scale of each block, float32 [M, K].

    The one that makes it right on average over rotations, or the one that makes the error least.
    """
    levels = levels_of(bits)
    with np.errstate(all="ignore"):
        squares_MK = np.einsum("mkb,mkb->mk", rotated_MKB, rotated_MKB)
        deviations_MK = np.sqrt(squares_MK / rotated_MKB.shape[2])
        symbols_MKB = np.zeros(rotated_MKB.shape, np.uint8)
        for between in (levels[1:] + levels[:-1]) / 2:
            symbols_MKB += rotated_MKB >= between * deviations_MK[..., None]
        levels_MKB = np.take(levels, symbols_MKB, mode="clip")
        products_MK = np.einsum("mkb,mkb->mk", rotated_MKB, levels_MKB)
        if unbiased:
            scales_MK = squares_MK / products_MK
        else:
            scales_MK = products_MK / np.einsum("mkb,mkb->mk", levels_MKB, levels_MKB)
        scales_MK[squares_MK == 0] = 0
    return symbols_MKB, scales_MK
