"""The mean of the updates.

McMahan et al. 2017, "Communication-efficient learning of deep networks from decentralized data", algorithm 1
(https://arxiv.org/abs/1602.05629).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from fedrounds.fl_components.aggregation.base import LinearAggregator
from fedrounds.fl_components.arrays import Float64
from fedrounds.fl_components.values import Accumulator


class Mean(LinearAggregator):
    """sum_i w_i delta_i / sum_i w_i, where w_i is the client's number of examples (but no more than `max_examples`), or
    1.

    >>> rule = Mean(weights="num_examples")
    >>> updates_NM = np.array([[1.0, 0.0], [4.0, 3.0]], np.float32)
    >>> rule.finish(rule.add(rule.start(2), updates_NM, np.array([2.0, 1.0])))
    array([2., 1.])
    """

    kind: Literal["mean"] = "mean"
    weights: Literal["num_examples", "uniform"] = "num_examples"
    max_examples: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _uniform_weights_have_no_cap(self) -> Mean:
        if self.weights == "uniform" and self.max_examples is not None:
            raise ValueError(
                f"aggregation.max_examples is {self.max_examples} but aggregation.weights is uniform: every client "
                "weighs the same whatever it has; leave aggregation.max_examples out, or set weights to num_examples"
            )
        return self

    @property
    def max_weight(self) -> float | None:
        return self.max_examples if self.weights == "num_examples" else 1.0

    def weigh(self, num_examples_N: Float64) -> Float64:
        if self.weights == "uniform":
            return np.ones(len(num_examples_N))
        return num_examples_N if self.max_examples is None else np.minimum(num_examples_N, self.max_examples)

    def finish(self, total: Accumulator) -> Float64:
        mean_M: Float64 = total.tensors["sum"] / (total.tensors["weight"] if total.count else 1.0)
        return mean_M
