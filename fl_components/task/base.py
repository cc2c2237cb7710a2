"""What every learning task provides: the loss, the type of its targets, the size of the model's output, its metrics."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
from torch import Generator, Tensor

from fedrounds.fl_components.arrays import Float64
from fedrounds.fl_components.rules import Rule
from fedrounds.fl_components.targets import TargetType
from fedrounds.fl_components.task.metrics import Metric, Statistic, mean

Reduction = Literal["mean", "sum", "none"]


class LearningTask(Rule):
    """Base of the learning tasks.

    Attributes:
      targets: what an example's target is. Data rules read targets of this type.
      default_metrics, default_primary: what `evaluation.metrics` and `evaluation.primary` are where they are not given.
      smooths_labels: whether `training.label_smoothing` has a meaning.
    """

    kind: str

    targets: ClassVar[TargetType]
    default_metrics: ClassVar[tuple[str, ...]]
    default_primary: ClassVar[str]
    smooths_labels: ClassVar[bool] = False

    @abstractmethod
    def output_size(self, num_classes: int) -> int:
        """Return the length of the last axis of the model's output. `num_classes` is 0 where targets are numbers."""

    @abstractmethod
    def loss(
        self, outputs: Tensor, targets: Tensor, reduction: Reduction = "mean", label_smoothing: float = 0.0
    ) -> Tensor:
        """Return the loss of the model's outputs [..., C] for targets [...].

        Args:
          reduction: "mean" over the targets that count, their "sum", or "none": the loss of each target, flat, which is
            0 where the target does not count. torch.func must be able to differentiate and to vmap all three.
          label_smoothing: of classes; 0 for a task that does not smooth labels.
        """

    @abstractmethod
    def own_metrics(self, class_names: Sequence[str]) -> Mapping[str, Metric]:
        """Return this task's metrics besides its loss, by name. `class_names` is empty where they are not known yet."""

    def metrics(self, class_names: Sequence[str] = ()) -> dict[str, Metric]:
        """Return all metrics that `evaluation.metrics` may name, by name. `loss` is the mean loss, without smoothing.

        >>> from fedrounds.fl_components.task import Regression
        >>> list(Regression().metrics())
        ['loss', 'mse', 'mae', 'r2']
        """
        return {
            "loss": Metric(Statistic(self._loss_sum), mean, higher_is_better=False),
            **self.own_metrics(class_names),
        }

    @abstractmethod
    def synthetic_targets(self, shape: Sequence[int], generator: Generator) -> Tensor:
        """Return made-up targets of a shape, valid for any data of this task: models are tried with them."""

    @abstractmethod
    def hard_targets(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return targets [R] that a model with outputs [R, C] gets wrong, and by which output [R] it does.

        The gradient of each target's loss by that output is negative, and not small (audits of claims about examples).
        """

    def _loss_sum(self, outputs: Tensor, targets: Tensor) -> Float64:
        return np.array([self.loss(outputs, targets, "sum").item(), self.targets.num_counted(targets)])
