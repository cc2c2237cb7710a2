"""Independent and identically distributed: every client has a random sample of the table."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from fedrounds.fl_components.data.client_ids import NumberedIds
from fedrounds.fl_components.data.federated import Array, Labels, RowRanges
from fedrounds.fl_components.data.partition.base import Assignment, PartitionRule, check_enough
from fedrounds.fl_components.errors import DataError


class Iid(PartitionRule):
    """The rows are shuffled and cut (McMahan et al., 2017, "Communication-efficient learning ...").

    Without `examples_per_client` all rows are dealt out, in parts that differ by one row at most. With it each client
    has that many: parts of their own while the rows suffice (what remains is left out), and otherwise windows of the
    shuffled table, evenly spaced, that overlap. That simulates a population larger than the data: a million clients
    are two tables of offsets. Neighbouring clients then share most of their rows.

    >>> dealt = Iid(num_clients=1_000_000, examples_per_client=20).deal(
    ...     np.zeros(60_000, np.int64), np.random.default_rng(0))
    >>> len(dealt.client_ids), dealt.rows.starts[-2:], dealt.rows.stops[-2:]
    (1000000, array([59979, 59980]), array([59999, 60000]))
    """

    kind: Literal["iid"] = "iid"
    num_clients: int = Field(ge=1)
    examples_per_client: int | None = Field(default=None, ge=1)

    def known_num_clients(self) -> int:
        return self.num_clients

    def deal(self, labels_M: Labels, generator: np.random.Generator, owners_M: Array | None = None) -> Assignment:
        num_rows, size = len(labels_M), self.examples_per_client
        if size is None:
            hint = f"make num_clients at most {num_rows}, or give examples_per_client: clients may then share rows"
            check_enough(num_rows, self.num_clients, 1, hint)
        elif size > num_rows:
            raise DataError(
                f"examples_per_client is {size} and there are {num_rows} rows",
                hint=f"make examples_per_client at most {num_rows}",
            )
        order = generator.permutation(num_rows)
        client_n = np.arange(self.num_clients)
        if size is None:  # the sizes of np.array_split: the first ones have the row more
            rows = RowRanges.consecutive(num_rows // self.num_clients + (client_n < num_rows % self.num_clients))
        elif self.num_clients * size <= num_rows:
            order, rows = order[: self.num_clients * size], RowRanges(client_n * size, (client_n + 1) * size)
        else:
            starts = client_n * (num_rows - size) // max(self.num_clients - 1, 1)
            rows = RowRanges(starts, starts + size)
        return Assignment(order, rows, NumberedIds(self.num_clients))
