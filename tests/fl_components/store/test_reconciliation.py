"""Whatever is changed in a table, `journal verify` names it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Boolean, Connection, Double, String, and_, select, text
from sqlalchemy import Column as SqlColumn

from fedrounds.fl_components.account import Account
from fedrounds.fl_components.errors import JournalBroken
from fedrounds.fl_components.run_state import RunState
from fedrounds.fl_components.store import BudgetTerms, Charges, RunRecord, Store
from fedrounds.fl_components.store.journal import verify
from fedrounds.fl_components.store.reconciliation import COVERED, NOT_COVERED, reconcile
from fedrounds.fl_components.store.schema import AccountText, AnyRow, JsonText, StateText, metadata

TERMS = BudgetTerms(
    epsilon=100.0, delta=1e-5, unit="client", neighbouring="add_or_remove", accountant="RDP", demonstration=False
)
OF_EXAMPLES = BudgetTerms(
    epsilon=100.0, delta=1e-5, unit="example", neighbouring="zero_out", accountant="RDP", demonstration=False
)
EVENT = {"kind": "gaussian", "noise_multiplier": 1.0}


def anybody(*_: Any) -> None:
    """A guard that refuses nothing."""


@pytest.fixture
def full(store: Store, new_run: Callable[..., RunRecord]) -> Store:
    """A store with rows in every table whose columns the journal vouches for."""
    store.ledger.set_budget(Account("p"), TERMS, reason="x", by="ada")
    store.ledger.set_budget(Account("p").template, OF_EXAMPLES, reason="x", by="ada")
    store.ledger.register([Account("p", "a"), Account("p", "b")])
    store.memberships.fingerprint_key()
    store.create_sweep(sweep_id="s", name="n", config={"seed": 0}, over=[("seed", [1, 2])], source_folder="/s")
    new_run("r")
    new_run("s-001", sweep_id="s", ancestor="run:r")
    digests = {"r" + "1" * 32: "a", "r" + "2" * 32: "b", "w" + "3" * 32: "b"}
    units = ["client", "example"]
    store.memberships.enter(run_id="r", name="n", population="p", units=units, digests=digests, check=anybody)
    store.memberships.enter(run_id="s-001", name="n", population="q", units=[], digests={}, check=anybody)
    for run_id, rounds in (("r", 3), ("s-001", 1)):
        with store.acquire(run_id) as lease:
            lease.begin_attempt()
            for round in range(1, rounds + 2):
                of_clients = Charges({Account("p", "a"): EVENT, Account("p", "b"): EVENT}, anybody)
                collection = lease.reserve(round, [Charges({Account("p"): EVENT}, anybody), of_clients])
                lease.seal(round, collection, b"sum %d" % round)
                if round <= rounds:
                    result, withheld = {"metrics": {"privacy/epsilon": float(round)}}, {"metrics": {"train/loss": 0.5}}
                    digest = f"{round:064d}"
                    lease.commit(round, state=b"%d" % round, params_digest=digest, result=result, withheld=withheld)
            lease.finish(RunState.FAILED, {"code": "run_failed", "message": "the disk is full", "hint": None})
    store.verify_journal()
    return store


def changed(column: SqlColumn[Any], value: Any) -> Any:
    """Another value of the column's type and length."""
    match column.type:
        case Boolean():
            return not value
        case Double():
            return 1.5 if value is None else value + 1
        case JsonText():
            match value:
                case None:
                    return {"code": "changed"}
                case dict():
                    return value | {"changed": 1}
                case _:
                    return [*value, ['{"kind":"changed"}', 1]]
        case AccountText():
            return Account("changed")
        case StateText():
            return RunState.CANCELLED if value != RunState.CANCELLED else RunState.FAILED
        case String():
            return "changed" if not value else ("0" if value[0] == "1" else "1") + value[1:]
        case _:
            return 77 if value is None else value + 77


def allow_broken_references(connection: Connection) -> None:
    if connection.dialect.name == "sqlite":
        connection.execute(text("PRAGMA defer_foreign_keys = ON"))
    else:
        connection.execute(text("SET LOCAL session_replication_role = replica"))


def last_row(store: Store, table: str) -> AnyRow:
    order = [column.desc() for column in metadata.tables[table].primary_key]
    with store._database.snapshot() as connection:
        row = connection.execute(select(metadata.tables[table]).order_by(*order)).first()
    assert row is not None
    return row


def test_every_column_is_covered_or_left_out_for_a_reason() -> None:
    covered = {(table, column) for table, columns in COVERED.items() for column in columns}
    assert covered.isdisjoint(NOT_COVERED)
    in_schema = {(table.name, column.name) for table in metadata.sorted_tables for column in table.columns}
    assert covered | NOT_COVERED.keys() == in_schema
    assert all(len(reason) > 20 for reason in NOT_COVERED.values())


def test_a_change_of_any_covered_column_is_named(full: Store) -> None:
    for table_name, columns in COVERED.items():
        table, row = metadata.tables[table_name], last_row(full, table_name)
        for name in columns:
            column, before = table.c[name], getattr(row, name)
            this_row = and_(*(key == getattr(row, key.name) for key in table.primary_key))
            with pytest.raises(JournalBroken) as caught, full._transaction() as connection:
                allow_broken_references(connection)
                new = changed(column, before)
                assert connection.execute(table.update().where(this_row).values({name: new})).rowcount == 1
                if table_name.startswith("journal"):
                    verify(connection, full.keys.trusted)
                reconcile(connection)
                pytest.fail(f"a change of {table_name}.{name} from {before!r} to {new!r} is not noticed")
            told = caught.value.message
            subjects = [str(getattr(row, key.name)) for key in table.primary_key]
            if table_name in ("fingerprint_key", "bindings", "data_uses"):  # which the journal names by its rows
                subjects = ["row"]
            assert any(subject in told for subject in subjects), (table_name, name, told)
    full.verify_journal()


def test_what_differs_is_named_by_its_column(full: Store) -> None:
    changes = {
        "UPDATE runs SET name = 'x', ancestor = NULL WHERE run_id = 's-001'": r"runs .*: s-001 \(ancestor, name\)",
        "UPDATE rounds SET result = '{}' WHERE round = 2 AND run_id = 'r'": r"rounds .*: r round 2 \(result\)",
        "DELETE FROM rounds WHERE round = 2 AND run_id = 'r'": r"rounds .*: r round 2 \(missing\)",
        "DELETE FROM seals": r"seals .*: r round 4 \(missing\); s-001 round 2 \(missing\)",
        "UPDATE runs SET state = 'Completed', error = NULL": r"runs .*: r \(error, state\)",
        "UPDATE budgets SET epsilon = 8 WHERE account = 'p/a'": r"budgets .*: p/a \(epsilon\)",
    }
    for statement, message in changes.items():
        with pytest.raises(JournalBroken, match=message), full._transaction() as connection:
            connection.execute(text(statement))
            reconcile(connection)


def test_a_blob_that_a_row_names_must_be_there_and_whole(full: Store) -> None:
    (key,) = [row.state_key for row in full.rounds("r") if row.round == 3]
    blob = full.home / "blobs" / str(key)
    content = blob.read_bytes()
    blob.unlink()
    with pytest.raises(JournalBroken, match=r"state of r round 3 is not what was committed: blob .* is missing"):
        full.verify_journal()
    blob.write_bytes(b"other")
    with pytest.raises(JournalBroken, match=r"state of r round 3 .* is damaged"):
        full.verify_journal()
    blob.write_bytes(content)
    full.verify_journal()


def test_the_journal_confirms_no_guess_at_what_is_withheld(full: Store) -> None:
    """Its digests are under keys that stand beside the values: equal values have different digests."""
    committed = [row.content["digests"] for row in full.journal() if row.kind == "round.committed"]
    assert len({digests["withheld"] for digests in committed}) == len(committed) == 4


def test_a_kind_of_row_that_nothing_writes_is_refused(full: Store) -> None:
    with pytest.raises(JournalBroken, match="is of a kind, 'round"), full._transaction() as connection:
        full._append(connection, "r", "round.forged", {})
        reconcile(connection)


@pytest.mark.parametrize(
    ("table", "changed"),
    [
        ("bindings", {"population": "another"}),
        ("data_uses", {"run_id": "another"}),
        ("fingerprint_key", {"id": 7}),
    ],
)
def test_a_further_row_that_names_a_row_of_the_journal_is_noticed(
    full: Store, table: str, changed: dict[str, Any]
) -> None:
    with full._transaction() as connection:
        columns = metadata.tables[table]
        row = connection.execute(select(columns)).first()
        assert row is not None
        connection.execute(columns.insert().values(**{**row._mapping, **changed}))
    with pytest.raises(JournalBroken, match="again"):
        full.verify_journal()
