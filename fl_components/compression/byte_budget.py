"""A number of bytes, spent where it does most good."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedrounds.fl_components.arrays import Float32, Payload, Symbols
from fedrounds.fl_components.compression.base import CodecContext, CompressionRule, expect, num_buckets, symbols_of
from fedrounds.fl_components.compression.eden import CENTROIDS, LOST, levels_of, quantised
from fedrounds.fl_components.compression.rotation import block_of, rotate, rotate_back
from fedrounds.fl_components.errors import UpdateRejected
from fedrounds.fl_components.rejections import Rejection, RejectionCode

BLOCK: Final = 512
MAX_BITS: Final = max(CENTROIDS)
COUNT_BITS, SCALE_BITS = 3, 32


class ByteBudget(CompressionRule):
    """EDEN in blocks of 512 numbers, each with 0 to 4 bits a number: as many as its share of the error is worth, until
    the bytes are spent. Taking the bit that saves most of the error, again and again, is optimal, since each further
    bit of a block saves less than the one before (Fox 1966, "Discrete optimization via marginal analysis"; for
    quantisers Shoham and Gersho 1988, "Efficient bit allocation for an arbitrary set of quantizers").

    With error feedback a block may get no bits, and the scale is the one with the least error. Without, each block that
    is not zero gets one bit at least, so that all stays unbiased: that takes 1.07 bits a parameter.

    Which block has how many bits is part of what travels. It tells of the client's update what the update tells itself;
    under a claim about clients the server clips and adds noise to what it decoded.
    """

    kind: Literal["byte_budget"] = "byte_budget"
    update_bytes: int = Field(ge=64, description="of what stands for one update, at most; the frame adds about 400")

    @property
    def unbiased(self) -> bool:
        return not self.error_feedback

    def error_bound(self, num_values: int) -> float:
        """With error feedback the block with the largest norm, at least 1/K of the squared norm of K, has one bit."""
        blocks = num_buckets(num_values, _block(num_values))
        lost = 1.05 * LOST[self.unbiased][1]
        return lost if self.unbiased else 1 - (1 - lost) / blocks

    def check_size(self, num_parameters: int, field: str = "compression") -> None:
        super().check_size(num_parameters, field)
        least = -(-self._fixed_bits(num_parameters) // 8)
        if self.update_bytes < least:
            raise ValueError(
                f"{field}.update_bytes is {self.update_bytes}, and an update of {num_parameters} parameters takes "
                f"{least} at the least; give more{'' if self.error_feedback else ', or use error_feedback'}"
            )

    def _fixed_bits(self, num_parameters: int) -> int:
        """What every update takes at the least, in the worst case.

        One bit for each number of each block; with error feedback of one block, since nothing that is kept would ever
        travel otherwise.
        """
        blocks, block = num_buckets(num_parameters, _block(num_parameters)), _block(num_parameters)
        return COUNT_BITS * blocks + (SCALE_BITS + block) * (1 if self.error_feedback else blocks)

    def compress(self, deltas_ND: Float32, context: CodecContext) -> list[Payload]:
        rotated_NKB = rotate(deltas_ND, _block(deltas_ND.shape[1]), context)
        bits_NK = self._bits(rotated_NKB)
        scales_NK = np.zeros(bits_NK.shape, np.float32)
        payloads: list[dict[str, Symbols | Float32]] = [{"bits": Symbols(bits_K, COUNT_BITS)} for bits_K in bits_NK]
        for bits in range(1, MAX_BITS + 1):
            chosen_NK = bits_NK == bits
            symbols_1KB, scales_1K = quantised(rotated_NKB[chosen_NK][None], bits, unbiased=self.unbiased)
            scales_NK[chosen_NK] = scales_1K[0]
            for payload, own_KB in zip(
                payloads, np.split(symbols_1KB[0], np.cumsum(chosen_NK.sum(1))[:-1]), strict=True
            ):
                if len(own_KB):
                    payload[_name(bits)] = Symbols(own_KB.ravel(), bits)
        for payload, bits_K, scales_K in zip(payloads, bits_NK, scales_NK, strict=True):
            payload["scales"] = scales_K[bits_K > 0]
        return [*payloads]

    def _bits(self, rotated_NKB: Float32) -> NDArray[np.uint8]:
        """Of each block, uint8 [N, K]."""
        num_rows, blocks, block = rotated_NKB.shape
        with np.errstate(over="ignore"):
            squares_NK = np.einsum("nkb,nkb->nk", rotated_NKB, rotated_NKB, dtype=np.float64)
        squares_NK = np.nan_to_num(squares_NK, nan=np.inf)  # what is not finite must travel, or nobody would see it
        lost = np.array(LOST[self.unbiased])
        saved_NKb = np.minimum(squares_NK, 1e300)[..., None] * (lost[:-1] - lost[1:])
        cost_b = np.full(MAX_BITS, block)
        cost_b[0] += SCALE_BITS
        worth_NKb = saved_NKb / cost_b
        if self.unbiased:
            worth_NKb[..., 0] = np.where(squares_NK > 0, np.inf, 0)
        order_NA = np.argsort(-worth_NKb.reshape(num_rows, -1), axis=1, kind="stable")
        spent_NA = np.cumsum(np.tile(cost_b, blocks)[order_NA], axis=1)
        affordable = 8 * self.update_bytes - COUNT_BITS * blocks
        taken_NA = (spent_NA <= affordable) & (np.take_along_axis(worth_NKb.reshape(num_rows, -1), order_NA, 1) > 0)
        taken_NKb = np.zeros((num_rows, blocks * MAX_BITS), bool)
        np.put_along_axis(taken_NKb, order_NA, taken_NA, axis=1)
        found: NDArray[np.uint8] = taken_NKb.reshape(num_rows, blocks, MAX_BITS).sum(2, np.uint8)
        return found

    def check(self, payload: Payload, context: CodecContext) -> None:
        size = context.num_parameters
        block = _block(size)
        expect(
            {"bits": payload["bits"]} if "bits" in payload else {},
            bits=("symbols", num_buckets(size, block), COUNT_BITS),
        )
        counts = np.bincount(symbols_of(payload, "bits"), minlength=MAX_BITS + 1)
        if len(counts) > MAX_BITS + 1:
            detail = f"blocks of {len(counts) - 1} bits a number; {MAX_BITS} are the most"
            raise UpdateRejected(Rejection(RejectionCode.WRONG_SHAPE, detail))
        parts = {
            _name(bits): ("symbols", count * block, bits)
            for bits, count in enumerate(counts.tolist())
            if bits and count
        }
        expect(
            payload,
            bits=("symbols", num_buckets(size, block), COUNT_BITS),
            scales=("float32", int(counts[1:].sum()), None),
            **parts,
        )

    def decompress(self, payloads: Sequence[Payload], context: CodecContext) -> Float32:
        size = context.num_parameters
        block = _block(size)
        rotated_NKB = np.zeros((len(payloads), num_buckets(size, block), block), np.float32)
        for rotated_KB, payload in zip(rotated_NKB, payloads, strict=True):
            bits_K = symbols_of(payload, "bits")
            for bits in range(1, MAX_BITS + 1):
                part = payload.get(_name(bits))
                if isinstance(part, Symbols):
                    rotated_KB[bits_K == bits] = levels_of(bits)[part.values].reshape(-1, block)
            with np.errstate(all="ignore"):
                rotated_KB[bits_K > 0] *= np.asarray(payload["scales"])[:, None]
        return rotate_back(rotated_NKB, size, context)


def _block(num_values: int) -> int:
    return min(BLOCK, block_of(num_values))


def _name(bits: int) -> str:
    return f"symbols_{bits}"
