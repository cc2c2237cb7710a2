"""FedAdam: Reddi et al. 2021, "Adaptive federated optimization", algorithm 2 (https://arxiv.org/abs/2003.00295)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedrounds.fl_components.arrays import Float64
from fedrounds.fl_components.server_optimizers.adaptive import AdaptiveRule


class FedAdam(AdaptiveRule):
    """v <- beta2 v + (1 - beta2) g^2; the rest is `AdaptiveRule`'s.

    >>> import numpy as np
    >>> rule = FedAdam(learning_rate=0.1, beta1=0.0, beta2=0.0, tau=0.1)
    >>> rule.update(np.zeros(1, np.float32), np.array([0.9]), rule.init(1))[0]  # -0.1 * 0.9 / (0.9 + 0.1)
    array([-0.09], dtype=float32)
    """

    kind: Literal["fedadam"] = "fedadam"
    beta2: float = Field(default=0.99, ge=0, lt=1)

    def second_moment(self, v_D: Float64, square_D: Float64) -> Float64:
        return self.beta2 * v_D + (1 - self.beta2) * square_D
