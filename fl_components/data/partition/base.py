"""What every partition rule does: deal the rows of one table out to clients."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedrounds.fl_components import randomness
from fedrounds.fl_components.data.client_ids import NumberedIds
from fedrounds.fl_components.data.federated import Array, Features, FederatedData, Labels, RowRanges
from fedrounds.fl_components.data.fingerprints import Fingerprints, of_arrays, of_data
from fedrounds.fl_components.errors import DataError
from fedrounds.fl_components.rules import Rule

Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Assignment:
    """Which rows are whose: client i owns the rows `order[rows.starts[i] : rows.stops[i]]` of the table.

    Args:
      order: numbers of rows of the table, int64 [K], none of them twice. K may be less than all rows.
      rows: each client's part of `order`.
      client_ids: the clients' names.
      owners: in a natural partition the owner that each client is, sorted [n]; otherwise None.
    """

    order: Rows
    rows: RowRanges
    client_ids: Sequence[str]
    owners: Array | None = None

    @classmethod
    def by_client(cls, client_M: Rows, num_clients: int, generator: np.random.Generator) -> Assignment:
        """Row j of the table goes to client `client_M[j]`; a client's rows lie in random order."""
        shuffled = generator.permutation(len(client_M))
        order = shuffled[np.argsort(client_M[shuffled], kind="stable")]
        lengths = np.bincount(client_M, minlength=num_clients)
        return cls(order, RowRanges.consecutive(lengths), NumberedIds(num_clients))


class PartitionRule(Rule):
    """How the rows of one table are dealt out to clients."""

    kind: str

    @abstractmethod
    def known_num_clients(self) -> int | None:
        """How many clients there will be, where that is known before loading."""

    @abstractmethod
    def deal(self, labels_M: Labels, generator: np.random.Generator, owners_M: Array | None = None) -> Assignment:
        """Deal out a table of M rows, of which the labels are known and perhaps who made them (`owners_M`).

        Raises `DataError` when a client would be left without rows.
        """


def generator(seed: int) -> np.random.Generator:
    """The random numbers of the partition: a public draw, from the configuration's seed."""
    return randomness.generator(seed, 0, "partition")


def federate(
    partition: PartitionRule,
    seed: int,
    train: tuple[Array, Labels],
    test: tuple[Array, Labels],
    *,
    num_classes: int,
    class_names: tuple[str, ...] = (),
    public: bool,
    owners_M: Array | None = None,
    test_owners: Array | None = None,
) -> FederatedData:
    """A data set with a test set of its own, dealt out to clients.

    Features that are uint8 pixels become float32 in [0, 1]. No client owns test rows, unless the partition is by owners
    and `test_owners` says whose they are; those of an owner without training rows stay nobody's.
    """
    (x_train, y_train), (x_test, y_test) = train, test
    dealt = partition.deal(y_train, generator(seed), owners_M)
    num_clients = len(dealt.client_ids)
    nothing = np.broadcast_to(np.int64(0), num_clients)
    test_rows = RowRanges(nothing, nothing)
    if dealt.owners is not None and test_owners is not None:
        client = np.minimum(np.searchsorted(dealt.owners, test_owners), num_clients - 1)
        client = np.where(dealt.owners[client] == test_owners, client, num_clients)
        order = np.argsort(client, kind="stable")
        x_test, y_test = x_test[order], y_test[order]
        test_rows = RowRanges.consecutive(np.bincount(client, minlength=num_clients)[:num_clients])
    return FederatedData(
        client_ids=dealt.client_ids,
        x_train=_features(x_train[dealt.order]),
        y_train=y_train[dealt.order],
        train_rows=dealt.rows,
        x_test=_features(x_test),
        y_test=y_test,
        test_rows=test_rows,
        num_classes=num_classes,
        class_names=class_names,
        public=public,
        as_read=_pixels_as_read if x_train.dtype == np.uint8 else of_data,
    )


def check_enough(num_rows: int, num_clients: int, each: int, hint: str) -> None:
    """Raises `DataError` when there are not `each` rows for every client."""
    if num_clients * each > num_rows:
        raise DataError(
            f"{num_rows} rows cannot give {num_clients} clients {each} row(s) each: the partition would leave clients "
            "without",
            hint=hint,
        )


def _pixels_as_read(data: FederatedData, every_client: bool) -> Fingerprints:
    return of_arrays(data, every_client, lambda x: np.rint(x * 255))


def _features(x: Array) -> Features:
    if x.dtype != np.uint8:
        return x
    scaled = x.astype(np.float32)
    scaled /= 255
    return scaled
