"""The gradients of single examples for models that the faster ways cannot take, one client after the other.

As Opacus (https://opacus.ai) computes them, or one example at a time.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar, TypeGuard

import torch
from torch import Tensor, nn

from fedrounds.fl_components.arrays import Float32
from fedrounds.fl_components.errors import ConfigError
from fedrounds.fl_components.models import meeting_place
from fedrounds.fl_components.privacy.clipping import squared_norms
from fedrounds.fl_components.privacy.steps import Mechanism, counts
from fedrounds.fl_components.task import LearningTask
from fedrounds.fl_components.training.layers import Batch, ClientDropout, CurrentBatch, UnsupportedLayer
from fedrounds.fl_components.training.per_example import FORMED_FLOATS
from fedrounds.fl_components.training.sgd import SGD, ClippedSum
from fedrounds.fl_components.values import SimulatedClient, Weighted


def import_opacus() -> Any:
    """The package. Raises `ConfigError` where it is not installed."""
    try:
        import opacus.validators
    except ImportError as error:
        raise ConfigError(
            "training.privacy is example_level: finding the gradients of this model's examples needs Opacus",
            hint="pip install 'fedrounds[opacus]'",
        ) from error
    return opacus


def objections(module: nn.Module) -> list[str]:
    """Opacus' reasons against a model, each with what would replace the layer; none where it is not installed."""
    try:
        opacus = import_opacus()
    except ConfigError:
        return []
    return [" ".join(str(each).split()) for each in opacus.validators.ModuleValidator.validate(module.train())]


class OpacusGradSampler:
    """Holds a gradient for each example of a part of a batch, at most 64 MiB of them (one example at least).

    Opacus runs whole batches. So it takes only modules whose types say that each row is treated by itself
    (`meeting_place`). Raises `UnsupportedLayer` for others, what Opacus raises for a module that it cannot take, and
    `ConfigError` where it is not installed.
    """

    name: ClassVar[str] = "opacus"

    def __init__(self, module: nn.Module, task: LearningTask) -> None:
        self._task = task
        meets = meeting_place(module)
        if meets is not None:
            raise UnsupportedLayer(f"{meets} is not among the layers that are known to treat each row by itself")
        opacus, self._in_hand = import_opacus(), CurrentBatch()
        # deepcopy takes what its memo holds for a copy that is made already.
        dropouts: dict[int, Any] = {
            id(each): ClientDropout(each, self._in_hand) for each in module.modules() if is_dropout(each)
        }
        self._module = copy.deepcopy(module, memo=dropouts).train()
        self._draws = bool(dropouts)
        # Not strict: buffers are allowed, since what comes out is compared with one example after the other.
        self._hooked = opacus.GradSampleModule(self._module, loss_reduction="sum", strict=False)
        self._parameters = [each for each in self._module.parameters() if each.requires_grad]

    def train(
        self, rule: SGD, base_M: Float32, x: Tensor, y: Tensor, client: SimulatedClient
    ) -> tuple[Float32, Weighted]:
        """Return the result of `SGD.train` with these gradients."""
        private = rule.example_level
        assert private is not None
        num_parameters = sum(parameter.numel() for parameter in self._parameters)
        clipped_sum = self.clipped_sum(Mechanism.of(private, num_parameters), rule.label_smoothing)
        return rule.train(
            self._module,
            base_M,
            x,
            y,
            client.seed,
            client.key,
            clipped_sum,
            client.work,
            client.kept,
            learning_task=self._task,
        )

    def clipped_sum(self, mechanism: Mechanism, label_smoothing: float) -> ClippedSum:
        """Of the parameters that the module holds."""
        optimizer = _clipping_optimizer()(torch.optim.SGD(self._parameters, lr=1.0), mechanism)
        rows = max(1, FORMED_FLOATS // mechanism.num_parameters)

        def found(inputs: Tensor, targets: Tensor, seeds: Sequence[int]) -> tuple[list[Tensor], Tensor]:
            losses = [
                self._add(optimizer, x, y, seeds[part * rows : (part + 1) * rows], label_smoothing)
                for part, (x, y) in enumerate(zip(torch.split(inputs, rows), torch.split(targets, rows), strict=True))
            ]
            return optimizer.take(), torch.cat(losses)

        return found

    def _add(self, optimizer: Any, x: Tensor, y: Tensor, seeds: Sequence[int], smoothing: float) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds] if self._draws else []
        self._in_hand.batch = Batch(x[None], y[None], [1] * len(x), [], generators)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, that nobody needs the gradient by a hook's input
            losses = self._task.loss(self._hooked(x), y, "none", smoothing).view(len(x), -1).sum(1)
            losses = losses / self._task.targets.num_counted_by_row(y).clamp(min=1)
            losses.sum().backward()  # type: ignore[no-untyped-call]
        optimizer.clip_and_accumulate()
        return losses.detach()


class OneAtATime:
    """Runs each example by itself, so that no example can be seen by another's forward or backward pass.

    Right for any module, and slow.
    """

    name: ClassVar[str] = "one example at a time"

    def __init__(self, module: nn.Module, task: LearningTask) -> None:
        self._task = task
        self._module = copy.deepcopy(module).train()

    def train(
        self, rule: SGD, base_M: Float32, x: Tensor, y: Tensor, client: SimulatedClient
    ) -> tuple[Float32, Weighted]:
        """Return the result of `SGD.train`, as it is."""
        return rule.train(
            self._module,
            base_M,
            x,
            y,
            client.seed,
            client.key,
            work=client.work,
            kept=client.kept,
            learning_task=self._task,
        )


def is_dropout(layer: nn.Module) -> TypeGuard[nn.Dropout]:
    """Whether it draws, in a way that each example can have its own draws."""
    return type(layer) is nn.Dropout and layer.p > 0


@cache
def _clipping_optimizer() -> Any:
    from opacus.optimizers import DPOptimizer

    class Clipping(DPOptimizer):  # type: ignore[misc]
        """Opacus' optimizer as far as it adds up.

        Its own factor, C / (norm + 1e-6) of a float32 norm over whole tensors, has no bound for its rounding, and a
        norm that is not finite spoils all; so each example is clipped before, and there is nothing left to clip. Noise
        comes with the release of the sum.
        """

        def __init__(self, optimizer: torch.optim.Optimizer, mechanism: Mechanism) -> None:
            super().__init__(
                optimizer,
                noise_multiplier=0.0,
                max_grad_norm=math.inf,
                expected_batch_size=None,
                loss_reduction="sum",
            )
            self._mechanism = mechanism
            self._forget()

        def clip_and_accumulate(self) -> None:
            samples = [each.grad_sample for each in self.params]
            num_examples = next(len(each) for each in samples if each is not None)
            for index, (each, sample) in enumerate(zip(self.params, samples, strict=True)):
                if sample is None:  # it took no part
                    samples[index] = each.new_zeros(num_examples, *each.shape)
            squares = torch.stack([squared_norms(each.reshape(num_examples, -1)) for each in samples]).sum(0)
            scales, counted = self._mechanism.factors(squares), counts(squares)
            for each, sample in zip(self.params, samples, strict=True):
                by_example = (-1, *(1,) * (sample.ndim - 1))
                each.grad_sample = torch.where(counted.view(by_example), sample * scales.view(by_example), 0)
            super().clip_and_accumulate()
            for each in self.params:
                each.grad_sample = each.grad = None

        def take(self) -> list[Tensor]:
            """The sums since they were last taken."""
            sums = [each.summed_grad for each in self.params]
            self._forget()
            return sums

        def _forget(self) -> None:
            for each in self.params:
                each.summed_grad = each.grad_sample = each.grad = None

    return Clipping
