"""A step of local training, once the gradients of the loss are known: the same for one client and for many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedrounds.fl_components.training.objectives import LossAlone

if TYPE_CHECKING:
    from fedrounds.fl_components.training.sgd import SGD


def is_vanilla(rule: SGD) -> bool:
    """Return whether a step is w -= learning_rate * gradient and nothing else."""
    return (
        isinstance(rule.objective, LossAlone)
        and not (rule.momentum or rule.weight_decay)
        and rule.max_gradient_norm is None
    )


def regularise(
    rule: SGD,
    gradients: Sequence[Tensor],
    params: Sequence[Tensor],
    start: Sequence[Tensor],
    corrections: Sequence[Tensor] | None = None,
) -> None:
    """Turn the gradients of the loss, in place, into those that a step follows.

    The objective's term is added, each client's gradient is scaled down to `max_gradient_norm`, and weight decay is
    added.

    Args:
      gradients, params: of each parameter, for C clients, float32 [C, *shape].
      start: as the round began, float32 [*shape] each.
      corrections: of an objective with channels, float32 [C, *shape] each.
    """
    for index, (gradient, parameter, first) in enumerate(zip(gradients, params, start, strict=True)):
        correction = None if corrections is None else corrections[index]
        rule.objective.add_gradient(gradient, parameter, first, correction)
    if rule.max_gradient_norm is not None:
        norms = torch.stack([torch.linalg.vector_norm(each.flatten(1), dim=1) for each in gradients]).norm(dim=0)
        scales = (rule.max_gradient_norm / norms).clamp_(max=1.0)
        for gradient in gradients:
            gradient.mul_(scales.view(-1, *(1,) * (gradient.ndim - 1)))
    if rule.weight_decay:
        for gradient, each in zip(gradients, params, strict=True):
            gradient.add_(each, alpha=rule.weight_decay)


def descend(rule: SGD, gradients: Sequence[Tensor], params: Sequence[Tensor], velocities: Sequence[Tensor]) -> None:
    """Move the parameters, in place: momentum where there are velocities, which move too, then the step."""
    for index, (gradient, each) in enumerate(zip(gradients, params, strict=True)):
        if velocities:
            gradient = velocities[index].mul_(rule.momentum).add_(gradient)
        each.sub_(gradient, alpha=rule.learning_rate)
