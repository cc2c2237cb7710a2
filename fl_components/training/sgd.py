"""Local stochastic gradient descent with momentum: `ClientUpdate` of McMahan et al. 2017
(https://arxiv.org/abs/1602.05629)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator

from fl_components.parameters import flatten, load_into
from fl_components.rules import Rule
from fl_components.training.loss import mean_loss, num_labels
from fl_components.values import Float32, Weighted


class SGD(Rule):
    """`epochs` passes over the client's examples, or `steps` mini-batches; momentum starts at zero in every round.

    Examples are reshuffled for each pass; the last batch of a pass may be smaller. The loss is the mean cross-entropy.
    """

    kind: Literal["sgd"] = "sgd"
    learning_rate: float = Field(gt=0)
    momentum: float = Field(default=0.0, ge=0, lt=1)
    batch_size: int | None = Field(default=32, ge=1, description="null takes all of a client's examples as one batch")
    epochs: int | None = Field(default=None, ge=1)
    steps: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _epochs_or_steps(self) -> SGD:
        if (self.epochs is None) == (self.steps is None):
            found = "neither is given" if self.epochs is None else "both are given"
            raise ValueError(
                f"training.epochs and training.steps: {found}; give one of them, how long a client trains in a round"
            )
        return self

    def in_round(self, round: int, rounds: int) -> SGD:
        """What a client does in round `round` of `rounds`: a schedule, where there is one, is resolved."""
        return self

    def batches(self, num_examples: int, generator: np.random.Generator) -> Iterator[NDArray[np.int64]]:
        """The rows of each local step's batch, in order."""
        batch_size = min(self.batch_size or num_examples, num_examples)
        per_epoch = -(-num_examples // batch_size)
        remaining = self.steps if self.steps is not None else (self.epochs or 0) * per_epoch
        while remaining > 0:
            order = generator.permutation(num_examples)
            for start in range(0, num_examples, batch_size)[:remaining]:
                yield order[start : start + batch_size]
            remaining -= per_epoch

    def train(
        self, module: torch.nn.Module, params_D: Float32, x: NDArray[Any], y: NDArray[np.int64], seed: int
    ) -> tuple[Float32, Weighted]:
        """One client's update (w_local - w_global, float32 [D]) and the loss over the labels that it stepped through.

        `module` is a scratch pad: its parameters are overwritten. `seed` decides the batches, and what the module
        itself draws (dropout).
        """
        load_into(module, params_D)
        module.train()
        inputs, labels = torch.from_numpy(x), torch.from_numpy(y)
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        velocities = [torch.zeros_like(parameter) for parameter in parameters]
        loss_sum, loss_examples = 0.0, 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed % 2**63)
            for rows in self.batches(len(y), np.random.Generator(np.random.Philox(key=seed))):
                batch = torch.from_numpy(rows)
                loss = mean_loss(module(inputs[batch]), labels[batch])
                gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)  # zeros where one is unused
                with torch.no_grad():
                    for parameter, velocity, gradient in zip(parameters, velocities, gradients, strict=True):
                        velocity.mul_(self.momentum).add_(gradient)
                        parameter.sub_(velocity, alpha=self.learning_rate)
                counted = num_labels(labels[batch])
                loss_sum += loss.item() * counted
                loss_examples += counted
        return flatten(module) - params_D, Weighted(loss_sum, loss_examples)
