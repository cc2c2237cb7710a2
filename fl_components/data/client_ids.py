"""Client ids: their form, and the generated ids of numbered clients."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final, overload

from fedrounds.fl_components.errors import DataError

CLIENT_ID: Final = re.compile(r"\w[\w.\- ]{0,99}")
"""Ids become part of metrics' names, and of those of ledgers (POPULATION/CLIENT)."""


class NumberedIds(Sequence[str]):
    """The ids of n simulated clients: made when asked for, never held.

    >>> ids = NumberedIds(1_000_000)
    >>> len(ids), ids[41]
    (1000000, 'client-000041')
    """

    def __init__(self, num_clients: int) -> None:
        self._num_clients = num_clients
        self._digits = max(4, len(str(num_clients - 1)))

    def __len__(self) -> int:
        return self._num_clients

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[each] for each in range(*row.indices(self._num_clients))]
        return f"client-{range(self._num_clients)[row]:0{self._digits}d}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NumberedIds) and len(self) == len(other)

    def __hash__(self) -> int:
        return hash(self._num_clients)


def check_client_id(client_id: Any, where: str = "") -> None:
    """Raise `DataError` for what cannot be a client's id; `where` is what the message begins with.

    >>> check_client_id("ward 7"), check_client_id("7/north")
    Traceback (most recent call last):
    fedrounds.fl_components.errors.DataError: client id '7/north' cannot be used
    """
    if not isinstance(client_id, str) or not CLIENT_ID.fullmatch(client_id):
        raise DataError(
            f"{where}client id {client_id!r} cannot be used",
            hint="an id is text of 1 to 100 letters, digits, '_', '.', '-' and spaces, and begins with a letter, a "
            "digit or '_'",
        )
