"""Metrics: what is kept of evaluated rows, and the value that follows from it.

A test set is evaluated in chunks. An additive statistic is summed over chunks and over clients, so that its size does
not depend on the number of rows; any other is collected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fedrounds.fl_components.arrays import Float64

Value = float | Mapping[str, float] | None
"""One value, several by name (as of a confusion matrix), or None where the rows do not define it."""


@dataclass(frozen=True, slots=True)
class Statistic:
    """What metrics need of evaluated rows.

    Args:
      of: from the model's outputs [B, ..., C] and targets [B, ...] of a chunk to an array. Of targets that do not count
        it must be independent.
      is_additive: whether chunks' arrays are added; otherwise they are joined along the first axis.
    """

    of: Callable[[Tensor, Tensor], Float64]
    is_additive: bool = True


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure that says how good a model is.

    Args:
      statistic: what it is computed from. Metrics of one statistic share it.
      value: from the statistic of all rows to the figure; None where the rows do not define it.
      higher_is_better: the direction in which models improve; None for a metric of several values, which has none.
      max_classes: the most classes for which it is computed; None for any number.
      is_pooled_only: whether it is computed for all test rows together, and not by client.
    """

    statistic: Statistic
    value: Callable[[Float64], Value]
    higher_is_better: bool | None
    max_classes: int | None = None
    is_pooled_only: bool = False


def mean(sums: Float64) -> float | None:
    """Return the mean of [sum, count]; None without a row.

    >>> mean(np.array([3.0, 4.0])), mean(np.zeros(2))
    (0.75, None)
    """
    return float(sums[0] / sums[1]) if sums[1] else None


class Tally:
    """The statistics of the rows evaluated so far.

    >>> import torch
    >>> from fedrounds.fl_components.task import Classification
    >>> tally = Tally(Classification().metrics())
    >>> tally.add(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]))
    >>> tally.values()["accuracy"]
    0.5
    """

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self._metrics = metrics
        self._kept: dict[Statistic, list[Float64]] = {metric.statistic: [] for metric in metrics.values()}

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a chunk of rows: the model's outputs [B, ..., C] and the targets [B, ...]."""
        for statistic in self._kept:
            self._join(statistic, [statistic.of(outputs, targets)])

    def merge(self, other: Tally) -> None:
        """Add the rows of another tally of the same metrics."""
        for statistic, arrays in other._kept.items():
            self._join(statistic, arrays)

    def _join(self, statistic: Statistic, arrays: Sequence[Float64]) -> None:
        kept = self._kept[statistic]
        kept.extend(arrays)
        if statistic.is_additive and len(kept) > 1:
            kept[:] = [sum(kept[1:], start=kept[0])]

    def values(self, *, pooled: bool = True) -> dict[str, float]:
        """Return each metric's value by name; one that the rows do not define is left out.

        Args:
          pooled: whether these are all test rows; otherwise metrics that are pooled only are left out.
        """
        named: dict[str, float] = {}
        for name, metric in self._metrics.items():
            arrays = self._kept[metric.statistic]
            if not arrays or (metric.is_pooled_only and not pooled):
                continue
            value = metric.value(arrays[0] if metric.statistic.is_additive else np.concatenate(arrays))
            if isinstance(value, Mapping):
                named |= {f"{name}/{part}": each for part, each in value.items()}
            elif value is not None and (name == "loss" or math.isfinite(value)):  # a loss shows that training diverged
                named[name] = value
        return named


def quantiles_over_clients(by_client: Sequence[Mapping[str, float]], levels: Sequence[float]) -> dict[str, float]:
    """Return quantiles of each metric over the clients that have it; a metric that fewer than two have is left out.

    >>> quantiles_over_clients([{"auroc": 0.5}, {"auroc": 0.7}, {}], [0.1, 0.5])
    {'auroc/clients/q10': 0.52, 'auroc/clients/median': 0.6}
    """
    names = dict.fromkeys(name for values in by_client for name in values)
    found: dict[str, float] = {}
    for name in names:
        values = [each[name] for each in by_client if name in each and math.isfinite(each[name])]
        if len(values) >= 2:
            found |= {
                f"{name}/clients/{'median' if level == 0.5 else f'q{100 * level:g}'}": float(quantile)
                for level, quantile in zip(levels, np.quantile(values, levels), strict=True)
            }
    return found
