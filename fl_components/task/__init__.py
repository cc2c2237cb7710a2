"""The learning task: what is predicted, by which loss it is learnt, and by which metrics a model is judged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from fedrounds.fl_components.rules import union
from fedrounds.fl_components.task.base import LearningTask
from fedrounds.fl_components.task.classification import Classification
from fedrounds.fl_components.task.metrics import Metric, Statistic, Tally, quantiles_over_clients
from fedrounds.fl_components.task.regression import Regression

if TYPE_CHECKING:
    Task = LearningTask
else:
    Task = union("task", Classification, Regression)


def read_task(fields: Mapping[str, Any]) -> LearningTask:
    """Return the learning task that a configuration's section `task` describes.

    >>> read_task({"kind": "regression"})
    Regression(kind='regression')
    """
    task: LearningTask = TypeAdapter(Task).validate_python(fields)
    return task


__all__ = [
    "Classification",
    "LearningTask",
    "Metric",
    "Regression",
    "Statistic",
    "Tally",
    "Task",
    "quantiles_over_clients",
    "read_task",
]
