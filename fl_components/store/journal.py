"""The journal: append-only, each row chained by sha256 over its content and the row before.

A changed, removed, added or re-ordered row breaks the chain. A cut tail with a head rewritten to match, or a restored
backup, does not: for that, compare `JournalReport` with an anchor kept outside the store.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, insert, select, update

from fl_components.errors import JournalBroken
from fl_components.store.records import JournalReport, JournalRow
from fl_components.store.schema import AnyRow, canonical_json, database_clock
from fl_components.store.schema import journal as journal_table
from fl_components.store.schema import journal_head as head_table

GENESIS: Final = "0" * 64
"""What the first row has as its `previous`."""


class Link(NamedTuple):
    """A row as it is stored: `content` is the canonical JSON text that was hashed."""

    sequence: int
    at: float
    run_id: str | None
    kind: str
    content: str
    previous: str
    hash: str


def link(sequence: int, at: float, run_id: str | None, kind: str, content: dict[str, Any], previous: str) -> Link:
    """The next row of a chain whose last row has the hash `previous`."""
    text = canonical_json(content)
    return Link(sequence, at, run_id, kind, text, previous, _hash(sequence, at, run_id, kind, text, previous))


def _hash(sequence: int, at: float, run_id: str | None, kind: str, content: str, previous: str) -> str:
    return hashlib.sha256(canonical_json([sequence, at, run_id, kind, content, previous]).encode()).hexdigest()


def check_chain(links: Iterable[Link], report: JournalReport) -> None:
    """Raises `JournalBroken`, naming the first wrong row, unless `links` are the whole chain that `report` sums up."""
    hint = "restore the database from a backup, and compare it with the journal's anchors"
    sequence, previous = 0, GENESIS
    for row in links:
        sequence += 1
        if row.sequence != sequence:
            raise JournalBroken(f"journal row {sequence} is missing: row {row.sequence} stands in its place", hint=hint)
        if row.previous != previous:
            raise JournalBroken(f"journal row {sequence} does not follow from the row before it", hint=hint)
        if row.hash != _hash(*row[:-1]):
            raise JournalBroken(f"journal row {sequence} has been changed", hint=hint)
        previous = row.hash
    if (sequence, previous) != (report.rows, report.head):
        raise JournalBroken(
            f"the journal has {sequence} rows ending in {previous[:12]}, "
            f"its head says {report.rows} ending in {report.head[:12]}",
            hint=hint,
        )


def lock(connection: Connection) -> tuple[int, str, float]:
    """Locks the head row, which serialises appends; returns the count of rows, the last hash and the time.

    A transaction takes this lock after the lease's, never before.
    """
    head = select(head_table.c.rows, head_table.c.hash, database_clock()).with_for_update()
    rows, last_hash, now = connection.execute(head).one()
    return rows, last_hash, now


def append(connection: Connection, run_id: str | None, kind: str, content: dict[str, Any]) -> Link:
    """Adds a row in the caller's transaction and returns it; its `at` is the time of the whole transaction."""
    rows, last_hash, now = lock(connection)
    row = link(rows + 1, now, run_id, kind, content, last_hash)
    connection.execute(insert(journal_table).values(row._asdict()))
    connection.execute(update(head_table).values(rows=row.sequence, hash=row.hash))
    return row


def read(connection: Connection, run_id: str | None, after: int, limit: int) -> list[JournalRow]:
    """Up to `limit` rows past sequence `after`, of one run or of all."""
    query = select(journal_table).where(journal_table.c.sequence > after).order_by(journal_table.c.sequence)
    if run_id is not None:
        query = query.where(journal_table.c.run_id == run_id)
    links = _links(connection.execute(query.limit(limit)))
    return [JournalRow(**{**row._asdict(), "content": json.loads(row.content)}) for row in links]


def verify(connection: Connection) -> JournalReport:
    """Checks the whole chain as one transaction sees it. Raises `JournalBroken`."""
    heads = connection.execute(select(head_table.c.rows, head_table.c.hash)).all()
    if len(heads) != 1:
        raise JournalBroken(f"the journal has {len(heads)} heads instead of one", hint="restore a backup")
    report = JournalReport(*heads[0])
    query = select(journal_table).order_by(journal_table.c.sequence).execution_options(yield_per=1000)
    check_chain(_links(connection.execute(query)), report)
    return report


def _links(rows: Iterable[AnyRow]) -> Iterator[Link]:
    return (Link(*row) for row in rows)
