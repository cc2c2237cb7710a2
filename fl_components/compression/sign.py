"""Signs and how large the numbers are on average."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

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


class Sign(Quantiser):
    """One bit a number, and the mean of the absolute values of each bucket: Karimireddy et al. 2019, "Error feedback
    fixes SignSGD" (https://arxiv.org/abs/1901.09847). Biased; the squared error is ||x||_2^2 - ||x||_1^2 / d for each
    bucket of d numbers.

    >>> rule, context = Sign(), CodecContext(seeds=[0], round_seed=0, shapes=[(3,)])
    >>> rule.decompress(rule.compress(np.array([[1.0, -2.0, 0.0]], np.float32), context), context)
    array([[ 1., -1.,  1.]], dtype=float32)
    """

    kind: Literal["sign"] = "sign"
    bucket: int = Field(default=4096, ge=8, description="so many numbers have a scale in common")

    @property
    def unbiased(self) -> bool:
        return False

    def error_bound(self, num_values: int) -> float:
        """Karimireddy et al. 2019: ||x||_1^2 is at least ||x||_2^2."""
        return 1 - 1 / min(num_values, self.bucket)

    def compress(self, deltas_ND: Float32, context: CodecContext) -> list[Payload]:
        size = deltas_ND.shape[1]
        buckets = num_buckets(size, self.bucket)
        sizes_K = np.full(buckets, self.bucket)
        sizes_K[-1] -= buckets * self.bucket - size
        with np.errstate(all="ignore"):
            scales_NK = (np.abs(in_buckets(deltas_ND, self.bucket)).sum(2, np.float64) / sizes_K).astype(np.float32)
        return [
            {"signs": Symbols((delta_D < 0).view(np.uint8), 1), "scales": scales_K}
            for delta_D, scales_K in zip(deltas_ND, scales_NK, strict=True)
        ]

    def check(self, payload: Payload, context: CodecContext) -> None:
        size = context.num_parameters
        expect(payload, signs=("symbols", size, 1), scales=("float32", num_buckets(size, self.bucket), None))

    def decompress(self, payloads: Sequence[Payload], context: CodecContext) -> Float32:
        signs_ND = symbols(payloads, "signs")
        values_NKB = in_buckets(np.float32(1) - np.float32(2) * signs_ND, self.bucket)
        with np.errstate(invalid="ignore"):
            values_NKB *= numbers(payloads, "scales")[..., None]
        return values_NKB.reshape(len(payloads), -1)[:, : context.num_parameters]
