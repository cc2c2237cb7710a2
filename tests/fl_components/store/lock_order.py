"""A checker of the order in which transactions lock rows (fl_components/store/database.py has the order).

It reads the statements, not the database's locks: what would deadlock on PostgreSQL is also seen on SQLite.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import BindParameter, Connection, Engine, Insert, Select, Update, event
from sqlalchemy.dialects import sqlite
from sqlalchemy.sql import visitors

from fedrounds.fl_components.store.schema import budgets, journal_head, leases

Key = tuple[bool, str]


@dataclass
class _Locks:
    """What one transaction has locked."""

    lease: bool = False
    head: bool = False
    names: set[str] = field(default_factory=set)
    last: Key = (False, "")


class LockOrder:
    """Listens to all statements; `violations` has a sentence for each that breaks the order."""

    def __init__(self) -> None:
        self.violations: list[str] = []
        self._locks: WeakKeyDictionary[Any, _Locks] = WeakKeyDictionary()
        self._mutex = threading.Lock()

    def listen(
        self, connection: Connection, statement: Any, many: Sequence[Any], parameters: Mapping[str, Any], _: Any
    ) -> None:
        transaction = connection.get_transaction()
        if transaction is None:
            return
        with self._mutex:
            locks = self._locks.setdefault(transaction, _Locks())
        rows = list(many) or [parameters or {}]
        if isinstance(statement, Select) and statement._for_update_arg is not None:
            tables = set(statement.columns_clause_froms)
            if leases in tables:
                if locks.lease or locks.names or locks.head:
                    self._violate(locks, "locks a lease after other rows", statement)
                locks.lease = True
            if budgets in tables:
                self._lock_names(locks, _values(statement.whereclause, rows), statement)
            if journal_head in tables:
                locks.head = True
        elif isinstance(statement, Update) and statement.table is budgets:
            self._need(locks, _values(statement.whereclause, rows), statement)
        elif isinstance(statement, Insert):
            if statement.table is budgets:
                locks.names |= set(_inserted(statement, rows, "account"))  # new rows: nobody waits for them
            for key in statement.table.foreign_keys:
                if key.column.table is budgets:
                    self._need(locks, _inserted(statement, rows, key.parent.name), statement)

    def _lock_names(self, locks: _Locks, names: Sequence[str], statement: Any) -> None:
        for name in sorted(set(names) - locks.names, key=_key):
            if locks.head:
                self._violate(locks, f"locks {name!r} after the journal's head", statement)
            elif _key(name) < locks.last:
                self._violate(locks, f"locks {name!r} after {locks.last[1]!r}", statement)
            locks.last = max(locks.last, _key(name))
            locks.names.add(name)

    def _need(self, locks: _Locks, names: Sequence[str], statement: Any) -> None:
        """A write that locks these rows, or waits for whoever has them."""
        self._lock_names(locks, names, statement)

    def _violate(self, locks: _Locks, what: str, statement: Any) -> None:
        text = statement.compile(dialect=sqlite.dialect())
        self.violations.append(f"a transaction {what}: {' '.join(str(text).split())}")


def _key(name: str) -> Key:
    return (not name.endswith("/*"), name)


def _values(clause: Any, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The strings that a condition compares with."""
    found: list[str] = []
    for element in visitors.iterate(clause):
        if isinstance(element, BindParameter):
            given = [row[element.key] for row in rows if element.key in row] or [element.value]
            for value in given:
                found += map(str, value if isinstance(value, list | tuple | set) else [value])
    return found


def _inserted(statement: Insert, rows: Sequence[Mapping[str, Any]], column: str) -> list[str]:
    inline = {getattr(key, "name", key): value for key, value in (statement._values or {}).items()}
    if column in inline:
        return [str(inline[column].value)]
    return [str(row[column]) for row in rows if column in row]


@contextmanager
def checked() -> Iterator[LockOrder]:
    """The checker of all statements of this process inside."""
    order = LockOrder()
    event.listen(Engine, "before_execute", order.listen)
    try:
        yield order
    finally:
        event.remove(Engine, "before_execute", order.listen)
