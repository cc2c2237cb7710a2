"""FedAdagrad: Reddi et al. 2021, "Adaptive federated optimization", algorithm 2 (https://arxiv.org/abs/2003.00295)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedrounds.fl_components.arrays import Float64
from fedrounds.fl_components.server_optimizers.adaptive import AdaptiveRule


class FedAdagrad(AdaptiveRule):
    """v <- v + g^2; the rest is `AdaptiveRule`'s. The paper's experiments use no momentum with it, hence beta1 = 0.

    >>> import numpy as np
    >>> rule = FedAdagrad(learning_rate=0.1, tau=0.75)  # sqrt(0.75^2 + 1) = 1.25
    >>> rule.update(np.zeros(1, np.float32), np.array([1.0]), rule.init(1))[0]  # -0.1 / (1.25 + 0.75)
    array([-0.05], dtype=float32)
    """

    kind: Literal["fedadagrad"] = "fedadagrad"
    beta1: float = Field(default=0.0, ge=0, lt=1)

    def second_moment(self, v_D: Float64, square_D: Float64) -> Float64:
        return v_D + square_D
