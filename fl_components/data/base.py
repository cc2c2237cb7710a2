"""What every data rule does."""

from __future__ import annotations

from abc import abstractmethod

from fl_components.data.federated import FederatedData
from fl_components.rules import Rule


class DataRule(Rule):
    """Where clients' examples come from."""

    kind: str

    @property
    def is_public(self) -> bool:
        """Whether anyone may download the data, as their rule says before they are loaded: `public` is a constant of
        it, or a field."""
        return bool(getattr(self, "public", False))

    @property
    def private_statistics(self) -> str | None:
        """The field, and its value, by which each client's inputs depend on statistics of its own rows: then one
        example moves all the others."""
        return None

    @abstractmethod
    def known_num_clients(self) -> int | None:
        """How many clients there are, where that is known before loading."""

    @abstractmethod
    def load(self, seed: int) -> FederatedData:
        """The examples: the same bits for the same seed. Raises `DataError` for data that cannot be used."""
