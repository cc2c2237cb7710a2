"""FedAvgM: momentum at the server.

Hsu, Qi and Brown 2019, "Measuring the effects of non-identical data distribution" (https://arxiv.org/abs/1909.06335).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from fedrounds.fl_components.arrays import Float32, Float64, Tensors
from fedrounds.fl_components.server_optimizers.base import ServerOptimizerRule, as_state


class FedAvgM(ServerOptimizerRule):
    """v <- momentum v + g;  x <- x - learning_rate v.

    >>> rule = FedAvgM(momentum=0.5)
    >>> params_D, state = rule.update(np.zeros(1, np.float32), np.array([1.0]), rule.init(1))
    >>> rule.update(params_D, np.array([1.0]), state)[0]  # -1, then -(0.5 + 1)
    array([-2.5], dtype=float32)
    """

    kind: Literal["fedavgm"] = "fedavgm"
    learning_rate: float = Field(default=1.0, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)

    def init(self, num_parameters: int) -> Tensors:
        return {"v": np.zeros(num_parameters, np.float32)}

    def update(self, params_D: Float32, pseudo_gradient_D: Float64, state: Tensors) -> tuple[Float32, Tensors]:
        v_D = self.momentum * state["v"].astype(np.float64) + pseudo_gradient_D
        return (params_D - self.learning_rate * v_D).astype(np.float32), as_state(self, {"v": v_D})
