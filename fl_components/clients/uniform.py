"""Uniform selection without replacement: the cohort of McMahan et al. 2017 (https://arxiv.org/abs/1602.05629)."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fl_components.clients.selection import Clients, SelectionRule


class Uniform(SelectionRule):
    """A fixed number of distinct clients, each set of that size equally likely; all of them when `cohort_size` is null.

    >>> Uniform(cohort_size=3).cohort_size_of(1_000_000)
    3
    >>> Uniform().cohort_size_of(4)
    4
    """

    kind: Literal["uniform"] = "uniform"
    cohort_size: int | None = Field(default=None, ge=1)

    def cohort_size_of(self, num_clients: int) -> int:
        return num_clients if self.cohort_size is None else self.cohort_size

    def select(self, clients: Clients, generator: np.random.Generator) -> NDArray[np.int64]:
        num_clients = clients.num_clients
        size = self.cohort_size_of(num_clients)
        if size == num_clients:
            return np.arange(num_clients)
        # shuffle=False: the rows are sorted anyway, and numpy then draws a small set from a large population in O(size)
        return np.sort(generator.choice(num_clients, size, replace=False, shuffle=False))
