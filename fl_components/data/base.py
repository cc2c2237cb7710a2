"""What every data rule does."""

from __future__ import annotations

from abc import abstractmethod

from fl_components.data.federated import FederatedData
from fl_components.rules import Rule


class DataRule(Rule):
    """Where clients' examples come from."""

    kind: str

    @abstractmethod
    def known_num_clients(self) -> int | None:
        """How many clients there are, where that is known before loading."""

    @abstractmethod
    def load(self, seed: int) -> FederatedData:
        """The examples: the same bits for the same seed. Raises `DataError` for data that cannot be used."""
