"""FedYogi: Reddi et al. 2021, "Adaptive federated optimization", algorithm 2 (https://arxiv.org/abs/2003.00295)."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from fedrounds.fl_components.arrays import Float64
from fedrounds.fl_components.server_optimizers.adaptive import AdaptiveRule


class FedYogi(AdaptiveRule):
    """v <- v - (1 - beta2) g^2 sign(v - g^2); the rest is `AdaptiveRule`'s. v changes by no more than g^2 says.

    >>> rule = FedYogi(learning_rate=0.1, beta1=0.0, beta2=0.19, tau=0.1)  # v = 0.01 + 0.81 * 1 = 0.82 after g = 1
    >>> rule.update(np.zeros(1, np.float32), np.array([1.0]), rule.init(1))[1]["v"]
    array([0.82], dtype=float32)
    """

    kind: Literal["fedyogi"] = "fedyogi"
    beta2: float = Field(default=0.99, ge=0, lt=1)

    def second_moment(self, v_D: Float64, square_D: Float64) -> Float64:
        return v_D - (1 - self.beta2) * square_D * np.sign(v_D - square_D)
