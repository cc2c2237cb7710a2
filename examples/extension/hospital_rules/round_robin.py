"""A selection: the wards take turns."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedrounds.fl_components.population import Clients, SelectionRule


class RoundRobin(SelectionRule):
    """The next `cohort_size` clients in the table's order, from the start again after the last."""

    kind: Literal["round_robin"] = "round_robin"
    cohort_size: int = Field(ge=1)

    def cohort_size_of(self, num_clients: int) -> int:
        return self.cohort_size

    def select(self, clients: Clients, generator: np.random.Generator) -> NDArray[np.int64]:
        first = (clients.round - 1) * self.cohort_size
        return np.sort(np.arange(first, first + self.cohort_size) % clients.num_clients)
