"""Numbers rounded at random to a few levels, so that on average nothing is lost.

QSGD, ternary gradients and uniform quantisation.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from fedrounds.fl_components.arrays import Float32, Payload, Symbols
from fedrounds.fl_components.compression.base import (
    BUCKET,
    CodecContext,
    Quantiser,
    expect,
    in_buckets,
    num_buckets,
    numbers,
    symbols,
)


class Levels(Quantiser):
    """Levels at equal distances in each bucket: `lowest` + symbol * `step`.

    A number is rounded to one of the two next to it, with the probabilities that make it right on average.

    What is not finite makes its bucket NaN, whatever its symbols are; the server refuses it.
    """

    fill: ClassVar[Literal["zeros", "last"]] = "zeros"
    """With what the last bucket is filled up: what does not change its scales."""

    bucket: int = BUCKET

    @property
    def unbiased(self) -> bool:
        return True

    @property
    @abstractmethod
    def top(self) -> int:
        """The largest symbol; the smallest is 0."""

    @property
    def symbol_bits(self) -> int:
        """Of a symbol."""
        return self.top.bit_length()

    @abstractmethod
    def scales(self, values_NKB: Float32) -> dict[str, Float32]:
        """What travels of each bucket, float32 [N, K] each."""

    @abstractmethod
    def grid(self, scales: dict[str, Float32]) -> tuple[Float32, Float32]:
        """The lowest level and the step between levels of each bucket, from what travels."""

    @property
    @abstractmethod
    def scale_names(self) -> tuple[str, ...]:
        """The names of what travels of each bucket."""

    def compress(self, deltas_ND: Float32, context: CodecContext) -> list[Payload]:
        num_rows, size = deltas_ND.shape
        values_NKB = in_buckets(deltas_ND, self.bucket, fill=self.fill)
        with np.errstate(all="ignore"):
            scales = self.scales(values_NKB)
            lowest_NK, step_NK = self.grid(scales)
            per_step_NK = np.where(step_NK > 0, 1 / step_NK, 0).astype(np.float32)
            levels_NKB = values_NKB - lowest_NK[..., None]
            levels_NKB *= per_step_NK[..., None]
            levels_ND = levels_NKB.reshape(num_rows, -1)[:, :size]
            levels_ND += context.uniforms(self.kind, size)
            torch.from_numpy(levels_ND).clamp_(0, self.top)  # in a fifth of the time that numpy takes
            symbols_ND = levels_ND.astype(np.uint8 if self.symbol_bits <= 8 else np.uint16)  # rounds down
        return [
            {"symbols": Symbols(symbols_D, self.symbol_bits)} | {name: each[row] for name, each in scales.items()}
            for row, symbols_D in enumerate(symbols_ND)
        ]

    def check(self, payload: Payload, context: CodecContext) -> None:
        size = context.num_parameters
        scales = dict.fromkeys(self.scale_names, ("float32", num_buckets(size, self.bucket), None))
        expect(payload, symbols=("symbols", size, self.symbol_bits), **scales)

    def decompress(self, payloads: Sequence[Payload], context: CodecContext) -> Float32:
        symbols_ND = symbols(payloads, "symbols").astype(np.float32)
        scales = {name: numbers(payloads, name) for name in self.scale_names}
        with np.errstate(all="ignore"):
            lowest_NK, step_NK = self.grid(scales)
            values_NKB = in_buckets(symbols_ND, self.bucket)
            values_NKB *= step_NK[..., None]
            values_NKB += lowest_NK[..., None]
        return values_NKB.reshape(len(payloads), -1)[:, : context.num_parameters]


class Qsgd(Levels):
    """A number's share of its bucket's norm, rounded at random to one of s = 2^(bits - 1) - 1 levels and zero, with its
    sign: Alistarh et al. 2017, "QSGD" (https://arxiv.org/abs/1610.02132). Unbiased; the mean squared error is at most
    min(d / s^2, sqrt(d) / s) of the squared norm, where d is `bucket`.
    """

    kind: Literal["qsgd"] = "qsgd"
    bits: int = Field(default=4, ge=2, le=8, description="of a number, its sign among them")

    @property
    def top(self) -> int:
        return 2 * self._levels

    @property
    def _levels(self) -> int:
        return int(2 ** (self.bits - 1)) - 1

    @property
    def scale_names(self) -> tuple[str, ...]:
        return ("norms",)

    def error_bound(self, num_values: int) -> float:
        """Alistarh et al. 2017, lemma 3.1, with the variance of a coin, which is at most 1/4."""
        dim = min(num_values, self.bucket)
        return min(dim / (4 * self._levels**2), math.sqrt(dim) / self._levels)

    def scales(self, values_NKB: Float32) -> dict[str, Float32]:
        doubles_NKB = values_NKB.astype(np.float64)
        squares_NK = np.einsum("nkb,nkb->nk", doubles_NKB, doubles_NKB)
        # Rounded upward: no number is larger than its norm.
        return {"norms": np.nextafter(np.sqrt(squares_NK).astype(np.float32), np.float32(np.inf)) * (squares_NK > 0)}

    def grid(self, scales: dict[str, Float32]) -> tuple[Float32, Float32]:
        return -scales["norms"], scales["norms"] / np.float32(self._levels)


class Ternary(Levels):
    """Minus or plus the largest of the bucket, or zero: Wen et al. 2017, "TernGrad" (https://arxiv.org/abs/1705.07878).

    Unbiased; the mean squared error is max|x| ||x||_1 - ||x||_2^2 for each bucket.
    """

    kind: Literal["ternary"] = "ternary"

    @property
    def top(self) -> int:
        return 2

    @property
    def scale_names(self) -> tuple[str, ...]:
        return ("largest",)

    def error_bound(self, num_values: int) -> float:
        """Of max|x| ||x||_1 - ||x||_2^2: reached where one number is largest and all others are equal."""
        return (math.sqrt(min(num_values, self.bucket)) - 1) / 2

    def scales(self, values_NKB: Float32) -> dict[str, Float32]:
        return {"largest": np.abs(values_NKB).max(2)}

    def grid(self, scales: dict[str, Float32]) -> tuple[Float32, Float32]:
        return -scales["largest"], scales["largest"]


class UniformQuantiser(Levels):
    """2^bits levels from the smallest to the largest of the bucket: Suresh et al. 2017, "Distributed mean estimation
    with limited communication", section 2.2 (https://arxiv.org/abs/1611.00429). Unbiased; the mean squared error is at
    most d (max - min)^2 / (4 (2^bits - 1)^2) for each bucket of d numbers.
    """

    kind: Literal["uniform"] = "uniform"
    fill: ClassVar[Literal["zeros", "last"]] = "last"
    bits: int = Field(default=8, ge=1, le=16, description="of a number")

    @property
    def top(self) -> int:
        return int(2**self.bits) - 1

    @property
    def scale_names(self) -> tuple[str, ...]:
        return ("lowest", "highest")

    def error_bound(self, num_values: int) -> float:
        """Reached where all numbers but the smallest and the largest lie between two levels."""
        return max(0, min(num_values, self.bucket) - 2) / (2 * self.top**2)

    def largest_error_bound(self, num_values: int) -> float:
        """One step, where max - min is at most twice the largest absolute value.

        It does not depend on `bucket`; the bound of the squared error does, for vectors of few numbers that are not
        zero.
        """
        return 2 / self.top

    def scales(self, values_NKB: Float32) -> dict[str, Float32]:
        return {"lowest": values_NKB.min(2), "highest": values_NKB.max(2)}

    def grid(self, scales: dict[str, Float32]) -> tuple[Float32, Float32]:
        return scales["lowest"], (scales["highest"] - scales["lowest"]) / np.float32(self.top)
