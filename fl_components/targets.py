"""Target types: what an example's target is, and which targets count."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np

from fedrounds.fl_components.arrays import IGNORED

if TYPE_CHECKING:
    import torch


class TargetType(StrEnum):
    """What an example's target is: one of several classes, or a number.

    >>> TargetType.CLASS.counted(np.array([0, 2, IGNORED]))
    array([ True,  True, False])
    >>> TargetType.NUMBER.counted(np.array([0.5, np.nan]))
    array([ True, False])
    """

    CLASS = "class"
    NUMBER = "number"

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of an array of targets: int64 for classes, float32 for numbers."""
        return np.dtype(np.int64 if self is TargetType.CLASS else np.float32)

    @property
    def ignored(self) -> float:
        """The target of a position that is neither trained on nor evaluated (padding, context)."""
        return IGNORED if self is TargetType.CLASS else math.nan

    def counted(self, targets: Any) -> Any:
        """Return which targets count, an array or tensor of booleans like `targets`."""
        if self is TargetType.CLASS:
            return targets != IGNORED
        return targets == targets  # NaN does not equal itself

    def num_counted(self, targets: torch.Tensor) -> int:
        """Return how many targets count; where each row has one, all do."""
        return targets.numel() if targets.ndim == 1 else int(self.counted(targets).sum())

    def num_counted_by_row(self, targets: torch.Tensor) -> torch.Tensor:
        """Return how many targets of each row count, int64 [B], of targets [B, ...]."""
        counts: torch.Tensor = self.counted(targets).view(len(targets), -1).sum(1)
        return counts
