"""What every server optimiser does: optax's `init` / `update`, with the state passed and never hidden."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from fedrounds.fl_components.arrays import Float32, Float64, Tensors
from fedrounds.fl_components.errors import Diverged
from fedrounds.fl_components.rules import Rule


class ServerOptimizerRule(Rule):
    """One step of the server: parameters and the pseudo-gradient to new parameters."""

    @abstractmethod
    def init(self, num_parameters: int) -> Tensors:
        """The state before the first round: named float32 tensors of length D."""

    @abstractmethod
    def update(self, params_D: Float32, pseudo_gradient_D: Float64, state: Tensors) -> tuple[Float32, Tensors]:
        """New parameters and new state. `pseudo_gradient_D` is minus the aggregated update (float64 [D]).

        Raises `Diverged` when the new state is not finite (`as_state`).
        """


def as_state(rule: ServerOptimizerRule, tensors: dict[str, Float64]) -> Tensors:
    """`tensors` (float64 [D]) as float32, which is how state is kept.

    Raises `Diverged` when one of them is not finite then: with an infinite second moment a parameter never moves
    again, and with an infinite momentum the next round's parameters are infinite.

    >>> from fedrounds.fl_components.server_optimizers import FedAvgM
    >>> as_state(FedAvgM(), {"v": np.array([1.5, -2.0])})
    {'v': array([ 1.5, -2. ], dtype=float32)}
    >>> as_state(FedAvgM(), {"v": np.array([1.5, 1e39])})
    Traceback (most recent call last):
    fedrounds.fl_components.errors.Diverged: server_optimizer.kind fedavgm: state v exceeds float32 for ...
    """
    with np.errstate(over="ignore"):
        state = {name: tensor_D.astype(np.float32) for name, tensor_D in tensors.items()}
    for name, kept_D in state.items():
        if not np.isfinite(kept_D).all():
            kind = getattr(rule, "kind", type(rule).__name__)
            raise Diverged(
                f"server_optimizer.kind {kind}: state {name} exceeds float32 for "
                f"{np.count_nonzero(~np.isfinite(kept_D))} of {len(kept_D)} parameters",
                hint="the aggregated update is too large: begin another run with a lower training.learning_rate or "
                "admission.max_update_norm, or under a claim with more clients or less noise",
            )
    return state
