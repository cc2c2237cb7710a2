"""What FedAdagrad, FedAdam and FedYogi share.

Reddi et al. 2021, "Adaptive federated optimization", algorithm 2 (https://arxiv.org/abs/2003.00295).
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
from pydantic import Field

from fedrounds.fl_components.arrays import Float32, Float64, Tensors
from fedrounds.fl_components.server_optimizers.base import ServerOptimizerRule, as_state


class AdaptiveRule(ServerOptimizerRule):
    """m <- beta1 m + (1 - beta1) g;  v <- as the rule says;  x <- x - learning_rate m / (sqrt(v) + tau).

    As in the paper there is no bias correction, and v starts at tau^2 (the paper asks for v_{-1} >= tau^2).
    """

    learning_rate: float = Field(default=0.01, gt=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    tau: float = Field(default=1e-3, gt=0, description="the smaller, the more adaptive")

    @abstractmethod
    def second_moment(self, v_D: Float64, square_D: Float64) -> Float64:
        """The new v from the old one and g^2."""

    def init(self, num_parameters: int) -> Tensors:
        return {
            "m": np.zeros(num_parameters, np.float32),
            "v": np.full(num_parameters, self.tau**2, np.float32),
        }

    def update(self, params_D: Float32, pseudo_gradient_D: Float64, state: Tensors) -> tuple[Float32, Tensors]:
        m_D = self.beta1 * state["m"].astype(np.float64) + (1 - self.beta1) * pseudo_gradient_D
        with np.errstate(over="ignore", invalid="ignore"):  # `as_state` refuses it
            v_D = self.second_moment(state["v"].astype(np.float64), pseudo_gradient_D**2)
        step_D = self.learning_rate * m_D / (np.sqrt(v_D) + self.tau)
        return (params_D - step_D).astype(np.float32), as_state(self, {"m": m_D, "v": v_D})
