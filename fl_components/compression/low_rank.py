"""Matrices as products of two thin ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from fedrounds.fl_components.arrays import Float32, Payload
from fedrounds.fl_components.compression.base import CodecContext, CompressionRule, expect, numbers


class LowRank(CompressionRule):
    """PowerSGD (Vogels et al. 2019, https://arxiv.org/abs/1905.13727): of each matrix M the product P Q^T of its best
    columns P by one step of the power method, P = orthonormal(M Q), Q = M^T P. What has one dimension (biases), and a
    matrix that would not get smaller, travels as it is. Biased; the squared error is at most the squared norm.

    The power method starts from numbers that all clients of a round draw alike. A second step (`steps`) makes up for
    not starting from the last round's Q, which a client that comes now and then does not have.

    >>> rule, context = LowRank(rank=1), CodecContext(seeds=[0], round_seed=0, shapes=[(20, 30), (20,)])
    >>> delta_1D = np.concatenate([np.outer(np.arange(20), np.ones(30)).ravel(), np.ones(20)])[None].astype(np.float32)
    >>> (payload,) = rule.compress(delta_1D, context)
    >>> payload["factors"].shape, payload["rest"].shape
    ((50,), (20,))
    >>> bool(np.allclose(rule.decompress([payload], context), delta_1D, atol=1e-5))
    True
    """

    kind: Literal["low_rank"] = "low_rank"
    rank: int = Field(default=2, ge=1, le=256)
    steps: int = Field(default=2, ge=1, le=8, description="of the power method")

    @property
    def unbiased(self) -> bool:
        return False

    def error_bound(self, num_values: int) -> float:
        """Of a matrix with k singular values the first column of P holds at least 1/k of the squared norm, on average
        over its draw: the power method favours no direction over one with a larger singular value. k is at most the
        root of `num_values`."""
        return 1 - 1 / math.sqrt(num_values)

    def compress(self, deltas_ND: Float32, context: CodecContext) -> list[Payload]:
        draw = context.common_draw(self.kind)
        factors, rest = [], []
        for part, shape in zip(_parts(torch.from_numpy(deltas_ND), context), context.shapes, strict=True):
            if not self._is_low(shape):
                rest.append(part)
                continue
            matrices = part.view(len(part), shape[0], -1)
            right = torch.from_numpy(draw.standard_normal((matrices.shape[2], self.rank), np.float32))
            right = right.expand(len(part), -1, -1)
            for _ in range(self.steps):
                left = _orthonormal(matrices @ right)
                right = matrices.mT @ left
            factors += [left.flatten(1), right.flatten(1)]
        factors_NF, rest_NR = (_together(each, len(deltas_ND)) for each in (factors, rest))
        return [{"factors": own, "rest": other} for own, other in zip(factors_NF, rest_NR, strict=True)]

    def check(self, payload: Payload, context: CodecContext) -> None:
        low = [shape for shape in context.shapes if self._is_low(shape)]
        num_factors = sum(self.rank * (shape[0] + math.prod(shape[1:])) for shape in low)
        num_rest = context.num_parameters - sum(map(math.prod, low))
        expect(payload, factors=("float32", num_factors, None), rest=("float32", num_rest, None))

    def decompress(self, payloads: Sequence[Payload], context: CodecContext) -> Float32:
        factors_NF, rest_NR = (torch.from_numpy(numbers(payloads, name)) for name in ("factors", "rest"))
        deltas_ND = np.empty((len(payloads), context.num_parameters), np.float32)
        for part, shape in zip(_parts(torch.from_numpy(deltas_ND), context), context.shapes, strict=True):
            if not self._is_low(shape):
                own, rest_NR = rest_NR[:, : part.shape[1]], rest_NR[:, part.shape[1] :]
                part.copy_(own)
                continue
            rows, columns = shape[0], math.prod(shape[1:])
            left, right, factors_NF = factors_NF.split_with_sizes(
                [rows * self.rank, columns * self.rank, factors_NF.shape[1] - (rows + columns) * self.rank], dim=1
            )
            product = left.reshape(-1, rows, self.rank) @ right.reshape(-1, columns, self.rank).mT
            part.copy_(product.flatten(1))
        return deltas_ND

    def _is_low(self, shape: Sequence[int]) -> bool:
        columns = math.prod(shape[1:])
        return len(shape) > 1 and self.rank * (shape[0] + columns) < shape[0] * columns


def _parts(deltas: torch.Tensor, context: CodecContext) -> Sequence[torch.Tensor]:
    return deltas.split_with_sizes([math.prod(shape) for shape in context.shapes], dim=1)


def _together(parts: Sequence[torch.Tensor], num_rows: int) -> Float32:
    found: Float32 = (torch.cat(list(parts), 1) if parts else torch.empty(num_rows, 0)).numpy()
    return found


def _orthonormal(matrices: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns that span those of each matrix; zeros where there are none."""
    found: torch.Tensor = torch.linalg.qr(matrices)[0]
    return found
