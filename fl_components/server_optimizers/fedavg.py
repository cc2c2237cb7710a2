"""FedAvg: McMahan et al. 2017 (https://arxiv.org/abs/1602.05629), server learning rate: Reddi et al. 2021."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from fedrounds.fl_components.arrays import Float32, Float64, Tensors
from fedrounds.fl_components.server_optimizers.base import ServerOptimizerRule


class FedAvg(ServerOptimizerRule):
    """x <- x - learning_rate * g. At a learning rate of 1 the new parameters are the mean of the clients'.

    >>> FedAvg().update(np.array([1.0], np.float32), np.array([0.25]), {})[0]
    array([0.75], dtype=float32)
    """

    kind: Literal["fedavg"] = "fedavg"
    learning_rate: float = Field(default=1.0, gt=0)

    def init(self, num_parameters: int) -> Tensors:
        return {}

    def update(self, params_D: Float32, pseudo_gradient_D: Float64, state: Tensors) -> tuple[Float32, Tensors]:
        return (params_D - self.learning_rate * pseudo_gradient_D).astype(np.float32), state
