"""Fair selection: those who took part least come first."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from fedrounds.fl_components.population.availability import Rows
from fedrounds.fl_components.population.selection import Clients, SelectionRule


class Fair(SelectionRule):
    """Of the available clients, `cohort_size` with the fewest participations in this run, ties at random.

    Of a large population `oversampling` times `cohort_size` candidates are drawn at random and compared, so that
    a round costs what its cohort costs ("the power of d choices", Mitzenmacher 2001). Where the population is not
    larger than that, the choice is exact: with everybody available, no two clients' participations differ by more than
    one.
    """

    kind: Literal["fair"] = "fair"
    cohort_size: int = Field(ge=1)
    oversampling: int = Field(default=10, ge=1)

    @property
    def uses_history(self) -> bool:
        return True

    def cohort_size_of(self, num_clients: int) -> int:
        return self.cohort_size

    def select(self, clients: Clients, generator: np.random.Generator) -> Rows:
        size = self.cohort_size * self.oversampling
        candidates_N = self.draw(clients, clients.num_clients, min(size, clients.num_clients), generator)
        least_N = np.argsort(clients.participations(candidates_N), kind="stable")  # the candidates' order is random
        return np.sort(candidates_N[least_N[: self.cohort_size]])
