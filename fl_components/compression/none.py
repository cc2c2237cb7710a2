"""No compression: the update as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from fedrounds.fl_components.arrays import Float32, Payload
from fedrounds.fl_components.compression.base import CodecContext, Quantiser, expect, numbers


class NoCompression(Quantiser):
    """Four bytes a parameter, bit for bit.

    >>> import numpy as np
    >>> rule, context = NoCompression(), CodecContext(seeds=[0], round_seed=0, shapes=[(2,)])
    >>> rule.decompress(rule.compress(np.array([[1.5, -2.0]], np.float32), context), context)
    array([[ 1.5, -2. ]], dtype=float32)
    """

    kind: Literal["none"] = "none"
    is_identity: ClassVar[bool] = True

    @property
    def unbiased(self) -> bool:
        return True

    def error_bound(self, num_values: int) -> float:
        return 0.0

    def compress(self, deltas_ND: Float32, context: CodecContext) -> list[Payload]:
        return [{"values": delta_D} for delta_D in deltas_ND]

    def check(self, payload: Payload, context: CodecContext) -> None:
        expect(payload, values=("float32", context.num_parameters, None))

    def decompress(self, payloads: Sequence[Payload], context: CodecContext) -> Float32:
        return numbers(payloads, "values")
