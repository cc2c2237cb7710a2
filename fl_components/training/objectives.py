"""Objectives of local training: a client minimises its loss and a term that depends on its parameters alone."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Literal

from pydantic import Field
from torch import Tensor

from fedrounds.fl_components.rules import Rule, union


class ObjectiveRule(Rule):
    """Base of the objectives.

    A term sees neither examples nor other clients, and its gradient is elementwise: the same function serves a client
    alone, many clients at once, and DP-SGD, where it costs no privacy.
    """

    kind: str

    @abstractmethod
    def add_gradient(self, gradient: Tensor, params: Tensor, start: Tensor) -> None:
        """Add the gradient of the term to `gradient`, in place.

        Args:
          gradient, params: of one parameter of C clients, float32 [C, *shape].
          start: the same parameter as the round began with, float32 [*shape].
        """


class LossAlone(ObjectiveRule):
    """The loss and no term: FedAvg (McMahan et al. 2017, https://arxiv.org/abs/1602.05629)."""

    kind: Literal["loss"] = "loss"

    def add_gradient(self, gradient: Tensor, params: Tensor, start: Tensor) -> None:
        """Leave the gradient as it is."""


class Proximal(ObjectiveRule):
    """The loss and mu/2 |w - w_round|^2, which pulls a client back to the round's parameters: FedProx (Li et al. 2020,
    https://arxiv.org/abs/1812.06127).

    >>> import torch
    >>> gradient = torch.zeros(1, 2)
    >>> Proximal(mu=0.5).add_gradient(gradient, torch.tensor([[3.0, 1.0]]), torch.tensor([1.0, 1.0]))
    >>> gradient
    tensor([[1., 0.]])
    """

    kind: Literal["proximal"] = "proximal"
    mu: float = Field(gt=0)

    def add_gradient(self, gradient: Tensor, params: Tensor, start: Tensor) -> None:
        gradient.add_(params - start, alpha=self.mu)


if TYPE_CHECKING:
    Objective = ObjectiveRule
else:
    Objective = union("objectives", LossAlone, Proximal)
