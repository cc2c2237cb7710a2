"""Evaluation on held-out examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from numpy.typing import NDArray
from pydantic import AfterValidator, Field

from fedrounds.fl_components.errors import ModelError, one_line
from fedrounds.fl_components.models import check_scores, failing_layer
from fedrounds.fl_components.privacy.releases import Release, charged, withheld
from fedrounds.fl_components.rules import Rule
from fedrounds.fl_components.task import LearningTask, Metric, Tally
from fedrounds.fl_components.training.threads import one_thread

BATCH_SIZE = 1024


def _levels(levels: tuple[float, ...]) -> tuple[float, ...]:
    if not all(0 <= level <= 1 for level in levels) or len(set(levels)) < len(levels):
        raise ValueError("give different levels from 0 to 1, for instance [0.1, 0.5, 0.9]")
    return levels


class Evaluation(Rule):
    """Every `every` rounds and after the last one: on all test examples together and, if asked, on each client's.

    Args:
      every: rounds from one evaluation to the next.
      per_client: whether each client's test rows are evaluated on their own as well.
      quantiles: the levels of which quantiles over the clients are computed, of each metric, where `per_client` is
        true. 0.5 is the median.
      metrics: names of the learning task's metrics; by default `loss` and `accuracy`, or for regression `mse`, `mae`
        and `r2`.
      primary: the metric that tables, curves and decisions use; by default `accuracy`, or for regression `mse`. It is
        evaluated whether or not `metrics` names it.
      public_test: declares that anyone may have the test examples, for instance such as are no client's: then the
        metrics of all of them together are shown under a privacy claim as well. A model that was paid for says nothing
        more of the training examples by them.
    """

    every: int = Field(default=1, ge=1)
    per_client: bool = True
    quantiles: Annotated[tuple[float, ...], AfterValidator(_levels)] = (0.1, 0.5, 0.9)
    metrics: tuple[str, ...] | None = Field(default=None, min_length=1)
    primary: str | None = None
    public_test: bool = False

    def resolved(self, task: LearningTask) -> Evaluation:
        """Return the same with the metrics and the primary metric written out.

        Raises ValueError for metrics that the task does not have.
        """
        known = task.metrics()
        primary = task.default_primary if self.primary is None else self.primary
        names = task.default_metrics if self.metrics is None else self.metrics
        for field, name in (("evaluation.primary", primary), *(("evaluation.metrics", name) for name in names)):
            if name not in known:
                raise ValueError(
                    f"{field} names {name!r} but task.kind {task.kind} has no such metric; known are {', '.join(known)}"
                )
        if known[primary].higher_is_better is None:
            raise ValueError(
                f"evaluation.primary is {primary} but task.kind {task.kind} gives it several values, of which none can "
                "be compared; choose another metric"
            )
        return self.model_copy(update={"metrics": tuple(dict.fromkeys([*names, primary])), "primary": primary})

    def metrics_of(self, task: LearningTask, class_names: tuple[str, ...] = ()) -> dict[str, Metric]:
        """Return the metrics to evaluate, by name."""
        known = task.metrics(class_names)
        return {name: known[name] for name in self.resolved(task).metrics or ()}

    def releases(self, metrics: Mapping[str, float]) -> dict[str, Release]:
        """Return the metrics of a round, each with the reason why it may be seen."""
        return {
            name: charged(value) if self.public_test and self._is_pooled(name) else withheld(value)
            for name, value in metrics.items()
        }

    def _is_pooled(self, name: str) -> bool:
        """Whether a round's metric is one of all test rows together, and of nothing else."""
        pooled = [f"eval/{metric}" for metric in self.metrics or ()]
        return name in pooled or any(
            name.startswith(f"{metric}/") and not name.startswith(f"{metric}/clients/") for metric in pooled
        )


def evaluate(
    module: torch.nn.Module,
    x: NDArray[Any],
    y: NDArray[Any],
    metrics: Mapping[str, Metric],
    whose: str = "the test rows",
) -> Tally:
    """Return what `metrics` need of the outputs of `module` for rows and their targets.

    The module is given copies of the rows, in chunks. Raises `ModelError`, which says whose rows these are, where it
    fails or returns no scores.

    >>> import numpy as np
    >>> from fedrounds.fl_components.task import Regression
    >>> tally = evaluate(torch.nn.Linear(2, 1), np.zeros((4, 2), np.float32), np.zeros(4, np.float32),
    ...                  Regression().metrics())
    >>> list(tally.values())
    ['loss', 'mse', 'mae']
    """
    tally = Tally(metrics)
    module.eval()
    with one_thread(), torch.no_grad():
        for start in range(0, len(y), BATCH_SIZE):
            targets = torch.from_numpy(y[start : start + BATCH_SIZE])
            rows = torch.from_numpy(x[start : start + BATCH_SIZE])
            tally.add(_outputs(module, rows, targets, whose), targets)
    return tally


def _outputs(module: torch.nn.Module, rows: torch.Tensor, targets: torch.Tensor, whose: str) -> torch.Tensor:
    came_in = f"rows of {str(rows.dtype).removeprefix('torch.')} {list(rows.shape[1:])}"
    try:
        outputs = module(rows.clone())
    except Exception as error:
        raise ModelError(
            f"the model failed while it was evaluated on {whose}{failing_layer(module, rows)}: {one_line(error)}",
            hint="the model must take every row of the data in evaluation mode; correct it, then resume the run",
        ) from error
    size = outputs.shape[-1] if isinstance(outputs, torch.Tensor) and outputs.ndim else 0
    try:
        return check_scores(outputs, len(rows), (*targets.shape[1:], size), came_in)
    except ModelError as error:
        raise ModelError(f"{error.message}, while it was evaluated on {whose}", hint=error.hint) from None
