"""FederatedData: every client's examples, checked, in a few arrays.

Clients' rows lie together in one array, so that a million clients cost two tables of offsets and not a million objects,
and one client's rows are a view.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedrounds.fl_components.arrays import IGNORED, Float64
from fedrounds.fl_components.data.client_ids import NumberedIds, check_client_id
from fedrounds.fl_components.data.fingerprints import Fingerprints, of_data
from fedrounds.fl_components.data.masked import check_unmasked
from fedrounds.fl_components.errors import DataError
from fedrounds.fl_components.shared_memory import SharedMemory
from fedrounds.fl_components.targets import TargetType

Features = NDArray[np.float32] | NDArray[np.int64]


Labels = NDArray[np.int64]


Targets = NDArray[np.int64] | NDArray[np.float32]


Array = NDArray[Any]


class ClientExamples(NamedTuple):
    """One client's own examples: training rows, and test rows (none: arrays of length 0)."""

    x_train: Features
    y_train: Targets
    x_test: Features
    y_test: Targets


@dataclass(frozen=True, slots=True, eq=False)
class RowRanges:
    """Which rows are whose: client i owns `starts[i]:stops[i]` (int64 [n] each). Ranges may overlap."""

    starts: NDArray[np.int64]
    stops: NDArray[np.int64]

    @classmethod
    def consecutive(cls, lengths: Sequence[int] | NDArray[np.int64]) -> RowRanges:
        """One after the other, from row 0.

        >>> RowRanges.consecutive([2, 3]).stops
        array([2, 5])
        """
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return cls(offsets[:-1], offsets[1:])

    @property
    def lengths(self) -> NDArray[np.int64]:
        return self.stops - self.starts


@dataclass(frozen=True, slots=True, eq=False)
class FederatedData:
    """The examples of n clients, M training rows and M' test rows in all.

    Every client has training rows. A client without test rows has no evaluation of its own; test rows that no client
    owns (a public data set's own test set) count in the evaluation of all. Construction raises `DataError` for data
    that cannot be trained on, naming client and row.

    Args:
      client_ids: n distinct names (letters, digits, ``_ . -`` and spaces; at most 100 characters).
      x_train, x_test: features [M, ...], float32, or int64 for tokens; equal shapes after the first axis.
      y_train, y_test: targets, one a row [M] or one a position [M, T]. Of classes they are labels, int64 in
        [0, num_classes), where `IGNORED` marks positions that do not count; numbers are float32, where NaN does.
      train_rows, test_rows: which of them are whose.
      num_classes: how many classes there are (2 or more); 0 where targets are numbers.
      class_names: what each label stands for, in the order of the labels; empty where labels have no names.
      public: True for a data set that anyone may download: nothing about it needs to be withheld.
      attributes: what is known of each client besides its examples, for stratified selection: name -> values [n].
      as_read: what makes the fingerprints of the rows as they were read. By default the examples count as read; a data
        rule that selects, scales or splits what it reads must give its own.

    >>> data = FederatedData.from_clients(
    ...     {"a": ClientExamples(np.zeros((3, 2), np.float32), np.array([0, 1, 1]),
    ...                          np.zeros((1, 2), np.float32), np.array([1]))},
    ...     num_classes=2, public=True)
    >>> data.num_clients, data.input_shape, data.num_examples(0), data.baselines()["pooled_majority"]
    (1, (2,), 3, 1.0)
    """

    client_ids: Sequence[str]
    x_train: Features
    y_train: Targets
    train_rows: RowRanges
    x_test: Features
    y_test: Targets
    test_rows: RowRanges
    num_classes: int
    public: bool
    attributes: Mapping[str, Array] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    as_read: Callable[[FederatedData, bool], Fingerprints] = of_data

    def __post_init__(self) -> None:
        self._check_clients()
        if self.num_classes == 1:
            raise DataError(
                f"the data has {self.num_classes} class(es): there is nothing to tell apart",
                hint="labels are whole numbers from 0; at least two different ones are needed",
            )
        if self.class_names and len(set(self.class_names)) != self.num_classes:
            raise DataError(
                f"there are {self.num_classes} classes, and {len(set(self.class_names))} different names of classes",
                hint="give each class a name of its own, or none at all",
            )
        self._check_part("training", self.x_train, self.y_train, self.train_rows)
        self._check_part("test", self.x_test, self.y_test, self.test_rows)
        if self.x_test.shape[1:] != self.x_train.shape[1:] or self.x_test.dtype != self.x_train.dtype:
            raise DataError(
                f"training rows are {_describe(self.x_train)} and test rows {_describe(self.x_test)}",
                hint="prepare both in the same way",
            )
        if self.y_test.shape[1:] != self.y_train.shape[1:]:
            raise DataError(
                f"training rows have labels of shape {list(self.y_train.shape[1:])} and test rows of "
                f"{list(self.y_test.shape[1:])}",
                hint="prepare both in the same way",
            )
        for name, values in self.attributes.items():
            if np.shape(values) != (self.num_clients,):
                raise DataError(
                    f"attribute {name!r} has the shape {list(np.shape(values))} for {self.num_clients} clients",
                    hint="give one value for each client",
                )
        without = np.flatnonzero(self.train_rows.lengths == 0)
        if without.size:
            raise _no_training_rows(self.client_ids[int(without[0])])

    @classmethod
    def from_clients(
        cls,
        clients: Mapping[str, ClientExamples],
        *,
        num_classes: int,
        public: bool,
        attributes: Mapping[str, Array] | None = None,
        class_names: tuple[str, ...] = (),
        as_read: Callable[[FederatedData, bool], Fingerprints] = of_data,
    ) -> FederatedData:
        """Join the examples of single clients, whose shapes and types must be equal."""
        if not clients:
            raise DataError("there are no clients", hint="the data must have at least one client")
        examples = list(clients.values())
        first = examples[0].x_train
        for client_id, example in clients.items():
            if not len(example.x_train):
                raise _no_training_rows(client_id)
            for name, values in example._asdict().items():
                check_unmasked(values, f"client {client_id!r}, {name}")
            if not _are_alike(example.x_train, first):
                raise DataError(
                    f"client {client_id!r} has rows of {_describe(example.x_train)}, and client "
                    f"{next(iter(clients))!r} of {_describe(first)}",
                    hint="give all clients the same features and the same type of numbers",
                )
            if len(example.x_test) and not _are_alike(example.x_test, first):
                raise DataError(
                    f"client {client_id!r} has test rows of {_describe(example.x_test)}, and training rows of "
                    f"{_describe(first)}",
                    hint="give training and test rows the same features and the same type of numbers",
                )
        x_test: Sequence[Array] = [example.x_test for example in examples if len(example.x_test)] or [first[:0]]
        return cls(
            client_ids=tuple(clients),
            x_train=np.concatenate([example.x_train for example in examples]),
            y_train=np.concatenate([example.y_train for example in examples]),
            train_rows=RowRanges.consecutive([len(example.x_train) for example in examples]),
            x_test=np.concatenate(x_test),
            y_test=np.concatenate([example.y_test for example in examples]),
            test_rows=RowRanges.consecutive([len(example.x_test) for example in examples]),
            num_classes=num_classes,
            public=public,
            attributes=attributes or {},
            class_names=class_names,
            as_read=as_read,
        )

    def shared(self) -> tuple[FederatedData, SharedMemory]:
        """The same with its training examples in memory that other processes can see: `x`, `y`, `starts`, `stops`."""
        rows = self.train_rows
        memory = SharedMemory.from_arrays(
            {"x": self.x_train, "y": self.y_train, "starts": rows.starts, "stops": rows.stops}
        )
        rows = RowRanges(memory["starts"], memory["stops"])
        return replace(self, x_train=memory["x"], y_train=memory["y"], train_rows=rows), memory

    def fingerprints(self, *, every_client: bool = False) -> Fingerprints:
        """The fingerprints of all rows as read, training and test rows.

        Of each client up to `fingerprints.MAX_CLIENTS` clients, or of `every_client`.
        """
        return self.as_read(self, every_client)

    @property
    def num_clients(self) -> int:
        return len(self.client_ids)

    @property
    def shown_classes(self) -> tuple[str, ...]:
        """The classes' names; where they have none, their numbers.

        >>> x, y = np.zeros((2, 1), np.float32), np.array([0, 1])
        >>> FederatedData.from_clients({"a": ClientExamples(x, y, x, y)}, num_classes=2, public=True).shown_classes
        ('0', '1')
        """
        return self.class_names or tuple(map(str, range(self.num_classes)))

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one row's features."""
        return self.x_train.shape[1:]

    @property
    def targets(self) -> TargetType:
        """What the targets are: classes or numbers."""
        return TargetType.CLASS if self.num_classes else TargetType.NUMBER

    def train(self, client: int) -> tuple[Features, Targets]:
        """Return client number `client`'s training rows: views of features and targets."""
        rows = slice(self.train_rows.starts[client], self.train_rows.stops[client])
        return self.x_train[rows], self.y_train[rows]

    def test(self, client: int) -> tuple[Features, Targets]:
        """Return client number `client`'s test rows (perhaps none): views of features and targets."""
        rows = slice(self.test_rows.starts[client], self.test_rows.stops[client])
        return self.x_test[rows], self.y_test[rows]

    def unowned_test(self) -> tuple[Features, Targets]:
        """Return the test rows that no client owns: those after the last client's. Views of features and targets."""
        rows = slice(int(self.test_rows.stops.max()), None)
        return self.x_test[rows], self.y_test[rows]

    def num_examples(self, client: int) -> int:
        """How many training rows client number `client` has."""
        return int(self.train_rows.stops[client] - self.train_rows.starts[client])

    def attribute(self, name: str) -> NDArray[np.int64]:
        """Each client's value of an attribute as a number from 0, int64 [n]; equal values have equal numbers.

        Besides `attributes` there is `majority_label`, the label that is most frequent in a client's training rows (of
        equals, the smallest). Raises `DataError` for an attribute that this data does not have.
        """
        if name in self.attributes:
            return np.unique(self.attributes[name], return_inverse=True)[1].astype(np.int64)
        has_majority = self.y_train.ndim == 1 and self.targets is TargetType.CLASS
        if name == "majority_label" and has_majority:
            return self._majority_labels()
        known = [*self.attributes, *(["majority_label"] if has_majority else [])]
        raise DataError(
            f"this data has no attribute {name!r} of clients",
            hint=f"known are {', '.join(known)}" if known else "it has none at all: choose another selection",
        )

    def clients_with(self, label: int) -> NDArray[np.int64]:
        """Return which clients have training rows with a label, in ascending order: O(rows + clients)."""
        has = self.y_train == label
        up_to = np.concatenate([[0], np.cumsum(has if has.ndim == 1 else has.any(axis=1))])
        return np.flatnonzero(up_to[self.train_rows.stops] > up_to[self.train_rows.starts])

    def label_counts(self, client: int) -> NDArray[np.int64]:
        """How often client number `client` has each label in its training rows, int64 [num_classes]."""
        labels = self.train(client)[1]
        return np.bincount(labels[labels != IGNORED], minlength=self.num_classes)

    def baselines(self) -> dict[str, float]:
        """Return how good guessing without a model is on the test rows; a model has to beat it.

        Empty when there are no test rows. Of numbers these are mean squared errors: `pooled_mean` predicts the mean of
        all training rows and, where clients have test rows, `client_mean` that of the client's own. Of classes they are
        accuracies. Where each row has one label: `pooled_majority` guesses the label that is most frequent in all
        training rows and, where clients have test rows, `client_majority` the one that is most frequent in the client's
        own (of equals, the smallest). Where each position has one: `unigram` is the former, and `bigram` guesses what
        most often follows the position's own token.
        """
        if not len(self.y_test):
            return {}
        if self.targets is TargetType.NUMBER:
            return self._mean_baselines()
        if self.y_train.ndim > 1:
            return self._token_baselines()
        pooled = np.bincount(self.y_train).argmax()
        found = {"pooled_majority": float(np.mean(self.y_test == pooled))}
        own_hits = own_rows = 0
        for client in np.flatnonzero(self.test_rows.lengths).tolist():
            _, y_test = self.test(client)
            own_hits += int(np.count_nonzero(y_test == self.label_counts(client).argmax()))
            own_rows += len(y_test)
        return found | ({"client_majority": own_hits / own_rows} if own_rows else {})

    def _mean_baselines(self) -> dict[str, float]:
        def squares(expected: Targets, known: Targets) -> Float64:
            return np.square(expected[~np.isnan(expected)] - np.nanmean(known, dtype=np.float64))

        found = {"pooled_mean": float(np.mean(squares(self.y_test, self.y_train)))}
        own = [
            squares(self.test(client)[1], self.train(client)[1])
            for client in np.flatnonzero(self.test_rows.lengths).tolist()
        ]
        return found | ({"client_mean": float(np.mean(np.concatenate(own)))} if own else {})

    def _token_baselines(self) -> dict[str, float]:
        known, asked = self.y_train != IGNORED, self.y_test != IGNORED
        labels, expected = self.y_train[known], self.y_test[asked]
        found = {"unigram": float(np.mean(expected == np.bincount(labels).argmax()))}
        if self.x_train.shape == self.y_train.shape and self.x_train.dtype == np.int64:
            tokens = int(max(self.x_train.max(), self.x_test.max())) + 1
            pairs = self.x_train[known] * self.num_classes + labels
            follows = np.bincount(pairs, minlength=tokens * self.num_classes).reshape(tokens, self.num_classes)
            found["bigram"] = float(np.mean(expected == follows.argmax(axis=1)[self.x_test[asked]]))
        return found

    def _majority_labels(self) -> NDArray[np.int64]:
        """Through sums up to each row, one label at a time: O(rows + clients), without n x C counts."""
        best, most = np.zeros(self.num_clients, np.int64), np.full(self.num_clients, -1)
        for label in range(self.num_classes):
            up_to = np.concatenate([[0], np.cumsum(self.y_train == label)])
            count = up_to[self.train_rows.stops] - up_to[self.train_rows.starts]
            best, most = np.where(count > most, label, best), np.maximum(count, most)
        return best

    def _check_clients(self) -> None:
        if not self.client_ids:
            raise DataError("there are no clients", hint="the data must have at least one client")
        if isinstance(self.client_ids, NumberedIds):
            return
        seen: set[str] = set()
        for client_id in self.client_ids:
            check_client_id(client_id)
            if client_id in seen:
                raise DataError(f"two clients have the id {client_id!r}", hint="give every client an id of its own")
            seen.add(client_id)

    def _check_part(self, part: str, x: Array, y: Array, rows: RowRanges) -> None:
        check_unmasked(x, f"{part} features")
        check_unmasked(y, f"{part} labels")
        if x.ndim < 2 or 0 in x.shape[1:]:
            raise DataError(
                f"{part} features have the shape {list(x.shape)}: there is no feature axis after the rows",
                hint="give [rows, features]; for a single feature, reshape to [rows, 1]",
            )
        if x.dtype not in (np.float32, np.int64):
            raise DataError(f"{part} features are {x.dtype}", hint="give float32 features, or int64 tokens")
        noun, dtype = ("label" if self.num_classes else "target"), self.targets.dtype
        if y.ndim not in (1, 2) or y.dtype != dtype:
            raise DataError(
                f"{part} {noun}s are {y.dtype} of shape {list(y.shape)}",
                hint=f"give one {dtype} {noun} for each row, or for each of its positions",
            )
        if len(x) != len(y):
            raise DataError(
                f"there are {len(x)} {part} rows of features and {len(y)} {noun}s", hint=f"give one {noun} for each row"
            )
        if rows.starts.shape != (self.num_clients,) or rows.stops.shape != (self.num_clients,):
            raise DataError(
                f"{part} rows are given to {len(rows.starts)} clients and there are {self.num_clients}",
                hint="give the first and last row of each client",
            )
        in_order = rows.starts[0] == 0 and np.array_equal(rows.starts[1:], rows.stops[:-1])
        if part == "test" and rows.lengths.any() and not in_order:
            raise DataError(
                "test rows do not lie in the order of the clients", hint="put those that no client owns at the end"
            )
        if np.any(rows.starts < 0) or np.any(rows.stops < rows.starts) or np.any(rows.stops > len(y)):
            raise DataError(
                f"{part} rows of a client lie outside the {len(y)} that there are",
                hint="a client's rows begin at 0 or later, and end at the number of rows or earlier",
            )
        allowed = (y >= 0) & (y < self.num_classes) if self.num_classes else np.isfinite(y)
        if y.ndim > 1:
            counted = self.targets.counted(y)
            allowed |= ~counted
            nothing = np.flatnonzero(~counted.any(axis=1))
            if nothing.size:
                raise DataError(
                    f"{self._where(part, rows, int(nothing[0]))} has no {noun} that counts",
                    hint=f"leave out rows whose {noun}s are all {self.targets.ignored}",
                )
        if not allowed.all():
            row, *position = (int(index) for index in np.argwhere(~allowed)[0])
            raise DataError(
                f"{self._where(part, rows, row)} has the {noun} {y[(row, *position)]}",
                hint=f"labels are whole numbers from 0 to {self.num_classes - 1} ({self.num_classes} classes)"
                if self.num_classes
                else "targets are finite numbers that float32 holds: leave out rows without one",
            )
        finite = np.isfinite(x)
        if not finite.all():
            row, *position = (int(index) for index in np.argwhere(~finite)[0])
            feature = position[0] if len(position) == 1 else position
            raise DataError(
                f"{self._where(part, rows, row)} has {x[(row, *position)]} as feature {feature}",
                hint="fill in or leave out rows with missing values, and scale features so that float32 holds them",
            )

    def _where(self, part: str, rows: RowRanges, row: int) -> str:
        owners = np.flatnonzero((rows.starts <= row) & (row < rows.stops))
        if not owners.size:
            return f"{part} row {row} (from 0), which no client owns,"
        client = int(owners[0])
        return f"client {self.client_ids[client]!r}, {part} row {row - int(rows.starts[client])} (from 0),"


def _no_training_rows(client_id: str) -> DataError:
    return DataError(f"client {client_id!r} has no training rows", hint="leave out clients without training rows")


def _are_alike(x: Array, other: Array) -> bool:
    return x.shape[1:] == other.shape[1:] and x.dtype == other.dtype


def _describe(x: Array) -> str:
    return f"{x.dtype} {list(x.shape[1:])}"
