"""The journal: append-only; each row chained by sha256 over its content and the row before, and signed by the hub.

A changed, removed, added or re-ordered row breaks the chain, and whoever makes the chain anew lacks the key to sign it
(Ed25519, RFC 8032). A cut tail and a restored backup break neither: they are found beside an anchor, a count of rows
and the last one's hash that was kept somewhere else.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, insert, select, update

from fedrounds.fl_components.canonical import canonical_json
from fedrounds.fl_components.errors import JournalBroken
from fedrounds.fl_components.store.keys import SigningKey, is_signed
from fedrounds.fl_components.store.records import Anchor, JournalReport, JournalRow
from fedrounds.fl_components.store.schema import AnyRow, database_clock
from fedrounds.fl_components.store.schema import journal as journal_table
from fedrounds.fl_components.store.schema import journal_head as head_table

GENESIS: Final = "0" * 64
"""What the first row has as its `previous`."""

SECRET_REPLACED: Final = "secret.replaced"
"""The kind of row that a fresh collection appends."""

RESTORE: Final = "restore the database from a backup, and compare it with the journal's anchors"


class Link(NamedTuple):
    """A row as it is stored: `content` is the canonical JSON text that was hashed, `signature` is over the hash."""

    sequence: int
    at: float
    run_id: str | None
    kind: str
    content: str
    previous: str
    hash: str
    key_id: str
    signature: str


def link(
    key: SigningKey, sequence: int, at: float, run_id: str | None, kind: str, content: dict[str, Any], previous: str
) -> Link:
    """The next row of a chain whose last row has the hash `previous`."""
    text = canonical_json(content)
    hash = _hash(sequence, at, run_id, kind, text, previous)
    return Link(sequence, at, run_id, kind, text, previous, hash, key.id, key.sign(hash))


def _hash(sequence: int, at: float, run_id: str | None, kind: str, content: str, previous: str) -> str:
    return hashlib.sha256(canonical_json([sequence, at, run_id, kind, content, previous]).encode()).hexdigest()


def check_chain(
    links: Iterable[Link], report: JournalReport, trusted: Mapping[str, bytes], anchors: Iterable[Anchor] = ()
) -> None:
    """Raises `JournalBroken`, naming the first wrong row, unless `links` are the whole chain that `report` sums up, all
    signed by `trusted` keys (id -> public key), and each anchor is one of its rows."""
    anchored: dict[int, list[Anchor]] = {}
    for anchor in sorted(anchors, key=lambda each: each.rows):
        anchored.setdefault(anchor.rows, []).append(anchor)  # one that fits must not hide one that does not
    sequence, previous = 0, GENESIS
    for row in links:
        sequence += 1
        if row.sequence != sequence:
            raise JournalBroken(
                f"journal row {sequence} is missing: row {row.sequence} stands in its place", hint=RESTORE
            )
        if row.previous != previous:
            raise JournalBroken(f"journal row {sequence} does not follow from the row before it", hint=RESTORE)
        if row.hash != _hash(*row[:6]):
            raise JournalBroken(f"journal row {sequence} has been changed", hint=RESTORE)
        if row.key_id not in trusted:
            raise JournalBroken(
                f"journal row {sequence} is signed by the key {row.key_id}, which this home does not trust",
                hint="where another hub shares this database, `fedrounds journal trust KEY` with what "
                "`fedrounds journal key` prints there; else the journal was made anew",
            )
        if not is_signed(row.hash, row.signature, trusted[row.key_id]):
            raise JournalBroken(f"the signature of journal row {sequence} is wrong", hint=RESTORE)
        previous = row.hash
        for anchor in anchored.pop(sequence, ()):
            if anchor.head != row.hash:
                raise JournalBroken(
                    f"journal row {sequence} is not the one that {anchor.where} has: the journal was made anew",
                    hint=RESTORE,
                )
    if (sequence, previous) != (report.rows, report.head):
        raise JournalBroken(
            f"the journal has {sequence} rows ending in {previous[:12]}, its head says {report.rows} ending in "
            f"{report.head[:12]}",
            hint=RESTORE,
        )
    for anchor in itertools.chain.from_iterable(anchored.values()):
        raise JournalBroken(
            f"the journal has {sequence} rows, but {anchor.where} has its row {anchor.rows}: its tail was cut, or an "
            "older database was put in its place",
            hint=RESTORE,
        )


def lock(connection: Connection) -> tuple[int, str, float]:
    """Locks the head row, which serialises appends; returns the count of rows, the last hash and the time.

    It is the last lock of a transaction: `database` has the order.
    """
    head = select(head_table.c.rows, head_table.c.hash, database_clock()).with_for_update()
    rows, last_hash, now = connection.execute(head).one()
    return rows, last_hash, now


def append(connection: Connection, key: SigningKey, run_id: str | None, kind: str, content: dict[str, Any]) -> Link:
    """Adds a row in the caller's transaction and returns it; its `at` is the time of the whole transaction."""
    rows, last_hash, now = lock(connection)
    row = link(key, rows + 1, now, run_id, kind, content, last_hash)
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


def read_kind(connection: Connection, run_id: str | None, kind: str, *, after: int = 0) -> list[dict[str, Any]]:
    """The contents of the rows of one kind past sequence `after`, of one run or of all."""
    query = select(journal_table.c.content).where(journal_table.c.kind == kind, journal_table.c.sequence > after)
    if run_id is not None:
        query = query.where(journal_table.c.run_id == run_id)
    return [json.loads(content) for content in connection.scalars(query.order_by(journal_table.c.sequence))]


def acknowledged(connection: Connection, run_id: str | None = None) -> set[tuple[int, str]]:
    """The anchors, each as (rows, head), that a fresh collection of a run (or of any) took for lost."""
    rows = read_kind(connection, run_id, SECRET_REPLACED)
    return {(count, head) for content in rows for count, head in content["anchors"]}


def contents(connection: Connection, sequences: Collection[int]) -> dict[int, dict[str, Any]]:
    """The contents of these rows, by their numbers."""
    wanted, found = sorted(sequences), {}
    for start in range(0, len(wanted), 500):
        page = journal_table.c.sequence.in_(wanted[start : start + 500])
        for row in connection.execute(select(journal_table.c.sequence, journal_table.c.content).where(page)):
            found[row.sequence] = json.loads(row.content)
    return found


def verify(connection: Connection, trusted: Mapping[str, bytes], anchors: Iterable[Anchor] = ()) -> JournalReport:
    """Checks the whole chain as one transaction sees it. Raises `JournalBroken`."""
    report = head(connection)
    query = select(journal_table).order_by(journal_table.c.sequence).execution_options(yield_per=1000)
    check_chain(_links(connection.execute(query)), report, trusted, anchors)
    return report


def head(connection: Connection) -> JournalReport:
    """How many rows there are, and the hash of the last. Raises `JournalBroken`."""
    heads = connection.execute(select(head_table.c.rows, head_table.c.hash)).all()
    if len(heads) != 1:
        raise JournalBroken(f"the journal has {len(heads)} heads instead of one", hint="restore a backup")
    return JournalReport(*heads[0])


def begun_by(connection: Connection) -> str | None:
    """The id of the key that signed the first row; None where there is no row."""
    return connection.execute(select(journal_table.c.key_id).where(journal_table.c.sequence == 1)).scalar()


def hash_of(connection: Connection, sequence: int) -> str | None:
    """The hash of a row (0: of none); None where there is no such row."""
    if sequence == 0:
        return GENESIS
    return connection.execute(select(journal_table.c.hash).where(journal_table.c.sequence == sequence)).scalar()


def _links(rows: Iterable[AnyRow]) -> Iterator[Link]:
    return (Link(*row) for row in rows)
