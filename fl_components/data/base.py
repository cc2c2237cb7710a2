"""What every data rule does."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedrounds.fl_components.data.federated import FederatedData
from fedrounds.fl_components.rules import Rule
from fedrounds.fl_components.targets import TargetType


@dataclass(frozen=True, slots=True)
class ColumnSummary:
    """What a column of all clients' tables holds, as it is in the files.

    Args:
      range: the smallest and the largest number or date (as text); None for other kinds, and without any value.
      counts: how often each listed value of a category occurs.
      missing: the share of cells whose value is missing, and the same by client.
    """

    name: str
    kind: Literal["number", "date", "category", "label", "target"]
    range: tuple[float | str, float | str] | None
    counts: Mapping[str, int] | None
    missing: float
    missing_by_client: Mapping[str, float]


class DataRule(Rule):
    """Where clients' examples come from."""

    kind: str

    @property
    def is_public(self) -> bool:
        """Whether anyone may download the data, as far as is known before they are loaded.

        The rule's `public`, or where that is None, whether the files are those of a public data set.
        """
        public = getattr(self, "public", False)
        return self.is_well_known if public is None else bool(public)

    @property
    def is_well_known(self) -> bool:
        """Whether the files are those of a public data set, by their content: whatever the configuration says, they are
        no user's own. Such data have no fingerprints among those of runs."""
        return False

    @property
    def private_statistics(self) -> str | None:
        """The field, and its value, by which each client's inputs depend on statistics of its own rows.

        Then one example moves all the others.
        """
        return None

    @abstractmethod
    def known_num_clients(self) -> int | None:
        """How many clients there are, where that is known before loading."""

    @abstractmethod
    def load(self, seed: int) -> FederatedData:
        """The examples: the same bits for the same seed. Raises `DataError` for data that cannot be used."""

    def left_alone(self) -> tuple[str, ...]:
        """Return the names of files that lie where the clients' files are, and that are not read."""
        return ()

    def columns_read(self) -> list[ColumnSummary]:
        """Return what the columns that are used hold; empty for data that are no tables. Computed from private rows.

        Raises `DataError` as `load` does.
        """
        return []

    def hint_without_test_rows(self, data: FederatedData) -> str:
        """Return what to do about data in which no client has a row to test on."""
        return "give at least one client x_test and y_test"


class TargetReader(DataRule):
    """Base of the data rules that read targets as the learning task needs them; all others have classes.

    Attributes:
      class_field: the field that says which classes there are. It has no meaning where targets are numbers.
    """

    class_field: ClassVar[str]

    @abstractmethod
    def load(self, seed: int, targets: TargetType = TargetType.CLASS) -> FederatedData:
        """Return the examples with targets of this type. Raises `DataError` for data that cannot be used."""

    def columns_read(self, targets: TargetType = TargetType.CLASS) -> list[ColumnSummary]:
        return []
