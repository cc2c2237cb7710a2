"""Whether the store is what its journal says: the journal's rows are signed, those of the other tables are not."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any, Final, TypeAlias

from sqlalchemy import Connection, select

from fedrounds.fl_components.account import Account
from fedrounds.fl_components.canonical import canonical_json
from fedrounds.fl_components.errors import JournalBroken
from fedrounds.fl_components.run_state import RunState
from fedrounds.fl_components.store import accounts, membership
from fedrounds.fl_components.store.journal import RESTORE
from fedrounds.fl_components.store.records import BudgetTerms, can_never_continue
from fedrounds.fl_components.store.schema import (
    AnyRow,
    bindings,
    budgets,
    charges,
    collections,
    column_digest,
    data_uses,
    fingerprint_key,
    fingerprints,
    rounds,
    runs,
    seals,
    sweeps,
    totals,
)
from fedrounds.fl_components.store.schema import journal as journal_table

COVERED: Final = {
    "runs": (
        *("run_id", "journal_sequence", "name", "population", "state", "rounds", "committed_round", "config"),
        *("config_digest", "params_digest", "ancestor", "engine", "source_folder", "attempt", "error", "created_at"),
        *("updated_at", "initial_state_key", "sweep_id", "digest_key", "secret_id", "secret_home"),
    ),
    "sweeps": tuple(sweeps.c.keys()),
    "rounds": tuple(rounds.c.keys()),
    "budgets": tuple(budgets.c.keys()),
    "collections": tuple(collections.c.keys()),
    "charges": tuple(charges.c.keys()),
    "totals": tuple(totals.c.keys()),
    "fingerprint_key": ("key_id", "host", "home", "journal_sequence"),
    "fingerprints": tuple(fingerprints.c.keys()),
    "bindings": tuple(bindings.c.keys()),
    "data_uses": tuple(data_uses.c.keys()),
    "seals": tuple(seals.c.keys()),
    "journal": tuple(journal_table.c.keys()),
    "journal_head": ("rows", "hash"),
}
"""The columns that `Store.verify_journal` holds to the journal. A test changes each of them."""

_VIEW: Final = (
    "an address in MLflow or Prefect, noted when that server answers, at no fixed place of the journal's order"
)

NOT_COVERED: Final[Mapping[tuple[str, str], str]] = {
    ("runs", "mlflow_run_id"): _VIEW,
    ("runs", "tracked_round"): "how far MLflow has followed; a wrong value makes MLflow lack rounds, the store none",
    ("runs", "model_uri"): _VIEW,
    ("runs", "prefect_flow_runs"): _VIEW,
    ("journal_head", "id"): "the same number for ever: it makes the table have one row",
    ("fingerprint_key", "id"): "the same number for ever: it makes the table have one row",
    **{
        ("leases", name): "who works on a run at this moment; it is renewed every few seconds and shown nowhere"
        for name in (
            *("run_id", "fence", "host", "boot_id", "pid_namespace", "pid", "process_started_s", "heartbeat_at"),
            "lapse_s",
        )
    },
    **{
        ("client_states", name): "what clients keep for later rounds: a blob's key is the hash of its content; the "
        "journal would need to name each cohort, which a privacy claim withholds"
        for name in ("run_id", "client", "round", "blob_key")
    },
    **{
        ("participations", name): "counts that a selection rule reads; shown nowhere. The journal would need to name "
        "each cohort, which a privacy claim withholds"
        for name in ("run_id", "client", "rounds", "last_round")
    },
    **{
        (
            "client_states",
            name,
        ): "what a simulated client keeps for its next round, which is shown nowhere; the name of "
        "its blob holds the digest of the content. The journal would need a row for each client"
        for name in ("run_id", "client", "round", "blob_key")
    },
}
"""The columns that nothing in the journal vouches for, each with the reason."""

Book: TypeAlias = "dict[str, Any]"
"""What the journal, or a table, says: for each subject a value, or one for each column."""


def reconcile(connection: Connection) -> None:
    """Raises `JournalBroken`, naming what differs, unless the tables' covered columns are what the journal says.

    The journal itself is to be verified before.
    """
    expected_books, stored = _journalled(connection), _stored(connection)
    for title, found in stored.items():
        expected = expected_books.get(title, {})
        if expected != found:
            differing = [key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)]
            shown = "; ".join(_difference(key, expected.get(key), found.get(key)) for key in sorted(differing)[:3])
            raise JournalBroken(f"{title} differ from what the journal says: {shown}", hint=RESTORE)


def _difference(subject: str, expected: Any, found: Any) -> str:
    """The subject, and where it has columns those that differ."""
    if expected is None:
        return f"{subject} (not in the journal)"
    if found is None:
        return f"{subject} (missing)"
    if type(expected) is not dict:  # a count of events, or one value
        return subject
    return f"{subject} ({', '.join(name for name in sorted(expected) if expected[name] != found.get(name))})"


def blobs_in_use(connection: Connection) -> dict[str, str]:
    """The blobs that rows refer to, by what they are."""
    states = select(rounds.c.run_id, rounds.c.round, rounds.c.state_key).where(rounds.c.state_key.is_not(None))
    found = {f"state of {_round(row.run_id, row.round)}": row.state_key for row in connection.execute(states)}
    dead = set()
    for run in connection.execute(select(runs.c.run_id, runs.c.state, runs.c.error, runs.c.initial_state_key)):
        if run.state != RunState.DELETED:
            found[f"initial state of {run.run_id}"] = run.initial_state_key
        if can_never_continue(run.state, run.error):
            dead.add(run.run_id)  # its seal is being erased
    for seal in connection.execute(select(seals.c.run_id, seals.c.round, seals.c.blob_key)):
        if seal.run_id not in dead:
            found[f"seal of {_round(seal.run_id, seal.round)}"] = seal.blob_key
    return found


class _JournalReader:
    """What the journal says, row by row."""

    def __init__(self) -> None:
        self.books: dict[str, Book] = defaultdict(dict)
        self._named: set[Account] = set()  # accounts that got their terms by their own name
        self._charged: list[tuple[str, str, str, str]] = []  # run, collection, account and event of each charge
        self._states: dict[str, dict[int, str | None]] = defaultdict(dict)  # of a run's rounds

    def read(self, row: AnyRow, content: dict[str, Any]) -> None:
        reader = getattr(self, "_" + row.kind.replace(".", "_"), None)
        if reader is None:
            raise JournalBroken(f"journal row {row.sequence} is of a kind, {row.kind!r}, that nothing writes")
        reader(row, content)

    def totals(self) -> None:
        """Add up the charges of each account, in each run and in all runs."""
        spent: dict[str, Counter[str]] = defaultdict(Counter)
        for run_id, collection, account, event in self._charged:
            if self.books["collections"][collection]["state"] != "voided":
                spent[account][event] += 1
                spent[f"{account} in {run_id}"][event] += 1
        self.books["totals"] = {**spent}

    def _budget_set(self, row: AnyRow, content: dict[str, Any]) -> None:
        books, account = self.books["budgets"], Account.parse(content["account"])
        terms = {each.name: content[each.name] for each in fields(BudgetTerms)}
        self._named.add(account)
        affected = {account}
        if account.is_template:
            affected |= {each for each in map(Account.parse, books) if each.template == account} - self._named
        values = {**terms, "journal_sequence": row.sequence, "set_at": row.at}
        books.update({str(each): dict(values) for each in affected})

    def _clients_registered(self, row: AnyRow, content: dict[str, Any]) -> None:
        books = self.books["budgets"]
        terms = books[content["account"]] | {"journal_sequence": row.sequence, "set_at": row.at}
        books.update({account: dict(terms) for account in content["clients"]})

    def _population_bound(self, row: AnyRow, content: dict[str, Any]) -> None:
        self.books["bindings"][f"row {row.sequence}"] = (content["population"], content["data_id"])

    def _data_used(self, row: AnyRow, content: dict[str, Any]) -> None:
        if content["data_id"] != membership.id_of({}):  # data without fingerprints have no rows
            self.books["data"][content["data_id"]] = content["data_id"]
        self.books["uses of data"][f"row {row.sequence}"] = {**content, "run_id": row.run_id, "at": row.at}

    def _fingerprints_key(self, row: AnyRow, content: dict[str, Any]) -> None:
        self.books["keys of fingerprints"][f"row {row.sequence}"] = content

    def _sweep_created(self, row: AnyRow, content: dict[str, Any]) -> None:
        values = {name: content[name] for name in ("name", "config", "over", "source_folder")}
        created = {"journal_sequence": row.sequence, "created_at": row.at}
        self.books["sweeps"][content["sweep_id"]] = values | created

    def _run_created(self, row: AnyRow, content: dict[str, Any]) -> None:
        named = ("name", "population", "rounds", "config_digest", "params_digest", "ancestor", "sweep_id")
        self.books["runs"][row.run_id] = {
            **{name: content[name] for name in (*named, "source_folder", "secret_id", "secret_home")},
            **content["digests"],
            "journal_sequence": row.sequence,
            "created_at": row.at,
            "updated_at": row.at,
            "state": RunState.PENDING,
            "committed_round": 0,
            "attempt": 0,
            "error": None,
        }

    def _attempt_begun(self, row: AnyRow, content: dict[str, Any]) -> None:
        begun = {"state": RunState.RUNNING, "attempt": content["attempt"], "error": None, "updated_at": row.at}
        self.books["runs"][row.run_id].update(begun)

    def _charge_reserved(self, row: AnyRow, content: dict[str, Any]) -> None:
        collection = _collection(row.run_id, content["round"], content["collection"])
        self.books["collections"][collection] = {
            "state": "reserved",
            "journal_sequence": row.sequence,
            "reserved_at": row.at,
            "settled_at": None,
        }
        for event, payers in content["charges"]:
            text = canonical_json(event)
            self.books["charges"].update({f"{collection} by {account}": text for account in payers})
            self._charged += [(row.run_id, collection, account, text) for account in payers]

    def _charge_voided(self, row: AnyRow, content: dict[str, Any]) -> None:
        collection = _collection(row.run_id, content["round"], content["collection"])
        self.books["collections"][collection].update(state="voided", settled_at=row.at)

    def _charge_spent(self, row: AnyRow, content: dict[str, Any]) -> None:
        collection = _collection(row.run_id, content["round"], content["collection"])
        self.books["collections"][collection].update(state="spent", settled_at=row.at)

    def _secret_replaced(self, row: AnyRow, content: dict[str, Any]) -> None:
        self.books["seals"].pop(_round(row.run_id, content["round"]), None)
        replaced = {"secret_id": content["secret_id"], "secret_home": content["secret_home"], "updated_at": row.at}
        self.books["runs"][row.run_id].update(replaced)

    def _data_accepted(self, row: AnyRow, content: dict[str, Any]) -> None:
        self.books["runs"][row.run_id].update({**content["digests"], "updated_at": row.at})

    def _round_sealed(self, row: AnyRow, content: dict[str, Any]) -> None:
        seal = {"collection": content["collection"], **content["digests"]}
        self.books["seals"][_round(row.run_id, content["round"])] = seal

    def _round_committed(self, row: AnyRow, content: dict[str, Any]) -> None:
        n, digests = content["round"], dict(content["digests"])
        round = _round(row.run_id, n)
        collection = _collection(row.run_id, n, content["collection"])
        self.books["collections"][collection].update(state="spent", settled_at=row.at)
        self.books["seals"].pop(round, None)
        self.books["rounds"][round] = {
            "collection": content["collection"],
            "params_digest": content["params_digest"],
            "committed_at": row.at,
            **digests,
        }
        pruned = self.books["rounds"].get(_round(row.run_id, n - 2))
        if pruned is not None:
            pruned["state_key"] = None
        made = {"committed_round": n, "params_digest": content["params_digest"], "updated_at": row.at}
        self.books["runs"][row.run_id].update(made)

    def _run_finished(self, row: AnyRow, content: dict[str, Any]) -> None:
        end = {"state": content["state"], "updated_at": row.at, **content["digests"]}
        self.books["runs"][row.run_id].update(end)

    def _seal_erased(self, row: AnyRow, content: dict[str, Any]) -> None:
        self.books["seals"].pop(_round(row.run_id, content["round"]), None)

    def _run_deleted(self, row: AnyRow, content: dict[str, Any]) -> None:
        run = self.books["runs"][row.run_id]
        run.update({"state": RunState.DELETED, "error": None, "initial_state_key": None, "updated_at": row.at})
        for n in range(1, run["committed_round"] + 2):
            self.books["rounds"].pop(_round(row.run_id, n), None)
            self.books["seals"].pop(_round(row.run_id, n), None)


def _journalled(connection: Connection) -> dict[str, Book]:
    """By the journal."""
    reader = _JournalReader()
    columns = [journal_table.c[name] for name in ("sequence", "at", "run_id", "kind", "content", "key_id")]
    query = select(*columns).order_by(journal_table.c.sequence).execution_options(yield_per=1000)
    for row in connection.execute(query):
        reader.read(row, json.loads(row.content))
    reader.totals()
    return reader.books


def _by_sequence(rows: Iterable[AnyRow], value_of: Callable[[AnyRow], Any]) -> Book:
    """Rows by the journal's row that made each; a second one of the same is in no journal."""
    book: Book = {}
    for row in rows:
        name = f"row {row.journal_sequence}"
        while name in book:
            name += " again"
        book[name] = value_of(row)
    return book


def _stored(connection: Connection) -> dict[str, Book]:
    """By the other tables."""
    all_budgets = list(connection.execute(select(budgets)))
    terms = [*(each.name for each in fields(BudgetTerms)), "journal_sequence", "set_at"]
    all_runs = list(connection.execute(select(runs)))
    keys = {row.run_id: row.digest_key for row in all_runs}
    return {
        "budgets": {str(row.account): {name: getattr(row, name) for name in terms} for row in all_budgets},
        "data": dict(membership.ids_by_content(connection)),
        "bindings": _by_sequence(connection.execute(select(bindings)), lambda row: (row.population, row.data_id)),
        "uses of data": _by_sequence(
            connection.execute(select(data_uses)), lambda row: _values(row, "data_uses", but=("journal_sequence",))
        ),
        "keys of fingerprints": _by_sequence(
            connection.execute(select(fingerprint_key)),
            lambda row: _values(row, "fingerprint_key", but=("journal_sequence",)),
        ),
        "sweeps": {
            row.sweep_id: _values(row, "sweeps", but=("sweep_id",)) for row in connection.execute(select(sweeps))
        },
        "runs": {row.run_id: _run(row) for row in all_runs},
        "rounds": {
            _round(row.run_id, row.round): _values(
                row, "rounds", but=("run_id", "round", "digest_key"), digested=("state_key", "result", "withheld")
            )
            for row in connection.execute(select(rounds).execution_options(yield_per=100))
        },
        "seals": {
            _round(row.run_id, row.round): {
                "collection": row.collection,
                "blob_key": column_digest(keys.get(row.run_id, ""), "blob_key", row.blob_key),
            }
            for row in connection.execute(select(seals))
        },
        "collections": {
            _collection(row.run_id, row.round, row.collection): _values(
                row, "collections", but=("run_id", "round", "collection")
            )
            for row in connection.execute(select(collections))
        },
        "charges": {
            f"{_collection(row.run_id, row.round, row.collection)} by {row.account}": canonical_json(row.event)
            for row in connection.execute(select(charges))
        },
        "totals": {
            str(row.account) if row.run_id == accounts.ALL_RUNS else f"{row.account} in {row.run_id}": (
                accounts.decode_events(row.spent)
            )
            for row in connection.execute(select(totals))
            if row.spent
        },
    }


def _run(row: AnyRow) -> dict[str, Any]:
    values = _values(
        row,
        "runs",
        but=("run_id", "digest_key"),
        digested=("config", "engine", "initial_state_key", "error"),
    )
    return values | ({"initial_state_key": None} if row.state == RunState.DELETED else {})


def _values(row: AnyRow, table: str, *, but: tuple[str, ...], digested: tuple[str, ...] = ()) -> dict[str, Any]:
    """A row's covered columns, some of them as the journal has them: as digests under the row's key."""
    values = {name: getattr(row, name) for name in COVERED[table] if name not in but}
    return values | {name: column_digest(row.digest_key, name, values[name]) for name in digested}


def _round(run_id: str, round: int) -> str:
    return f"{run_id} round {round}"


def _collection(run_id: str, round: int, collection: int) -> str:
    return f"{_round(run_id, round)} collection {collection}"
