"""Natural: whoever made a row owns it."""

from __future__ import annotations

from typing import Literal

import numpy as np

from fedrounds.fl_components.data.federated import Array, Labels, RowRanges
from fedrounds.fl_components.data.partition.base import Assignment, PartitionRule
from fedrounds.fl_components.errors import DataError


class Natural(PartitionRule):
    """One client for each owner that the data set names (FEMNIST's writers), with the owner's number in its id.

    >>> dealt = Natural().deal(np.zeros(4, np.int64), np.random.default_rng(0), owners_M=np.array([7, 2, 7, 7]))
    >>> dealt.client_ids, dealt.order
    (('client-0002', 'client-0007'), array([1, 0, 2, 3]))
    """

    kind: Literal["natural"] = "natural"

    def known_num_clients(self) -> None:
        return None

    def deal(self, labels_M: Labels, generator: np.random.Generator, owners_M: Array | None = None) -> Assignment:
        if owners_M is None:
            raise DataError(
                "partition natural needs data that says who made each row, and this data does not",
                hint="choose another partition, for instance iid; femnist has writers",
            )
        owners, lengths = np.unique(owners_M, return_counts=True)
        return Assignment(
            np.argsort(owners_M, kind="stable"),
            RowRanges.consecutive(lengths),
            tuple(f"client-{owner:04d}" for owner in owners.tolist()),
            owners,
        )
