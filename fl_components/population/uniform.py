"""Uniform selection without replacement: the cohort of McMahan et al. 2017 (https://arxiv.org/abs/1602.05629)."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from fedrounds.fl_components.population.availability import Rows
from fedrounds.fl_components.population.selection import Clients, SelectionRule
from fedrounds.fl_components.values import Sampling


class UniformSampling(SelectionRule):
    """A fixed number of distinct available clients, each set of that size equally likely.

    All when `cohort_size` is null.

    >>> UniformSampling(cohort_size=3).cohort_size_of(1_000_000)
    3
    >>> UniformSampling().cohort_size_of(4)
    4
    """

    kind: Literal["uniform"] = "uniform"
    cohort_size: int | None = Field(default=None, ge=1)

    def cohort_size_of(self, num_clients: int) -> int:
        return num_clients if self.cohort_size is None else self.cohort_size

    def sampling(self, num_clients: int) -> Sampling:
        size = self.cohort_size_of(num_clients)
        if size == num_clients:
            return Sampling("everyone", num_clients, size, 1.0)
        return Sampling("fixed_size", num_clients, size, size / num_clients)

    def select(self, clients: Clients, generator: np.random.Generator) -> Rows:
        size = self.cohort_size_of(clients.num_clients)
        if not clients.always_available:
            return np.sort(self.draw(clients, clients.num_clients, size, generator))
        if size == clients.num_clients:
            return np.arange(size)
        # shuffle=False: the rows are sorted anyway, and numpy then draws a small set from a large population in O(size)
        return np.sort(generator.choice(clients.num_clients, size, replace=False, shuffle=False))
