"""A rotation that makes all numbers look normal, and a few bits for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fl_components.compression.base import Known, Quantiser, expect, numbers, symbols
from fl_components.compression.rotation import block_of, rotate, rotate_back, rotated_size
from fl_components.values import Float32, Payload, Symbols

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


class Eden(Quantiser):
    """Vargaftik et al. 2022, "EDEN: communication-efficient and robust distributed mean estimation for federated
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

    def compress(self, deltas_ND: Float32, known: Known) -> list[Payload]:
        size = deltas_ND.shape[1]
        with np.errstate(all="ignore"):
            rotated_NKB = rotate(deltas_ND, known).reshape(len(deltas_ND), -1, block_of(size))
            squares_NK = np.einsum("nkb,nkb->nk", rotated_NKB, rotated_NKB)
            deviations_NK = np.sqrt(squares_NK / block_of(size))
            symbols_NKB = self._nearest(rotated_NKB, deviations_NK)
            levels_NKB = self._levels[symbols_NKB]
            products_NK = np.einsum("nkb,nkb->nk", rotated_NKB, levels_NKB)
            if self.unbiased:
                scales_NK = squares_NK / products_NK
            else:
                scales_NK = products_NK / np.einsum("nkb,nkb->nk", levels_NKB, levels_NKB)
            scales_NK[squares_NK == 0] = 0
        return [
            {"symbols": Symbols(symbols_KB.ravel(), self.bits), "scales": scales_K}
            for symbols_KB, scales_K in zip(symbols_NKB, scales_NK, strict=True)
        ]

    def check(self, payload: Payload, known: Known) -> None:
        size = rotated_size(known.num_parameters)
        blocks = size // block_of(known.num_parameters)
        expect(payload, symbols=("symbols", size, self.bits), scales=("float32", blocks, None))

    def decompress(self, payloads: Sequence[Payload], known: Known) -> Float32:
        size = known.num_parameters
        rotated_ND = self._levels[symbols(payloads, "symbols")]
        with np.errstate(all="ignore"):
            rotated_NKB = rotated_ND.reshape(len(payloads), -1, block_of(size))
            rotated_NKB *= numbers(payloads, "scales")[..., None]
        return rotate_back(rotated_ND, size, known)

    @property
    def _levels(self) -> Float32:
        """The level of each symbol, ascending."""
        positive = np.array(CENTROIDS[self.bits], np.float32)
        return np.concatenate([-positive[::-1], positive])

    def _nearest(self, rotated_NKB: Float32, deviations_NK: Float32) -> NDArray[np.uint8]:
        """The symbol of the level next to each number, a level being in deviations of its block."""
        levels = self._levels
        symbols_NKB = np.zeros(rotated_NKB.shape, np.uint8)
        for between in (levels[1:] + levels[:-1]) / 2:
            symbols_NKB += rotated_NKB >= between * deviations_NK[..., None]
        return symbols_NKB
