"""The chain: nothing in it can be changed, removed or re-ordered without notice."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from fedrounds.fl_components.errors import JournalBroken, StoreError
from fedrounds.fl_components.store import Anchor, JournalReport, RoundRecord, RunRecord, Store
from fedrounds.fl_components.store.journal import GENESIS, Link, check_chain, link, verify
from fedrounds.fl_components.store.keys import SigningKey
from fedrounds.fl_components.store.schema import journal
from tests.support import cases

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=3), children, max_size=3),
    max_leaves=5,
)
ROWS = st.lists(
    st.tuples(
        st.floats(0, 2e9), st.none() | st.text(max_size=5), st.text(max_size=5), st.dictionaries(st.text(), JSON)
    ),
    min_size=1,
    max_size=6,
)


KEY = SigningKey(bytes(32))
TRUSTED = {KEY.id: KEY.public}


def chain(rows: list[tuple[float, str | None, str, dict[str, object]]]) -> tuple[list[Link], JournalReport]:
    links: list[Link] = []
    previous = GENESIS
    for sequence, (at, run_id, kind, content) in enumerate(rows, start=1):
        links.append(link(KEY, sequence, at, run_id, kind, content, previous))
        previous = links[-1].hash
    return links, JournalReport(len(links), previous)


@given(ROWS)
@settings(deadline=None, max_examples=cases(60))
def test_an_untouched_chain_verifies(rows: list[tuple[float, str | None, str, dict[str, object]]]) -> None:
    links, report = chain(rows)
    check_chain(links, report, TRUSTED)


@given(ROWS, st.data())
@settings(deadline=None, max_examples=cases(60))
def test_any_change_is_found(rows: list[tuple[float, str | None, str, dict[str, object]]], data: st.DataObject) -> None:
    links, report = chain(rows)
    at = data.draw(st.integers(0, len(links) - 1))
    how = data.draw(st.sampled_from(["change", "remove", "add", "swap", *(["cut"] if len(links) > 1 else [])]))
    tampered = list(links)
    match how:
        case "change":
            field = data.draw(st.sampled_from(Link._fields))
            old = getattr(links[at], field)
            other: dict[str, st.SearchStrategy[object]] = {
                "sequence": st.integers(0, 99),
                "at": st.floats(0, 2e9),
                "run_id": st.none() | st.text(),
            }
            new = data.draw(other.get(field, st.text()).filter(lambda value: value != old))
            tampered[at] = links[at]._replace(**{field: new})
        case "remove":
            del tampered[at]
        case "add":
            tampered.insert(at, data.draw(st.sampled_from(links)))
        case "swap":
            other_at = data.draw(st.integers(0, len(links) - 1).filter(lambda n: n != at or len(links) == 1))
            tampered[at], tampered[other_at] = links[other_at], links[at]
            if tampered == links:
                return
        case "cut":
            tampered = links[:at]
    with pytest.raises(JournalBroken):
        check_chain(tampered, report, TRUSTED)


@pytest.fixture
def worked(
    store: Store, new_run: Callable[..., RunRecord], do_round: Callable[..., RoundRecord]
) -> tuple[Store, JournalReport]:
    """A store with two runs and eight rows of journal."""
    new_run("r")
    new_run("other")
    with store.acquire("r") as lease:
        do_round(lease, 1)
        do_round(lease, 2)
    return store, store.verify_journal()


def test_the_journal_tells_what_happened(worked: tuple[Store, JournalReport]) -> None:
    store, report = worked
    rows = list(store.journal())
    assert (report.rows, report.head) == (8, rows[-1].hash)
    assert [row.sequence for row in rows] == list(range(1, 9))
    assert [row.kind for row in rows if row.run_id == "r"] == [
        "run.created",
        *["charge.reserved", "round.sealed", "round.committed"] * 2,
    ]
    assert list(store.journal("other")) == [rows[1]]
    assert rows[2].content == {
        "fence": 1,
        "round": 1,
        "collection": 1,
        "charges": [],
    }
    sealed = rows[3].content
    (digest,) = sealed.pop("digests").values()
    assert sealed == {"fence": 1, "round": 1, "collection": 1}
    assert digest != hashlib.sha256(b"sum 1").hexdigest()  # which would confirm a guess at what was sealed
    assert all(before.hash == after.previous for before, after in itertools.pairwise(rows))


def test_rows_come_in_pages(worked: tuple[Store, JournalReport], monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = worked
    whole = list(store.journal())
    for page in (1, 3, 4, 8):
        monkeypatch.setattr("fedrounds.fl_components.store.store._PAGE", page)
        assert list(store.journal()) == whole


TAMPERINGS = [
    ("UPDATE journal SET content = replace(content, '\"round\":1', '\"round\":2')", "row 3 has been changed"),
    ("UPDATE journal SET at = at + 1 WHERE sequence = 5", "row 5 has been changed"),
    ("UPDATE journal SET run_id = NULL WHERE sequence = 5", "row 5 has been changed"),
    ("UPDATE journal SET hash = previous WHERE sequence = 5", "row 5 has been changed"),
    ("UPDATE journal SET previous = hash WHERE sequence = 5", "row 5 does not follow"),
    ("UPDATE journal SET signature = '00' WHERE sequence = 5", "signature of journal row 5 is wrong"),
    (
        "UPDATE journal SET key_id = 'f' WHERE sequence = 5",
        "row 5 is signed by the key f, which this home does not trust",
    ),
    ("DELETE FROM journal WHERE sequence = 4", "row 4 is missing"),
    ("DELETE FROM journal WHERE sequence = 8", "has 7 rows"),
    ("DELETE FROM journal", "has 0 rows"),
    ("UPDATE journal_head SET rows = 7", "its head says 7"),
    ("UPDATE journal_head SET hash = 'f'", "ending in f"),
    ("DELETE FROM journal_head", "0 heads"),
    (
        "UPDATE journal SET kind = b.kind, content = b.content, at = b.at, hash = b.hash FROM journal AS b "
        "WHERE journal.sequence + b.sequence = 9 AND journal.sequence IN (4, 5)",
        "row 4 has been changed",
    ),
    (
        "INSERT INTO journal SELECT 9, at, run_id, kind, content, hash, hash, key_id, signature FROM journal "
        "WHERE sequence = 8",
        "row 9 has been changed",
    ),
]


def test_tampering_is_found_and_named(worked: tuple[Store, JournalReport]) -> None:
    store, report = worked
    for statement, message in TAMPERINGS:
        with pytest.raises(JournalBroken, match=message), store._transaction() as connection:
            assert connection.execute(text(statement.replace(":", r"\:"))).rowcount > 0, statement
            verify(
                connection, store.keys.trusted
            )  # raises, so that the transaction is rolled back and the next one starts afresh
        assert store.verify_journal() == report


def remade(store: Store, key: SigningKey, rows: int) -> None:
    """The first rows of the journal, hashed and signed anew with another content, as if nothing else had ever been."""
    with store._transaction() as connection:
        links = [
            Link(*row)
            for row in connection.execute(text("SELECT * FROM journal ORDER BY sequence LIMIT :n"), {"n": rows})
        ]
        connection.execute(text("DELETE FROM journal"))
        previous = GENESIS
        for old in links:
            content = json.loads(old.content) | ({"round": 7} if old.sequence == 3 else {})
            new = link(key, old.sequence, old.at, old.run_id, old.kind, content, previous)
            connection.execute(journal.insert().values(new._asdict()))
            previous = new.hash
        connection.execute(text("UPDATE journal_head SET rows = :n, hash = :h"), {"n": rows, "h": previous})


class TestMadeAnew:
    """By somebody who can write to the database and knows how the chain is made."""

    def test_with_another_key(self, worked: tuple[Store, JournalReport]) -> None:
        store, _ = worked
        remade(store, SigningKey(b"7" * 32), 8)
        with pytest.raises(JournalBroken, match=r"row 1 is signed by the key .*, which this home does not trust"):
            store.verify_journal()

    def test_with_the_hubs_own_key_but_not_the_anchor(self, worked: tuple[Store, JournalReport]) -> None:
        store, _ = worked
        store.anchor()
        remade(store, store.keys.signing, 8)
        with pytest.raises(JournalBroken, match=r"row 8 is not the one that this home \(journal.anchor\) has"):
            store.verify_journal()

    @pytest.mark.parametrize("rows", [0, 5, 7])
    def test_a_cut_tail_with_a_head_to_match(self, worked: tuple[Store, JournalReport], rows: int) -> None:
        """Which is also what a restored backup looks like."""
        store, _ = worked
        store.anchor()
        before = list(store.journal())
        with store._transaction() as connection:
            connection.execute(text("DELETE FROM journal WHERE sequence > :n"), {"n": rows})
            head = before[rows - 1].hash if rows else GENESIS
            connection.execute(text("UPDATE journal_head SET rows = :n, hash = :h"), {"n": rows, "h": head})
        with pytest.raises(JournalBroken, match=f"has {rows} rows, but this home .* has its row 8"):
            store.verify_journal()

    def test_an_anchor_that_fits_hides_none_that_does_not(self, worked: tuple[Store, JournalReport]) -> None:
        """A restored backup that has grown to the old length again, and was anchored again."""
        store, report = worked
        now, lost = Anchor(report.rows, report.head, "MLflow (run new)"), Anchor(report.rows, "f" * 64, "MLflow (lost)")
        store.verify_journal([now])
        for anchors in ([now, lost], [lost, now]):
            with pytest.raises(JournalBroken, match=r"is not the one that MLflow \(lost\) has"):
                store.verify_journal(anchors)

    def test_an_anchor_that_tells_is_not_overwritten(
        self, worked: tuple[Store, JournalReport], new_run: Callable[..., RunRecord]
    ) -> None:
        """By the next training's, after an older database was put in its place."""
        store, _ = worked
        store.anchor()
        before = list(store.journal())
        with store._transaction() as connection:
            connection.execute(text("DELETE FROM journal WHERE sequence > 5"))
            connection.execute(text("UPDATE journal_head SET rows = 5, hash = :h"), {"h": before[4].hash})
        store.anchor()
        for n in range(9):
            new_run(f"later-{n}")
            store.anchor()
        with pytest.raises(JournalBroken, match="row 8 is not the one that this home"):
            store.verify_journal()

    def test_it_moves_on_with_a_journal_that_goes_on(
        self, worked: tuple[Store, JournalReport], new_run: Callable[..., RunRecord]
    ) -> None:
        store, _ = worked
        store.anchor()
        new_run("later")
        assert store.anchor().rows == store.own_anchors()[0].rows == 9
        assert store.verify_journal().rows == 9

    def test_an_anchor_from_elsewhere(self, worked: tuple[Store, JournalReport]) -> None:
        store, report = worked
        rows = list(store.journal())
        for row in rows:
            assert store.verify_journal([Anchor(row.sequence, row.hash, "MLflow")]) == report
        with pytest.raises(JournalBroken, match="row 4 is not the one that MLflow has"):
            store.verify_journal([Anchor(2, rows[1].hash, "MLflow"), Anchor(4, rows[4].hash, "MLflow")])
        with pytest.raises(JournalBroken, match="has 8 rows, but MLflow has its row 9"):
            store.verify_journal([Anchor(9, rows[4].hash, "MLflow")])

    def test_two_hubs_share_a_database(
        self, tmp_path: Path, worked: tuple[Store, JournalReport], database_url: str
    ) -> None:
        ours, _ = worked
        with Store.open(tmp_path / "theirs", database_url=database_url, blobs_url=ours._blobs.url) as theirs:
            refused = pytest.raises(StoreError, match=r"was begun by the hub key .* does not trust that one")
            with theirs.acquire("r") as lease, refused:
                lease.begin_attempt()
            theirs.keys.trust(ours.keys.signing.public.hex())
            with theirs.acquire("r") as lease:
                lease.begin_attempt()
            with pytest.raises(JournalBroken, match="row 9 is signed by the key"):
                ours.verify_journal()
            ours.keys.trust(theirs.keys.signing.public.hex())
            assert ours.verify_journal().rows == 9


def test_a_transaction_that_fails_leaves_no_row(worked: tuple[Store, JournalReport]) -> None:
    store, before = worked
    with store.acquire("r") as lease, pytest.raises(ZeroDivisionError), lease._fenced() as connection:
        lease._append(connection, "attempt.begun", {})
        raise ZeroDivisionError
    assert store.verify_journal() == before


def test_appends_of_many_threads_make_one_chain(
    open_store: Callable[..., Store], new_run: Callable[..., RunRecord]
) -> None:
    stores = [open_store() for _ in range(4)]
    for n in range(len(stores)):
        new_run(f"r{n}")

    def work(n: int) -> None:
        with stores[n].acquire(f"r{n}") as lease:
            for _ in range(5):
                lease.begin_attempt()

    threads = [threading.Thread(target=work, args=[n]) for n in range(len(stores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stores[0].verify_journal().rows == 4 + 4 * 5


def test_a_report_is_a_plain_value() -> None:
    assert dataclasses.astuple(JournalReport(0, GENESIS)) == (0, GENESIS)
