"""Locks are taken in one order: what two processes do at once ends, with consistent books."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert

from fedrounds.fl_components.account import Account
from fedrounds.fl_components.store import BudgetTerms, RunRecord, Store, accounts, journal
from fedrounds.fl_components.store.keys import SigningKey
from fedrounds.fl_components.store.schema import totals
from tests.fl_components.store.lock_order import LockOrder, checked


def terms(epsilon: float | None, unit: str = "example") -> BudgetTerms:
    relation = "zero_out" if unit == "example" else "add_or_remove"
    return BudgetTerms(epsilon, 1e-5, unit=unit, neighbouring=relation, accountant="RDP", demonstration=False)


def epsilons(store: Store) -> dict[str, float | None]:
    return {str(account): each.epsilon for account, each in store.ledger.budgets().items()}


class TestChecker:
    """It sees what deadlocks."""

    @pytest.fixture
    def order(self, store: Store) -> Any:
        store.ledger.set_budget(Account("p").template, terms(8.0), reason="x", by="ada")
        store.ledger.register([Account("p", "a"), Account("p", "b")])
        with checked() as order:
            yield order

    def test_a_foreign_key_after_the_journals_head(
        self, store: Store, order: LockOrder, new_run: Callable[..., RunRecord]
    ) -> None:
        """A row that refers to a population locks it: this deadlocked with whoever reserved a round."""
        new_run("r")
        with store._transaction() as connection:
            journal.append(connection, store.keys.signing, None, "population.bound", {})
            connection.execute(insert(totals), [{"run_id": "r", "account": Account("p", "a"), "spent": []}])
            connection.rollback()
        (violation,) = order.violations
        assert "locks 'p/a' after the journal's head: INSERT INTO totals" in violation

    def test_populations_after_the_journals_head(self, store: Store, order: LockOrder) -> None:
        with store._transaction() as connection:
            journal.lock(connection)
            accounts.lock_budget(connection, Account("p", "a"))
        assert "locks 'p/a' after the journal's head" in order.violations[0]

    def test_populations_in_another_order(self, store: Store, order: LockOrder) -> None:
        for names in (["p/a", "p/*"], ["p/b", "p/a"]):
            with store._transaction() as connection:
                for name in names:
                    accounts.lock_budget(connection, Account.parse(name))
        assert [each.partition(":")[0] for each in order.violations] == [
            "a transaction locks 'p/*' after 'p/a'",
            "a transaction locks 'p/a' after 'p/b'",
        ]

    def test_a_lease_after_a_population(
        self, store: Store, order: LockOrder, new_run: Callable[..., RunRecord]
    ) -> None:
        new_run()
        with store.acquire("r") as lease, store._transaction() as connection:
            accounts.lock_budget(connection, Account("p", "a"))
            lease._lock(connection)
        assert "locks a lease after other rows" in order.violations[0]


@pytest.mark.postgres
class TestSettingABudgetWhileClientsAreRegistered:
    """Whichever comes first, all clients have the new terms in the end (where they have none of their own)."""

    @pytest.fixture
    def database_url(self, postgres_database: str) -> str:
        return postgres_database

    def race(self, open_store: Callable[..., Store], first: Callable[[Store], None], pause: str, second: Any) -> None:
        """Begin `second` while `first` is about to append `pause` to the journal."""
        reached, go_on = threading.Event(), threading.Event()
        stores = open_store(), open_store()
        append = journal.append

        def paused(connection: Any, key: SigningKey, run_id: str | None, kind: str, content: Any) -> Any:
            if kind == pause and threading.current_thread() is one:
                reached.set()
                go_on.wait(20)
            return append(connection, key, run_id, kind, content)

        one = threading.Thread(target=first, args=[stores[0]])
        other = threading.Thread(target=second, args=[stores[1]])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(journal, "append", paused)
            one.start()
            assert reached.wait(20)
            other.start()
            self.wait_until_done_or_blocked(stores[1], other)
            go_on.set()
            one.join()
            other.join()

    def wait_until_done_or_blocked(self, store: Store, thread: threading.Thread) -> None:
        from sqlalchemy import text

        waiting = text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
        while thread.is_alive():
            with store._database.snapshot() as connection:
                if connection.execute(waiting).scalar():
                    return

    def test_a_client_registered_meanwhile_gets_the_new_terms(self, open_store: Callable[..., Store]) -> None:
        store = open_store()
        store.ledger.set_budget(Account("p").template, terms(8.0), reason="x", by="ada")
        store.ledger.register([Account("p", "old")])
        self.race(
            open_store,
            lambda each: each.ledger.set_budget(Account("p").template, terms(1.0), reason="x", by="ada") and None,
            "budget.set",
            lambda each: each.ledger.register([Account("p", "new")]),
        )
        assert epsilons(store) == {"p/*": 1.0, "p/new": 1.0, "p/old": 1.0}
        store.verify_journal()

    def test_a_registration_that_began_first_is_seen(self, open_store: Callable[..., Store]) -> None:
        store = open_store()
        store.ledger.set_budget(Account("p").template, terms(8.0), reason="x", by="ada")
        self.race(
            open_store,
            lambda each: each.ledger.register([Account("p", "new")]),
            "clients.registered",
            lambda each: each.ledger.set_budget(Account("p").template, terms(1.0), reason="x", by="ada"),
        )
        assert epsilons(store) == {"p/*": 1.0, "p/new": 1.0}
        store.verify_journal()

    def test_a_client_whose_own_budget_is_set_meanwhile_keeps_it(self, open_store: Callable[..., Store]) -> None:
        store = open_store()
        store.ledger.set_budget(Account("p").template, terms(8.0), reason="x", by="ada")
        store.ledger.register([Account("p", "a"), Account("p", "b")])
        self.race(
            open_store,
            lambda each: each.ledger.set_budget(Account("p", "a"), terms(3.0), reason="x", by="ada") and None,
            "budget.set",
            lambda each: each.ledger.set_budget(Account("p").template, terms(1.0), reason="x", by="ada"),
        )
        assert epsilons(store) == {"p/*": 1.0, "p/a": 3.0, "p/b": 1.0}
        store.verify_journal()

    def test_a_population_that_two_processes_register(self, open_store: Callable[..., Store]) -> None:
        store = open_store()
        self.race(
            open_store,
            lambda each: each.ledger.set_budget(Account("p").template, terms(3.0), reason="x", by="ada") and None,
            "budget.set",
            lambda each: each.ledger.set_budget(Account("p").template, terms(1.0), reason="x", by="ada"),
        )
        assert epsilons(store) == {"p/*": 1.0}
        store.verify_journal()


_BUSY = """
import json, secrets, sys, time
from pathlib import Path
from fedrounds.fl_components.account import Account
from fedrounds.fl_components.errors import FedroundsError, LeaseHeld
from fedrounds.fl_components.run_state import RunState
from fedrounds.fl_components.store import BudgetTerms, Charges, Store

home, url, number, seconds = sys.argv[1:]
store, number = Store.open(Path(home), database_url=url), int(number)
clients = [Account("p", client) for client in ["a", "B", "ä", "c-1", "c_2", *(f"x{n:02d}" for n in range(30))]]
event = {"kind": "gaussian", "noise_multiplier": 1.0}
of_population = Charges({Account("p"): event}, lambda *_: None)


def terms(epsilon, unit):
    relation = "zero_out" if unit == "example" else "add_or_remove"
    return BudgetTerms(epsilon, 1e-5, unit=unit, neighbouring=relation, accountant="RDP", demonstration=False)


def begin(n):
    store.ledger.register([*clients, Account("p", f"new-{number}-{n}")])
    run_id = f"r{number}-{n}"
    store.create_run(run_id=run_id, name="n", population="p", rounds=9, config={}, config_digest="c", ancestor=None,
                     initial_state=b"w", params_digest="p", engine={}, source_folder="/")
    digests = {f"r{secrets.token_hex(16)}": each.client for each in reversed(clients)}
    store.memberships.enter(run_id=run_id, name="n", population="p", units=["client", "example"], digests=digests,
                     check=lambda owners: None)
    return run_id


def train(run_id):
    with store.acquire(run_id) as lease:
        lease.begin_attempt()
        for round in (1, 2):
            of_clients = Charges({each: event for each in clients[::-1]}, lambda *_: None)
            collection = lease.reserve(round, [of_clients, of_population])
            lease.seal(round, collection, b"sum")
            lease.commit(round, state=b"%d" % round, params_digest=str(round), result={}, participants=[3, 1, 2])
        lease.reserve(3, [of_population])
        lease.void("nothing came of it", by="ada")
        lease.finish(RunState.COMPLETED)


print("ready", flush=True)
input()
end, done, problem = time.monotonic() + float(seconds), 0, None
try:
    while time.monotonic() < end or done < 2:
        train(begin(done))
        store.ledger.set_budget(Account("p").template, terms(1000.0 + done, "example"), reason="x", by="ada")
        store.ledger.set_budget(Account("p", "aB"[number]), terms(2000.0 + done, "example"), reason="x", by="ada")
        store.ledger.set_budget(Account("p"), terms(3000.0 + done, "client"), reason="x", by="ada")
        store.ledger.set_budget(Account(f"q{done}").template, terms(1.0 + number, "example"), reason="x", by="ada")
        done += 1
except FedroundsError as error:
    problem = f"{type(error).__name__}: {error.message}"
print(json.dumps([done, problem]), flush=True)
"""


@pytest.mark.postgres
@pytest.mark.parametrize("seconds", [0, pytest.param(60, marks=pytest.mark.slow)])
def test_two_processes_under_contention(
    home: Path, postgres_database: str, start_process: Callable[..., Any], seconds: int
) -> None:
    """They begin runs, train, set budgets, void and register, all on one population: neither ever deadlocks."""
    with Store.open(home, database_url=postgres_database) as store:
        store.ledger.set_budget(Account("p"), terms(None, "client"), reason="x", by="ada")
        store.ledger.set_budget(Account("p").template, terms(None), reason="x", by="ada")
        processes = [start_process(_BUSY, home, postgres_database, number, seconds) for number in (0, 1)]
        assert [each.answer() for each in processes] == ["ready"] * 2
        for each in processes:
            each.tell("")
        answers = [json.loads(each.answer()) for each in processes]
        assert [problem for _, problem in answers] == [None, None]
        assert all(done >= 2 for done, _ in answers)
        store.verify_journal()
        charges = [each for each in store.ledger.charges(Account("p")) if each.state == "spent"]
        assert len(charges) == 2 * sum(done for done, _ in answers)


def test_names_sort_by_code_point_whatever_the_collation(store: Store) -> None:
    """Two transactions that lock the same clients lock them in one order, also where they are several pages."""
    names = [
        Account("p", f"{hashlib.sha256(bytes([n])).hexdigest()[:3]}{letter}") for n in range(20) for letter in "aAäÄ_-"
    ]
    store.ledger.set_budget(Account("p").template, terms(8.0), reason="x", by="ada")
    store.ledger.register(names)
    with store._transaction() as connection:
        assert list(accounts.find_budgets(connection, names, lock=True)) == sorted(names)
