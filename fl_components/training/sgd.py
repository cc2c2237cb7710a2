"""Local stochastic gradient descent with momentum.

`ClientUpdate` of McMahan et al. 2017 (https://arxiv.org/abs/1602.05629).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator

from fedrounds.fl_components import randomness
from fedrounds.fl_components.arrays import Float32
from fedrounds.fl_components.models import Watch
from fedrounds.fl_components.parameters import load_into
from fedrounds.fl_components.privacy import ExampleLevel, ExamplePrivacy, NoPrivacy
from fedrounds.fl_components.privacy.clipping import squared_norms
from fedrounds.fl_components.privacy.steps import PIECE_ROWS, Mechanism, counts, private_batches
from fedrounds.fl_components.rules import Rule
from fedrounds.fl_components.task import Classification, LearningTask
from fedrounds.fl_components.training.channels import ClientChannels
from fedrounds.fl_components.training.objectives import LossAlone, Objective
from fedrounds.fl_components.training.schedules import Constant, Schedule
from fedrounds.fl_components.training.step import descend, regularise
from fedrounds.fl_components.values import Weighted


def torch_seed(seed: int) -> int:
    """The seed of what a client's module draws (dropout), from the client's seed."""
    return seed % 2**63


def seed_torch(seed: int) -> None:
    """Seed what modules draw from, on the CPU and on CUDA where it is in use.

    `torch.manual_seed` does so for each kind of device that it knows, and writes a traceback for each that is not in
    use: 0.2 to 1.5 ms a call, by the depth of the stack, where this takes 2 us.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)


def example_seed(seed: int, step: int, place: int) -> int:
    """The seed of what a client's module draws for one example of a batch, where each is trained on by itself."""
    return torch_seed(randomness.derive_key(seed, step, "example", str(place)))


ClippedSum = Callable[[torch.Tensor, torch.Tensor, Sequence[int]], tuple[list[torch.Tensor], torch.Tensor]]
"""From a piece of a batch (examples and targets [B, ...], and the seed of each example's draws) to the sum of the
examples' clipped gradients in units, float32, one tensor for each parameter; and each one's mean loss [B]."""


class SGD(Rule):
    """`epochs` passes over the client's examples, or `steps` mini-batches; momentum starts at zero in every round.

    Examples are reshuffled for each pass; the last batch of a pass may be smaller. The loss is that of the learning
    task.
    A step is, in this order: the gradient of the (smoothed) loss, plus that of the objective's term, scaled down to
    `max_gradient_norm` where it is longer; plus `weight_decay` w; momentum; the step. That is torch.optim.SGD after
    clip_grad_norm_ of the objective's gradient.

    With `privacy: example_level` the gradient is what is released of a step (privacy/steps.py): the gradients of the
    examples of a batch that coins drew, each clipped by itself, added up, with noise, over the batch's expected size.
    An example's loss is the mean over its own targets that count. What follows is as above.
    """

    kind: Literal["sgd"] = "sgd"
    learning_rate: float = Field(gt=0)
    schedule: Schedule = Constant()
    momentum: float = Field(default=0.0, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    max_gradient_norm: float | None = Field(default=None, gt=0, description="null does not clip")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    objective: Objective = LossAlone()
    batch_size: int | None = Field(default=32, ge=1, description="null takes all of a client's examples as one batch")
    epochs: int | None = Field(default=None, ge=1)
    steps: int | None = Field(default=None, ge=1)
    privacy: ExamplePrivacy = NoPrivacy()

    @model_validator(mode="after")
    def _epochs_or_steps(self) -> SGD:
        if (self.epochs is None) == (self.steps is None):
            found = "neither is given" if self.epochs is None else "both are given"
            raise ValueError(
                f"training.epochs and training.steps: {found}; give one of them, how long a client trains in a round"
            )
        return self

    @model_validator(mode="after")
    def _control_variates_are_of_plain_steps(self) -> SGD:
        if self.objective.channels and self.momentum:
            raise ValueError(
                f"training.objective.kind is {self.objective.kind} and training.momentum is {self.momentum:g}: control "
                "variates are differences of parameters over the learning rate, which momentum multiplies; leave "
                "training.momentum out"
            )
        return self

    @model_validator(mode="after")
    def _private_batches_are_drawn(self) -> SGD:
        names = ("batch_size", "max_gradient_norm")
        given = [name for name in names if getattr(self, name) != type(self).model_fields[name].default]
        if self.privacy.claims and given:
            instead = {
                "batch_size": "training.privacy.sampling_rate says how large batches are",
                "max_gradient_norm": "training.privacy.max_grad_norm clips the gradient of each example",
            }
            name = given[0]
            raise ValueError(
                f"training.privacy.kind is {self.privacy.kind} and training.{name} is {getattr(self, name)}: "
                f"{instead[name]}; leave training.{name} out"
            )
        return self

    @property
    def example_level(self) -> ExampleLevel | None:
        """What is promised about each example, where something is."""
        return self.privacy if isinstance(self.privacy, ExampleLevel) else None

    def resolve(self, round: int, rounds: int) -> SGD:
        """What a client does in round `round` of `rounds`.

        The schedule is resolved into the learning rate, and a target epsilon into a noise multiplier.
        """
        changes: dict[str, Any] = {}
        factor = self.schedule.factor(round, rounds)
        if factor != 1:
            changes |= {"learning_rate": self.learning_rate * factor, "schedule": Constant()}
        if self.example_level is not None:
            changes["privacy"] = self.resolved_privacy(rounds)
        return self.model_copy(update=changes) if changes else self

    def resolved_privacy(self, rounds: int) -> ExampleLevel:
        """What is promised about each example in a run of so many rounds, its noise multiplier found where a target
        epsilon is given: what training adds and what is charged. Raises `ConfigError` when no noise is enough."""
        private = self.example_level
        assert private is not None
        if private.noise_multiplier is not None:
            return private
        noise = private.noise(rounds * self.private_steps)
        return private.model_copy(update={"noise_multiplier": noise, "target_epsilon": None})

    @property
    def private_steps(self) -> int:
        """The steps of a client's round under an example-level claim, whatever it holds.

        One that stops early has paid for all of them.
        """
        assert self.example_level is not None
        return self.steps or self.example_level.steps(self.epochs or 1)

    def num_samples_processed(self, num_examples: int) -> int:
        """How many examples a client with so many steps through, each pass counted.

        Under an example-level claim the expected number.
        """
        if self.example_level is not None:
            return round(self.private_steps * self.example_level.sampling_rate * num_examples)
        if self.steps is not None:
            return self.steps * min(self.batch_size or num_examples, num_examples)
        return (self.epochs or 0) * num_examples

    @property
    def num_units(self) -> int:
        """How many epochs, or steps, a client's round has."""
        return self.epochs or self.steps or 0

    def batches(
        self, num_examples: int, generator: np.random.Generator, work: int | None = None
    ) -> Iterator[NDArray[np.int64]]:
        """The rows of each local step's batch, in order; `work` replaces `epochs` or `steps`."""
        batch_size = min(self.batch_size or num_examples, num_examples)
        per_epoch = -(-num_examples // batch_size)
        work = work or self.steps or self.epochs or 0
        remaining = work if self.steps is not None else work * per_epoch
        while remaining > 0:
            order = generator.permutation(num_examples)
            for start in range(0, num_examples, batch_size)[:remaining]:
                yield order[start : start + batch_size]
            remaining -= per_epoch

    def steps_of(self, num_examples: int, seed: int, work: int | None = None) -> list[NDArray[np.int64]]:
        """The rows of the batch of each step that the client with this seed makes; `work` as in `ClientTask`."""
        return list(self.batches(num_examples, np.random.Generator(np.random.Philox(key=seed)), work))

    def private_batches_of(
        self, num_examples: int, key: bytes | None, work: int | None = None
    ) -> list[NDArray[np.int64]]:
        """The same under an example-level claim: drawn from the client's key."""
        private = self.example_level
        if private is None or key is None:
            raise ValueError("a client that makes a claim about its examples draws its batches from a key of its own")
        steps = self.private_steps
        if work is not None:
            steps = work if self.steps is not None else private.steps(work)
        return private_batches(private, key, num_examples, steps)

    def train(
        self,
        module: torch.nn.Module,
        base_M: Float32,
        x: NDArray[Any] | torch.Tensor,
        y: NDArray[Any] | torch.Tensor,
        seed: int,
        key: bytes | None = None,
        clipped_sum: ClippedSum | None = None,
        work: int | None = None,
        kept: Mapping[str, Float32] | None = None,
        learning_task: LearningTask | None = None,
    ) -> tuple[Float32, Weighted]:
        """Return one client's update, float32 [M], and the loss over the targets that it stepped through.

        The update is w_local - w_global [D], followed by the channels of the objective. `base_M` is what the server
        sent: the parameters and the same channels. `kept` are the channels that the client keeps.

        The update is the sum of the steps: parameters are moved here, each step reads them from a copy in `module`, and
        what the module writes to them never reaches the update. `module` is a scratch pad: its parameters are
        overwritten. `seed` decides the batches, and what the module itself draws (dropout); `work` as in `ClientTask`.
        Under an example-level claim batches and noise are drawn from `key`, the client's own secret of the round;
        `clipped_sum` replaces one example after the other. `learning_task` gives the loss, by default that of
        classification. Raises `ModelError` where the module changes itself as it runs (`Watch`).
        """
        params_D = base_M[: len(base_M) // (1 + len(self.objective.channels))]
        load_into(module, params_D)
        module.train()
        learning_task = learning_task or Classification()
        inputs, targets = torch.as_tensor(x), torch.as_tensor(y)
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        start = [parameter.detach().clone() for parameter in parameters]
        values = [value.clone()[None] for value in start]  # of one client, as `step` has them of many
        velocities = [torch.zeros_like(value) for value in values] if self.momentum else []
        channels, corrections = None, None
        if self.objective.channels:
            channels = ClientChannels(self.objective, torch.from_numpy(base_M).to(start[0].device), [kept or {}])
            corrections = channels.corrections([each.shape for each in start])
        watch = Watch(module, parameters) if clipped_sum is None else None
        loss, num_steps = Weighted(), 0
        with torch.random.fork_rng(devices=[]):
            seed_torch(torch_seed(seed))
            if self.example_level is None:
                steps = self._gradients(learning_task, module, parameters, inputs, targets, seed, work)
            else:
                clipped_sum = clipped_sum or PerExampleLoop(
                    learning_task, module, parameters, self._mechanism(parameters), self.label_smoothing, watch
                )
                steps = self._private_gradients(
                    learning_task, parameters, inputs, targets, seed, key, work, clipped_sum
                )
            for gradients, loss_of_step in steps:
                if watch is not None:
                    watch.check()
                with torch.no_grad():
                    followed = [gradient.clone()[None] for gradient in gradients]
                    regularise(self, followed, values, start, corrections)
                    descend(self, followed, values, velocities)
                    for parameter, value in zip(parameters, values, strict=True):
                        parameter.copy_(value[0])
                if watch is not None:
                    watch.renew()
                loss, num_steps = loss + loss_of_step, num_steps + 1
        delta_D: Float32 = np.concatenate([value.cpu().numpy().ravel() for value in values]) - params_D
        if channels is None:
            return delta_D, loss
        sent = channels.sent(torch.from_numpy(delta_D[None]).to(start[0].device), [num_steps], self.learning_rate)
        return np.concatenate([delta_D, *(channel.cpu().numpy()[0] for channel in sent)]), loss

    def _gradients(
        self,
        task: LearningTask,
        module: torch.nn.Module,
        parameters: list[torch.nn.Parameter],
        inputs: torch.Tensor,
        targets: torch.Tensor,
        seed: int,
        work: int | None,
    ) -> Iterator[tuple[tuple[torch.Tensor, ...], Weighted]]:
        """Of each step: the gradient of the mean loss, and the loss."""
        for rows in self.steps_of(len(targets), seed, work):
            batch = torch.from_numpy(rows)
            loss = task.loss(module(inputs[batch]), targets[batch], "mean", self.label_smoothing)
            gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)  # zeros where one is unused
            counted = task.targets.num_counted(targets[batch])
            yield gradients, Weighted(loss.item() * counted, counted)

    def _mechanism(self, parameters: Sequence[torch.Tensor]) -> Mechanism:
        """What clips and adds noise, of a model with these parameters."""
        assert self.example_level is not None
        return Mechanism.of(self.example_level, sum(parameter.numel() for parameter in parameters))

    def _private_gradients(
        self,
        task: LearningTask,
        parameters: list[torch.nn.Parameter],
        inputs: torch.Tensor,
        targets: torch.Tensor,
        seed: int,
        key: bytes | None,
        work: int | None,
        clipped_sum: ClippedSum,
    ) -> Iterator[tuple[tuple[torch.Tensor, ...], Weighted]]:
        """Of each step: what is released of the examples' gradients, and the loss, which is not released."""
        batches, private = self.private_batches_of(len(targets), key, work), self.example_level
        assert private is not None and key is not None
        mechanism = self._mechanism(parameters)
        noise, scale = mechanism.noise(key), mechanism.per_example(private.sampling_rate, len(targets))
        for step, rows in enumerate(batches):
            loss = Weighted()
            whole = [torch.zeros(each.shape, dtype=torch.float64, device=each.device) for each in parameters]
            for first in range(0, len(rows), PIECE_ROWS):
                piece = torch.from_numpy(rows[first : first + PIECE_ROWS])
                seeds = [example_seed(seed, step, place) for place in range(first, first + len(piece))]
                sums, losses = clipped_sum(inputs[piece], targets[piece], seeds)
                for total, part in zip(whole, sums, strict=True):
                    total += part.round()
                counted = task.targets.num_counted_by_row(targets[piece]).to(losses)
                loss += Weighted(float(losses @ counted), float(counted.sum()))
            gradients = tuple(torch.empty(each.shape, device=each.device) for each in parameters)
            flat, flat_whole = ([each.view(-1) for each in tensors] for tensors in (gradients, whole))
            mechanism.release(flat_whole, noise, flat, scale, fresh=True)
            yield gradients, loss


class PerExampleLoop:
    """A `ClippedSum` as it is defined: the gradient of one example after the other.

    After each, the `watch` compares the module with what it was: nothing of one example may reach the next gradient.
    """

    def __init__(
        self,
        task: LearningTask,
        module: torch.nn.Module,
        parameters: list[torch.nn.Parameter],
        mechanism: Mechanism,
        label_smoothing: float,
        watch: Watch | None = None,
    ) -> None:
        self._task, self._module, self._parameters, self._watch = task, module, parameters, watch
        self._mechanism, self._label_smoothing = mechanism, label_smoothing

    def __call__(
        self, inputs: torch.Tensor, targets: torch.Tensor, seeds: Sequence[int]
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        sums, losses = [torch.zeros_like(each) for each in self._parameters], torch.zeros(len(seeds))
        for place, seed in enumerate(seeds):
            seed_torch(seed)
            x, y = inputs[place : place + 1].clone(), targets[place : place + 1]
            loss = self._task.loss(self._module(x), y, "sum", self._label_smoothing)
            loss = loss / max(self._task.targets.num_counted(y), 1)
            gradients = torch.autograd.grad(loss, self._parameters, materialize_grads=True)
            squares = torch.stack([squared_norms(each.reshape(1, -1)) for each in gradients]).sum(0)
            if counts(squares):
                for total, gradient in zip(sums, gradients, strict=True):
                    total.add_(gradient, alpha=float(self._mechanism.factors(squares)))
            losses[place] = loss.detach()
            if self._watch is not None:
                self._watch.check()
        return sums, losses
