"""What every server optimiser does: optax's `init` / `update`, with the state passed and never hidden."""

from __future__ import annotations

from abc import abstractmethod

from fl_components.rules import Rule
from fl_components.values import Float32, Float64, Tensors


class ServerOptimizerRule(Rule):
    """One step of the server: parameters and the pseudo-gradient to new parameters."""

    @abstractmethod
    def init(self, num_parameters: int) -> Tensors:
        """The state before the first round: named float32 tensors of length D."""

    @abstractmethod
    def update(self, params_D: Float32, pseudo_gradient_D: Float64, state: Tensors) -> tuple[Float32, Tensors]:
        """New parameters and new state. `pseudo_gradient_D` is minus the aggregated update (float64 [D])."""
