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
        """Whether anyone may download the data, as can be told before they are loaded: `public` is a field of the rule
        or a constant. Where it is None, they are public if they are known to be."""
        public = getattr(self, "public", False)
        return self.is_well_known if public is None else bool(public)

    @property
    def is_well_known(self) -> bool:
        """Whether the files are those of a public data set, by their content: whatever the configuration says, they are
        no user's own. Such data have no fingerprints among those of runs."""
        return False

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
