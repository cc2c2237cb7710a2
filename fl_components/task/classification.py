"""Classification: each example, or each position of it, belongs to one of C classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy, one_hot

from fedrounds.fl_components.arrays import IGNORED, Float64
from fedrounds.fl_components.targets import TargetType
from fedrounds.fl_components.task.base import LearningTask, Reduction
from fedrounds.fl_components.task.metrics import Metric, Statistic, mean

NUM_BINS: Final = 15
"""Bins of confidence in the expected calibration error, as in Guo et al. 2017."""

MAX_CONFUSION_CLASSES: Final = 20
"""The most classes of a confusion matrix: a round records the square of their number."""


class Classification(LearningTask):
    """Each example belongs to one of C classes; the model gives a score (logit) for each class.

    The loss is the cross-entropy. Metrics, where p is the softmax of the scores and class 1 of two is the positive one:

    * `accuracy`; `balanced_accuracy`, the mean of the classes' recalls.
    * `f1`: of class 1 where there are two classes; for more, the mean over classes (macro).
    * `auroc`, `average_precision`: of class 1 where there are two classes; for more, the mean over classes of one
      class against the rest (macro). The mean is over the classes for which they are defined.
    * `brier`: the mean of (p - y)^2 of class 1; for more than two classes summed over the classes.
    * `expected_calibration_error`: by 15 bins of confidence (Guo et al. 2017, https://arxiv.org/abs/1706.04599).
    * `sensitivity_at_specificity`: the largest sensitivity of any threshold whose specificity is at least
      `specificity`. Of two classes only.
    * `confusion_matrix`: how many rows of each class are predicted as each class. Of all test rows together, and at
      most 20 classes.

    Args:
      specificity: that of `sensitivity_at_specificity`.

    >>> Classification().loss(torch.tensor([[0.0, 0.0]]), torch.tensor([1])).item()
    0.6931471824645996
    """

    kind: Literal["classification"] = "classification"
    specificity: float = Field(default=0.9, gt=0, lt=1)

    targets: ClassVar[TargetType] = TargetType.CLASS
    default_metrics: ClassVar[tuple[str, ...]] = ("loss", "accuracy")
    default_primary: ClassVar[str] = "accuracy"
    smooths_labels: ClassVar[bool] = True

    def output_size(self, num_classes: int) -> int:
        return num_classes

    def loss(
        self, outputs: Tensor, targets: Tensor, reduction: Reduction = "mean", label_smoothing: float = 0.0
    ) -> Tensor:
        return cross_entropy(
            outputs.flatten(0, -2),
            targets.flatten(),
            ignore_index=IGNORED,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )

    def own_metrics(self, class_names: Sequence[str]) -> dict[str, Metric]:
        hits, confusion = Statistic(_hits), Statistic(_confusion)
        scores = Statistic(_probabilities, is_additive=False)
        sensitivity = partial(_sensitivity, specificity=self.specificity)
        return {
            "accuracy": Metric(hits, mean, higher_is_better=True),
            "balanced_accuracy": Metric(confusion, _balanced_accuracy, higher_is_better=True),
            "f1": Metric(confusion, _f1, higher_is_better=True),
            "auroc": Metric(scores, _auroc, higher_is_better=True),
            "average_precision": Metric(scores, _average_precision, higher_is_better=True),
            "brier": Metric(Statistic(_brier), mean, higher_is_better=False),
            "expected_calibration_error": Metric(Statistic(_calibration), _calibration_error, higher_is_better=False),
            "sensitivity_at_specificity": Metric(scores, sensitivity, higher_is_better=True, max_classes=2),
            "confusion_matrix": Metric(
                confusion,
                partial(_by_class, class_names=class_names),
                higher_is_better=None,
                max_classes=MAX_CONFUSION_CLASSES,
                is_pooled_only=True,
            ),
        }

    def synthetic_targets(self, shape: Sequence[int], generator: Generator) -> Tensor:
        return torch.randint(0, 2, tuple(shape), generator=generator)  # labels of any number of classes

    def hard_targets(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the class that each row's model finds least likely, and its score.

        Of C classes it has a probability p of at most 1 / C, so with label smoothing s the gradient by its score,
        p - (1 - s) - s / C, is at most -(1 - s) (1 - 1 / C).
        """
        least_likely = outputs.argmin(1)
        return least_likely, least_likely


def _counted(outputs: Tensor, targets: Tensor) -> tuple[Tensor, NDArray[np.int64]]:
    """Scores [R, C], float64, and labels [R] of the targets that count."""
    scores, labels = outputs.flatten(0, -2), targets.flatten()
    mask = labels != IGNORED
    return scores[mask].double(), labels[mask].numpy(force=True)


def _hits(outputs: Tensor, targets: Tensor) -> Float64:
    correct = int((outputs.argmax(-1) == targets).sum())  # an ignored label is no class
    return np.array([correct, TargetType.CLASS.num_counted(targets)], np.float64)


def _confusion(outputs: Tensor, targets: Tensor) -> Float64:
    """How often each class [C] is predicted as each class [C]."""
    scores, labels = _counted(outputs, targets)
    num_classes = scores.shape[-1]
    pairs = labels * num_classes + scores.argmax(-1).numpy(force=True)
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes).astype(np.float64)


def _probabilities(outputs: Tensor, targets: Tensor) -> Float64:
    """Of each row its class and the probabilities of all classes, [R, 1 + C]."""
    scores, labels = _counted(outputs, targets)
    return np.column_stack([labels, scores.softmax(-1).numpy(force=True)])


def _brier(outputs: Tensor, targets: Tensor) -> Float64:
    scores, labels = _counted(outputs, targets)
    errors = scores.softmax(-1) - one_hot(torch.from_numpy(labels).to(scores.device), scores.shape[-1])
    squares = errors[:, 1:].square() if scores.shape[-1] == 2 else errors.square()
    return np.array([squares.sum().item(), len(labels)])


def _calibration(outputs: Tensor, targets: Tensor) -> Float64:
    """Of each bin of confidence: the rows in it, those that are predicted right, and the sum of confidences; [B, 3]."""
    scores, labels = _counted(outputs, targets)
    if not torch.isfinite(scores).all():
        return np.full((NUM_BINS, 3), math.nan)
    confidence, predicted = (each.numpy(force=True) for each in scores.softmax(-1).max(-1))
    bins = np.clip(np.ceil(confidence * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)
    columns = [np.ones(len(labels)), predicted == labels, confidence]
    return np.column_stack([np.bincount(bins, each, NUM_BINS) for each in columns])


def _calibration_error(bins: Float64) -> float | None:
    total = bins[:, 0].sum()
    return float(np.abs(bins[:, 1] - bins[:, 2]).sum() / total) if total else None


def _weighted_pairs(confusion: Float64) -> dict[str, Any]:
    """A confusion matrix as scikit-learn takes it: each pair of classes once, with its count as weight."""
    labels, predicted = np.nonzero(confusion)
    return {"y_true": labels, "y_pred": predicted, "sample_weight": confusion[labels, predicted]}


def _balanced_accuracy(confusion: Float64) -> float | None:
    from sklearn.metrics import recall_score  # takes a second to import

    occurring = np.flatnonzero(confusion.sum(1))
    if not occurring.size:
        return None
    return float(recall_score(**_weighted_pairs(confusion), labels=occurring, average="macro", zero_division=0.0))


def _f1(confusion: Float64) -> float | None:
    from sklearn.metrics import f1_score

    concerned = np.flatnonzero(confusion.sum(0) + confusion.sum(1))
    if len(confusion) == 2:
        concerned = concerned[concerned == 1]
    if not concerned.size:
        return None
    return float(f1_score(**_weighted_pairs(confusion), labels=concerned, average="macro", zero_division=0.0))


def _one_against_the_rest(rows: Float64) -> list[tuple[NDArray[np.bool_], Float64]]:
    """Which rows are of the class, and its probabilities: of class 1 of two, else of each class that has some but not
    all rows. Empty where the scores are not finite."""
    if not np.isfinite(rows).all():
        return []
    num_classes = rows.shape[1] - 1
    classes = [1] if num_classes == 2 else range(num_classes)
    pairs = [(rows[:, 0] == label, rows[:, 1 + label]) for label in classes]
    return [(of_class, scores) for of_class, scores in pairs if 0 < of_class.sum() < len(rows)]


def _auroc(rows: Float64) -> float | None:
    from sklearn.metrics import roc_auc_score

    pairs = _one_against_the_rest(rows)
    return float(np.mean([roc_auc_score(*pair) for pair in pairs])) if pairs else None


def _average_precision(rows: Float64) -> float | None:
    from sklearn.metrics import average_precision_score

    pairs = _one_against_the_rest(rows)
    return float(np.mean([average_precision_score(*pair) for pair in pairs])) if pairs else None


def _sensitivity(rows: Float64, specificity: float) -> float | None:
    from sklearn.metrics import roc_curve

    pairs = _one_against_the_rest(rows)
    if rows.shape[1] != 3 or not pairs:
        return None
    false_positive_rates, sensitivities, _ = roc_curve(*pairs[0], drop_intermediate=False)
    return float(sensitivities[false_positive_rates <= 1 - specificity + 1e-12].max())


def _by_class(confusion: Float64, class_names: Sequence[str]) -> dict[str, float]:
    """The counts as `TRUE/PREDICTED`."""
    names = class_names or [str(label) for label in range(len(confusion))]
    return {
        f"{name}/{predicted}": float(confusion[row, column])
        for row, name in enumerate(names)
        for column, predicted in enumerate(names)
    }
