"""Rounding after noise that both ends know, and without it again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import numpy as np
from pydantic import Field

from fedrounds.fl_components.arrays import Float32, Payload, Symbols
from fedrounds.fl_components.compression.base import (
    CodecContext,
    Quantiser,
    expect,
    in_buckets,
    num_buckets,
    numbers,
    symbols,
)

BUCKET: Final = 4096
MAX_BITS: Final = 16


class Dithered(Quantiser):
    """Subtractively dithered uniform quantisation (Roberts 1962; Schuchman 1964, "Dither signals and their effect on
    quantization noise"; in federated learning Shlezinger et al. 2020, "UVeQFed", https://arxiv.org/abs/2006.03262).

    Uniform noise from a seed that both ends have is added before a number is rounded to a multiple of the step, and
    subtracted after. What is lost is uniform over one step, whatever the number was: unbiased, with a mean squared
    error of step^2 / 12 for each. The step is given in root mean squares of each 4,096 numbers. The symbols are few
    where it is large, and unequally often: how many bytes they take is for the entropy coding of the wire.
    """

    kind: Literal["dithered"] = "dithered"
    step: float = Field(default=1.0, ge=0.01, description="in root mean squares")

    @property
    def unbiased(self) -> bool:
        return True

    def error_bound(self, num_values: int) -> float:
        """Schuchman 1964: whatever the numbers are."""
        return self.step**2 / 12

    def compress(self, deltas_ND: Float32, context: CodecContext) -> list[Payload]:
        num_rows, size = deltas_ND.shape
        values_NKB = in_buckets(deltas_ND, BUCKET)
        with np.errstate(all="ignore"):
            counts_K = np.full(values_NKB.shape[1], BUCKET)
            counts_K[-1] -= values_NKB.shape[1] * BUCKET - size
            squares_NK = np.einsum("nkb,nkb->nk", values_NKB, values_NKB)
            steps_NK = (np.sqrt(squares_NK / counts_K) * self.step).astype(np.float32)
            per_step_NK = np.where(steps_NK > 0, 1 / steps_NK, 0).astype(np.float32)
            levels_ND = (values_NKB * per_step_NK[..., None]).reshape(num_rows, -1)[:, :size]
            levels_ND += context.uniforms(self.kind, size)
            np.nan_to_num(np.floor(levels_ND, out=levels_ND), copy=False)
        lowest_N, highest_N = levels_ND.min(1), levels_ND.max(1)
        payloads: list[Payload] = []
        for levels_D, lowest, highest, steps_K in zip(levels_ND, lowest_N, highest_N, steps_NK, strict=True):
            bits = max(1, int(highest - lowest).bit_length())
            symbols_D = (levels_D - lowest).astype(np.uint8 if bits <= 8 else np.uint16)
            payloads.append(
                {"symbols": Symbols(symbols_D, bits), "lowest": np.array([lowest], np.float32), "steps": steps_K}
            )
        return payloads

    def check(self, payload: Payload, context: CodecContext) -> None:
        size = context.num_parameters
        expect(
            payload,
            symbols=("symbols", size, None),
            lowest=("float32", 1, None),
            steps=("float32", num_buckets(size, BUCKET), None),
        )

    def decompress(self, payloads: Sequence[Payload], context: CodecContext) -> Float32:
        size = context.num_parameters
        levels_ND = np.float32(0.5) - context.uniforms(self.kind, size)
        levels_ND += symbols(payloads, "symbols")
        levels_ND += numbers(payloads, "lowest")
        with np.errstate(all="ignore"):
            values_NKB = in_buckets(levels_ND, BUCKET)
            values_NKB *= numbers(payloads, "steps")[..., None]
        return values_NKB.reshape(len(payloads), -1)[:, :size]
