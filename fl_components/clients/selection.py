"""What every selection rule does."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fl_components.rules import Rule


class SelectionRule(Rule):
    """The clients of one round, drawn from a table of clients in time proportional to the cohort."""

    min_updates: int = Field(
        default=1, ge=1, description="a round with fewer usable updates than this ends the run as TooFewClients"
    )

    @abstractmethod
    def cohort_size_of(self, num_clients: int) -> int:
        """How many clients a round selects (the expected number, where it is random)."""

    @abstractmethod
    def select(self, num_clients: int, generator: np.random.Generator) -> NDArray[np.int64]:
        """The rows of the selected clients, ascending, int64 [N]."""
