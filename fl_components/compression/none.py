"""No compression: the update as it is."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from fl_components.compression.base import CompressionRule
from fl_components.errors import UpdateRejected
from fl_components.values import Float32, Tensors


class NoCompression(CompressionRule):
    """Four bytes a parameter, bit for bit.

    >>> rule = NoCompression()
    >>> rule.decompress(rule.compress(np.array([1.5, -2.0], np.float32)), 2)
    array([ 1.5, -2. ], dtype=float32)
    """

    kind: Literal["none"] = "none"
    transparent: ClassVar[bool] = True

    def compress(self, delta_D: Float32) -> Tensors:
        return {"delta": delta_D}

    def decompress(self, tensors: Tensors, num_parameters: int) -> Float32:
        delta_D = tensors.get("delta")
        if delta_D is None or len(tensors) != 1:
            raise UpdateRejected(
                f"wrong_tensors: expected one tensor `delta`, got {len(tensors)}: {sorted(tensors)[:3]}"[:200]
            )
        if delta_D.dtype != np.float32 or delta_D.shape != (num_parameters,):
            raise UpdateRejected(
                f"wrong_shape: expected float32 [{num_parameters}], got {delta_D.dtype} {list(delta_D.shape)}"
            )
        return delta_D
