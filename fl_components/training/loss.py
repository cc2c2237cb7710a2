"""The loss of a model's scores: one label a row, or one a position."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from fedrounds.fl_components.arrays import IGNORED


def mean_loss(scores: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """The mean cross-entropy of scores [B, C] and labels [B], or of [B, T, C] and [B, T]."""
    return cross_entropy(scores.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, label_smoothing=label_smoothing)


def label_losses(scores: torch.Tensor, labels: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """The cross-entropy of each label by itself, flat: of scores [..., C] and labels [...]; 0 where one is ignored."""
    flat = labels.flatten()
    return cross_entropy(
        scores.flatten(0, -2), flat, ignore_index=IGNORED, label_smoothing=label_smoothing, reduction="none"
    )


def sum_loss(scores: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """The same, summed over the labels that count."""
    return cross_entropy(
        scores.flatten(0, -2),
        labels.flatten(),
        ignore_index=IGNORED,
        label_smoothing=label_smoothing,
        reduction="sum",
    )


def num_labels(labels: torch.Tensor) -> int:
    """How many labels count."""
    return labels.numel() if labels.ndim == 1 else int((labels != IGNORED).sum())


def labels_of_each(labels: torch.Tensor) -> torch.Tensor:
    """How many labels of each row count, int64 [B], of labels [B, ...]."""
    return (labels != IGNORED).view(len(labels), -1).sum(1)
