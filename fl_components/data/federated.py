"""FederatedData: every client's examples, checked, in a few arrays.

Clients' rows lie one after another in one array, so that a million clients cost a million offsets and not a million
objects, and one client's rows are a view.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fl_components.errors import DataError

Features = NDArray[np.float32] | NDArray[np.int64]
Labels = NDArray[np.int64]
Array = NDArray[Any]

_CLIENT_ID = re.compile(r"\w[\w.\- ]{0,99}")  # ids become part of metrics' names


class ClientExamples(NamedTuple):
    """One client's own examples: training rows, and test rows (none: arrays of length 0)."""

    x_train: Features
    y_train: Labels
    x_test: Features
    y_test: Labels


@dataclass(frozen=True, slots=True, eq=False)
class FederatedData:
    """The examples of n clients, M rows in all.

    Client i owns the rows `offsets[i]:offsets[i + 1]`. Every client has training rows; one without test rows is left
    out of the evaluation. Construction raises `DataError` for data that cannot be trained on, naming client and row.

    Args:
      client_ids: n distinct names (letters, digits, ``_ . -`` and spaces; at most 100 characters).
      x_train, x_test: features [M, ...], float32, or int64 for tokens; equal shapes after the first axis.
      y_train, y_test: labels [M] int64 in [0, num_classes).
      train_offsets, test_offsets: [n + 1] int64, from 0 to M.
      num_classes: how many labels there are (2 or more).
      public: True for a data set that anyone may download: nothing about it needs to be withheld.

    >>> data = FederatedData.from_clients(
    ...     {"a": ClientExamples(np.zeros((3, 2), np.float32), np.array([0, 1, 1]),
    ...                          np.zeros((1, 2), np.float32), np.array([1]))},
    ...     num_classes=2, public=True)
    >>> data.num_clients, data.input_shape, data.num_examples(0), data.baselines()["pooled_majority"]
    (1, (2,), 3, 1.0)
    """

    client_ids: Sequence[str]
    x_train: Features
    y_train: Labels
    train_offsets: NDArray[np.int64]
    x_test: Features
    y_test: Labels
    test_offsets: NDArray[np.int64]
    num_classes: int
    public: bool

    def __post_init__(self) -> None:
        self._check_clients()
        if self.num_classes < 2:
            raise DataError(
                f"the data has {self.num_classes} class(es): there is nothing to tell apart",
                hint="labels are whole numbers from 0; at least two different ones are needed",
            )
        self._check_part("training", self.x_train, self.y_train, self.train_offsets)
        self._check_part("test", self.x_test, self.y_test, self.test_offsets)
        if self.x_test.shape[1:] != self.x_train.shape[1:] or self.x_test.dtype != self.x_train.dtype:
            raise DataError(
                f"training rows are {_describe(self.x_train)} and test rows {_describe(self.x_test)}",
                hint="prepare both in the same way",
            )
        without = np.flatnonzero(np.diff(self.train_offsets) == 0)
        if without.size:
            raise _no_training_rows(self.client_ids[int(without[0])])

    @classmethod
    def from_clients(cls, clients: Mapping[str, ClientExamples], *, num_classes: int, public: bool) -> FederatedData:
        """Join the examples of single clients, whose shapes and types must be equal."""
        if not clients:
            raise DataError("there are no clients", hint="the data must have at least one client")
        examples = list(clients.values())
        first = examples[0].x_train
        for client_id, example in clients.items():
            if not len(example.x_train):
                raise _no_training_rows(client_id)
            for part in (example.x_train, example.x_test):
                if len(part) and (part.shape[1:] != first.shape[1:] or part.dtype != first.dtype):
                    raise DataError(
                        f"client {client_id!r} has rows of {_describe(part)}, and client {next(iter(clients))!r} of "
                        f"{_describe(first)}",
                        hint="give all clients the same features and the same type of numbers",
                    )
        x_test: Sequence[Array] = [example.x_test for example in examples if len(example.x_test)] or [first[:0]]
        return cls(
            client_ids=tuple(clients),
            x_train=np.concatenate([example.x_train for example in examples]),
            y_train=np.concatenate([example.y_train for example in examples]),
            train_offsets=_offsets([len(example.x_train) for example in examples]),
            x_test=np.concatenate(x_test),
            y_test=np.concatenate([example.y_test for example in examples]),
            test_offsets=_offsets([len(example.x_test) for example in examples]),
            num_classes=num_classes,
            public=public,
        )

    @property
    def num_clients(self) -> int:
        return len(self.client_ids)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one row's features."""
        return self.x_train.shape[1:]

    def train(self, client: int) -> tuple[Features, Labels]:
        """Client number `client`'s training rows: views of features and labels."""
        rows = slice(self.train_offsets[client], self.train_offsets[client + 1])
        return self.x_train[rows], self.y_train[rows]

    def test(self, client: int) -> tuple[Features, Labels]:
        """Client number `client`'s test rows (perhaps none): views of features and labels."""
        rows = slice(self.test_offsets[client], self.test_offsets[client + 1])
        return self.x_test[rows], self.y_test[rows]

    def num_examples(self, client: int) -> int:
        """How many training rows client number `client` has."""
        return int(self.train_offsets[client + 1] - self.train_offsets[client])

    def baselines(self) -> dict[str, float]:
        """Test accuracies, over all test rows, of guessing without a model; a model has to beat them.

        `pooled_majority` guesses the label that is most frequent in all training rows, `client_majority` the one that
        is most frequent in the client's own (of equals, the smallest). Empty when there are no test rows.
        """
        if not len(self.y_test):
            return {}
        own_hits = 0
        for client in np.flatnonzero(np.diff(self.test_offsets)).tolist():
            _, y_train = self.train(client)
            _, y_test = self.test(client)
            own_hits += int(np.count_nonzero(y_test == np.bincount(y_train).argmax()))
        pooled = np.bincount(self.y_train).argmax()
        return {
            "pooled_majority": float(np.mean(self.y_test == pooled)),
            "client_majority": own_hits / len(self.y_test),
        }

    def _check_clients(self) -> None:
        if not self.client_ids:
            raise DataError("there are no clients", hint="the data must have at least one client")
        seen: set[str] = set()
        for client_id in self.client_ids:
            if not isinstance(client_id, str) or not _CLIENT_ID.fullmatch(client_id):
                raise DataError(
                    f"client id {client_id!r} cannot be used",
                    hint="an id is text of 1 to 100 letters, digits, '_', '.', '-' and spaces, and begins with a "
                    "letter, a digit or '_'",
                )
            if client_id in seen:
                raise DataError(f"two clients have the id {client_id!r}", hint="give every client an id of its own")
            seen.add(client_id)

    def _check_part(self, part: str, x: Array, y: Array, offsets: Array) -> None:
        if x.ndim < 2 or 0 in x.shape[1:]:
            raise DataError(
                f"{part} features have the shape {list(x.shape)}: there is no feature axis after the rows",
                hint="give [rows, features]; for a single feature, reshape to [rows, 1]",
            )
        if x.dtype not in (np.float32, np.int64):
            raise DataError(f"{part} features are {x.dtype}", hint="give float32 features, or int64 tokens")
        if y.ndim != 1 or y.dtype != np.int64:
            raise DataError(
                f"{part} labels are {y.dtype} of shape {list(y.shape)}", hint="give one int64 label for each row"
            )
        if len(x) != len(y):
            raise DataError(
                f"there are {len(x)} {part} rows of features and {len(y)} labels", hint="give one label for each row"
            )
        if (
            offsets.shape != (self.num_clients + 1,)
            or offsets.dtype != np.int64
            or offsets[0] != 0
            or offsets[-1] != len(y)
            or np.any(np.diff(offsets) < 0)
        ):
            raise DataError(
                f"{part} offsets do not cut {len(y)} rows into {self.num_clients} clients",
                hint="give int64 offsets [clients + 1] that rise from 0 to the number of rows",
            )
        wrong_label = np.flatnonzero((y < 0) | (y >= self.num_classes))
        if wrong_label.size:
            row = int(wrong_label[0])
            raise DataError(
                f"{self._where(part, offsets, row)} has the label {y[row]}",
                hint=f"labels are whole numbers from 0 to {self.num_classes - 1} ({self.num_classes} classes)",
            )
        finite = np.isfinite(x)
        if not finite.all():
            row, *position = (int(index) for index in np.argwhere(~finite)[0])
            feature = position[0] if len(position) == 1 else position
            raise DataError(
                f"{self._where(part, offsets, row)} has {x[(row, *position)]} as feature {feature}",
                hint="fill in or leave out rows with missing values, and scale features so that float32 holds them",
            )

    def _where(self, part: str, offsets: Array, row: int) -> str:
        client = int(np.searchsorted(offsets, row, side="right")) - 1
        return f"client {self.client_ids[client]!r}, {part} row {row - int(offsets[client])} (from 0),"


def _no_training_rows(client_id: str) -> DataError:
    return DataError(f"client {client_id!r} has no training rows", hint="leave out clients without training rows")


def _offsets(lengths: Sequence[int]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _describe(x: Array) -> str:
    return f"{x.dtype} {list(x.shape[1:])}"
