"""What a run achieved, as its last rounds say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedrounds.fl_components.store import RoundRecord, RunRecord, Store


@dataclass(frozen=True, slots=True)
class PrimaryMetric:
    """The metric that a run is judged by, and the direction in which it improves."""

    name: str
    higher_is_better: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> PrimaryMetric:
        """Return that of a run with this configuration."""
        from fedrounds.fl_components.task import read_task  # imports torch

        name = config["evaluation"]["primary"]
        return cls(name, bool(read_task(config["task"]).metrics()[name].higher_is_better))

    @classmethod
    def common(cls, runs: Iterable[RunRecord]) -> PrimaryMetric | None:
        """Return that of all runs; None where there are no runs, or they are judged by different metrics."""
        distinct = {cls.of(run.config) for run in runs}
        return distinct.pop() if len(distinct) == 1 else None

    @property
    def key(self) -> str:
        """Its name among a round's metrics."""
        return primary_key(self.name)

    def best(self, values: Iterable[float]) -> float | None:
        """Return the best of the values that are finite; None when none is.

        >>> PrimaryMetric("mse", higher_is_better=False).best([2.0, 1.5, float("nan")])
        1.5
        """
        finite = [value for value in values if math.isfinite(value)]
        return (max if self.higher_is_better else min)(finite, default=None)


def primary_key(name: str) -> str:
    """Return the name that a primary metric has among a round's metrics.

    >>> primary_key("auroc")
    'eval/auroc'
    """
    return f"eval/{name}"


def recent_rounds(store: Store, run: RunRecord) -> list[RoundRecord]:
    """Return the run's last rounds, as far back as an evaluation."""
    return store.rounds(run.run_id, after=run.committed_round - run.config["evaluation"]["every"])


def evaluated(rounds: Sequence[RoundRecord]) -> dict[str, float]:
    """Return the metrics of the last of these rounds that was evaluated; empty when none was."""
    metrics: list[dict[str, float]] = [row.result["metrics"] for row in reversed(rounds)]
    return next((values for values in metrics if any(name.startswith("eval/") for name in values)), {})
