"""EvaluationSet: the test examples that the server holds, and what a model is judged by on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from fedrounds.fl_components.config import FederationConfig
from fedrounds.fl_components.data import FederatedData
from fedrounds.fl_components.errors import ConfigError, one_line
from fedrounds.fl_components.task import LearningTask, Metric, Tally, quantiles_over_clients
from fedrounds.fl_components.training import Evaluation, ExampleTable, evaluate


@dataclass(frozen=True, eq=False)
class EvaluationSet:
    """The test examples of all clients, and those of no client.

    Args:
      data: whose test rows are evaluated.
      task: what is learned, which defines the metrics.
      evaluation: which metrics are computed, and of whom.
    """

    data: FederatedData
    task: LearningTask
    evaluation: Evaluation

    @cached_property
    def metrics(self) -> dict[str, Metric]:
        """What is evaluated, by name."""
        return self.evaluation.metrics_of(self.task, self.data.class_names)

    @cached_property
    def baselines(self) -> dict[str, float]:
        """How good the predictors are that need no model: the majority label (or mean) of all, and of each client."""
        return self.data.baselines()

    def evaluate(self, module: torch.nn.Module) -> dict[str, float]:
        """Return the metrics of `module` under the names that rounds record.

        `eval/METRIC` is that of all test rows together; with `evaluation.per_client`, `eval/client/ID/METRIC` is that
        of one client's rows, and `eval/METRIC/clients/q10` a quantile of these. What the rows do not define is left
        out.
        """
        data, metrics = self.data, self.metrics
        if not self.evaluation.per_client:
            return _named("eval", evaluate(module, data.x_test, data.y_test, metrics).values())
        pooled, by_client = Tally(metrics), dict[str, dict[str, float]]()
        for index in np.flatnonzero(data.test_rows.lengths).tolist():
            client_id, (x, y) = data.client_ids[index], data.test(index)
            tally = evaluate(module, x, y, metrics, f"the test rows of client {client_id}")
            by_client[client_id] = tally.values(pooled=False)
            pooled.merge(tally)
        x, y = data.unowned_test()
        pooled.merge(evaluate(module, x, y, metrics, "the test rows that are no client's"))
        named = _named("eval", pooled.values())
        for client_id, values in by_client.items():
            named |= _named(f"eval/client/{client_id}", values)
        return named | _named("eval", quantiles_over_clients(list(by_client.values()), self.evaluation.quantiles))

    def public_rows(self, limit: int) -> ExampleTable | None:
        """Return at most `limit` test examples, evenly spaced over all clients' where these are public; else None."""
        x, y = self.data.x_test, self.data.y_test
        if not (self.data.public or self.evaluation.public_test):
            return None
        rows = np.linspace(0, len(y) - 1, min(limit, len(y))).astype(np.int64)
        starts, stops = np.array([0]), np.array([len(rows)])
        return ExampleTable(torch.from_numpy(x[rows]), torch.from_numpy(y[rows]), starts, stops, self.task)


def _named(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in values.items()}


def output_shape(config: FederationConfig, data: FederatedData) -> tuple[int, ...]:
    """Return the shape of a model's output for one row: [C], or [T, C] where each position has a target."""
    return (*data.y_train.shape[1:], config.task.output_size(data.num_classes))


def check_metrics(config: FederationConfig, data: FederatedData) -> None:
    """Raise `ConfigError` for a metric that is not computed for as many classes as the data has, or that fails.

    Each is tried on synthetic rows: what a round would find out only after training, and what it imports, comes first.
    """
    shape = output_shape(config, data)
    targets = config.task.synthetic_targets((8, *shape[:-1]), torch.Generator().manual_seed(0))
    for name, metric in config.evaluation.metrics_of(config.task, data.class_names).items():
        if metric.max_classes is not None and data.num_classes > metric.max_classes:
            raise ConfigError(
                f"evaluation.metrics names {name} but data {config.data.kind} has {data.num_classes} classes: it is "
                f"computed for at most {metric.max_classes}",
                hint="leave it out; f1 and auroc are averaged over any number of classes",
            )
        try:
            tally = Tally({name: metric})
            tally.add(torch.zeros(8, *shape), targets)
            tally.values()
        except Exception as error:
            raise ConfigError(
                f"evaluation.metrics names {name}, which fails on synthetic rows: {one_line(error)}",
                hint="correct the metric, or leave it out",
            ) from error
