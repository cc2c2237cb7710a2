"""Objectives of local training: what a client's steps follow besides the gradient of its loss."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedrounds.fl_components.arrays import Float32, Float64
from fedrounds.fl_components.rules import Rule, union


class ObjectiveRule(Rule):
    """Base of the objectives.

    The term that an objective adds to a gradient sees neither examples nor other clients, and it is elementwise: the
    same function serves a client alone, many clients at once, and DP-SGD, where it costs no privacy.

    An objective may have `channels` besides the parameters (SCAFFOLD's control variates, for instance). Each is a
    vector [D] that the server sends with the parameters, that a client keeps from round to round (zeros at first), and
    that it sends with its update. An objective with channels overrides all methods below.
    """

    kind: str
    channels: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def add_gradient(self, gradient: Tensor, params: Tensor, start: Tensor, correction: Tensor | None) -> None:
        """Add the term to `gradient`, in place.

        Args:
          gradient, params: of one parameter of C clients, float32 [C, *shape].
          start: the same parameter as the round began with, float32 [*shape].
          correction: these coordinates of `correction`, float32 [C, *shape]; None where there are no channels.
        """

    def correction(self, received: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> Tensor:
        """Return what stays the same over a client's steps, float32 [C, D].

        Args:
          received: the channels that the server sent, float32 [D] each.
          kept: the channels that the clients keep, float32 [C, D] each.
        """
        raise NotImplementedError

    def sent(
        self, delta: Tensor, received: Mapping[str, Tensor], kept: Mapping[str, Tensor], scale: Tensor
    ) -> Mapping[str, Tensor]:
        """Return the channels that the clients send, float32 [C, D] each.

        Args:
          delta: w_local - w_global, float32 [C, D].
          received, kept: as in `correction`.
          scale: 1 / (number of steps x learning rate) of each client, float32 [C, 1]; 0 for one without a step.
        """
        raise NotImplementedError

    def next_kept(self, kept: Mapping[str, Float32], sent: Mapping[str, Float32]) -> Mapping[str, Float32]:
        """Return the channels that a client keeps after it sent these, float32 [D] each."""
        raise NotImplementedError

    def next_received(
        self, received: Mapping[str, Float32], aggregate: Mapping[str, Float64], share: float
    ) -> Mapping[str, Float32]:
        """Return the channels that the server sends in the next round, float32 [D] each.

        Args:
          received: those that it sent in this round.
          aggregate: the aggregated channels of the updates, float64 [D] each.
          share: the cohort's size over the population's.
        """
        raise NotImplementedError


class LossAlone(ObjectiveRule):
    """The loss and no term: FedAvg (McMahan et al. 2017, https://arxiv.org/abs/1602.05629)."""

    kind: Literal["loss"] = "loss"

    def add_gradient(self, gradient: Tensor, params: Tensor, start: Tensor, correction: Tensor | None) -> None:
        """Leave the gradient as it is."""


class Proximal(ObjectiveRule):
    """The loss and mu/2 |w - w_round|^2, which pulls a client back to the round's parameters.

    FedProx (Li et al. 2020, https://arxiv.org/abs/1812.06127).

    >>> import torch
    >>> gradient = torch.zeros(1, 2)
    >>> Proximal(mu=0.5).add_gradient(gradient, torch.tensor([[3.0, 1.0]]), torch.tensor([1.0, 1.0]), None)
    >>> gradient
    tensor([[1., 0.]])
    """

    kind: Literal["proximal"] = "proximal"
    mu: float = Field(gt=0)

    def add_gradient(self, gradient: Tensor, params: Tensor, start: Tensor, correction: Tensor | None) -> None:
        gradient.add_(params - start, alpha=self.mu)


class Scaffold(ObjectiveRule):
    """The loss, with gradients corrected by control variates.

    SCAFFOLD (Karimireddy et al. 2020, https://arxiv.org/abs/1910.06378, algorithm 1, option II).

    The server's control variate c and a client's c_i estimate the gradients of all clients and of this one. A step
    follows gradient - c_i + c, so clients whose data differ drift apart less. After K steps, c_i becomes c_i - c +
    (w_global - w_local) / (K learning_rate); the change is the channel `control` of the update.

    An update is twice as long as FedAvg's, and each client keeps one vector as long as the model. Corrected steps have
    no factored form, so clients train about half as fast as with the plain loss.

    >>> import torch
    >>> gradient, zeros = torch.zeros(1, 2), torch.zeros(2)
    >>> correction = Scaffold().correction({"control": torch.ones(2)}, {"control": torch.zeros(1, 2)})
    >>> Scaffold().add_gradient(gradient, zeros[None], zeros, correction)
    >>> gradient
    tensor([[1., 1.]])
    """

    kind: Literal["scaffold"] = "scaffold"
    channels: ClassVar[tuple[str, ...]] = ("control",)

    def add_gradient(self, gradient: Tensor, params: Tensor, start: Tensor, correction: Tensor | None) -> None:
        assert correction is not None
        gradient.add_(correction)

    def correction(self, received: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> Tensor:
        return received["control"] - kept["control"]

    def sent(
        self, delta: Tensor, received: Mapping[str, Tensor], kept: Mapping[str, Tensor], scale: Tensor
    ) -> Mapping[str, Tensor]:
        change = -received["control"] - delta * scale
        return {"control": torch.where(scale > 0, change, 0)}  # without a step nothing is known

    def next_kept(self, kept: Mapping[str, Float32], sent: Mapping[str, Float32]) -> Mapping[str, Float32]:
        return {"control": kept["control"] + sent["control"]}

    def next_received(
        self, received: Mapping[str, Float32], aggregate: Mapping[str, Float64], share: float
    ) -> Mapping[str, Float32]:
        return {"control": (received["control"] + share * aggregate["control"]).astype(np.float32)}


if TYPE_CHECKING:
    Objective = ObjectiveRule
else:
    Objective = union("objectives", LossAlone, Proximal, Scaffold)
