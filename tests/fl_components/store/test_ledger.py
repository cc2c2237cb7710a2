"""Budgets: set by somebody with a reason, never overspent, and never for other clients than they were set for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from fedrounds.fl_components.account import Account
from fedrounds.fl_components.errors import BudgetExhausted, ConfigError, JournalBroken, StoreError
from fedrounds.fl_components.run_state import RunState
from fedrounds.fl_components.store import Budget, BudgetTerms, Charges, Owners, RunRecord, Store

TERMS = BudgetTerms(
    epsilon=3.0, delta=1e-5, unit="client", neighbouring="add_or_remove", accountant="RDP", demonstration=False
)
EVENT = {"kind": "gaussian", "noise_multiplier": 1.0}
TEXT = '{"kind":"gaussian","noise_multiplier":1.0}'


def three_in_all(budget: Budget, population_spent: Mapping[str, int], run_spent: Mapping[str, int]) -> None:
    """A guard that counts: one event costs an epsilon of 1."""
    if budget.epsilon is not None and sum(population_spent.values()) > budget.epsilon:
        raise BudgetExhausted("too much")


def set_budget(store: Store, population: str = "p", **changes: Any) -> Budget:
    terms = replace(TERMS, **changes)
    return store.ledger.set_budget(Account(population), terms, reason="the board agreed", by="ada")


def of(population: str = "p") -> list[Charges]:
    """What a round costs a population."""
    return [Charges({Account(population): EVENT}, three_in_all)]


def spent_by(store: Store, run_id: str, population: str = "p") -> Mapping[str, int]:
    return store.ledger.spent(run_id).get(Account(population), {})


def go_through(store: Store, run_id: str, rounds: int) -> int:
    """How many of these rounds the budget allows."""
    done = 0
    population = store.run(run_id).population
    with store.acquire(run_id) as lease:
        for round in range(1, rounds + 1):
            try:
                lease.seal(round, lease.reserve(round, of(population)), b"sum")
            except BudgetExhausted:
                break
            lease.commit(round, state=b"state", params_digest=f"{round:064d}", result={"metrics": {}})
            done += 1
    return done


class TestSpending:
    def test_runs_share_what_their_population_has(self, store: Store, new_run: Callable[..., RunRecord]) -> None:
        set_budget(store)
        for run_id in ("a", "b", "c"):
            new_run(run_id)
        assert [go_through(store, run_id, 2) for run_id in ("a", "b", "c")] == [2, 1, 0]
        budget = store.ledger.budget(Account("p"))
        assert budget is not None and budget.spent == {TEXT: 3}
        assert [spent_by(store, run_id) for run_id in ("a", "b", "c")] == [{TEXT: 2}, {TEXT: 1}, {}]
        assert len(store.ledger.charges(Account("p"))) == 3
        store.verify_journal()

    def test_other_populations_have_their_own(self, store: Store, new_run: Callable[..., RunRecord]) -> None:
        set_budget(store), set_budget(store, "q", epsilon=1.0)
        new_run("a"), new_run("b", population="q")
        assert [go_through(store, "a", 2), go_through(store, "b", 2)] == [2, 1]

    def test_a_refused_reservation_leaves_nothing(self, store: Store, new_run: Callable[..., RunRecord]) -> None:
        set_budget(store, epsilon=0.0)
        new_run("a")
        before = store.verify_journal()
        assert go_through(store, "a", 1) == 0
        assert store.verify_journal() == before and store.ledger.charges() == [] and spent_by(store, "a") == {}

    def test_again_it_is_the_same_reservation_and_costs_nothing(
        self, store: Store, new_run: Callable[..., RunRecord]
    ) -> None:
        set_budget(store, epsilon=1.0)
        new_run("a")
        for _ in range(3):
            with store.acquire("a") as lease:
                assert lease.reserve(1, of()) == 1
        assert store.ledger.budget(Account("p")).spent == {TEXT: 1}  # type: ignore[union-attr]

    def test_no_budget_no_round(self, store: Store, new_run: Callable[..., RunRecord]) -> None:
        new_run("a")
        with store.acquire("a") as lease, pytest.raises(StoreError, match="population 'p' has no privacy budget") as e:
            lease.reserve(1, of())
        assert "fedrounds privacy budget set p" in str(e.value.hint)

    def test_two_processes_cannot_overspend_together(
        self, home: Path, database_url: str, store: Store, new_run: Callable[..., RunRecord], start_process: Any
    ) -> None:
        """They reserve at the same time, again and again, on one population."""
        set_budget(store, epsilon=25.0)
        program = (
            "import sys; from pathlib import Path; from fedrounds.fl_components.store import Store\n"
            "from tests.fl_components.store.test_ledger import of\n"
            "from fedrounds.fl_components.errors import BudgetExhausted\n"
            "store = Store.open(Path(sys.argv[1]), database_url=sys.argv[2]); done = 0\n"
            "with store.acquire(sys.argv[3]) as lease:\n"
            "    print('ready', flush=True); input()\n"
            "    try:\n"
            "        for round in range(1, 100):\n"
            "            lease.seal(round, lease.reserve(round, of()), b'')\n"
            "            lease.commit(round, state=b's', params_digest=str(round), result={'metrics': {}}); done += 1\n"
            "    except BudgetExhausted: print(done, flush=True)\n"
        )
        processes = []
        for run_id in ("a", "b", "c"):
            new_run(run_id, rounds=100)
            processes.append(start_process(program, home, database_url, run_id))
        assert [process.answer() for process in processes] == ["ready"] * 3
        for process in processes:
            process.tell("")
        assert sum(int(process.answer()) for process in processes) == 25
        assert store.ledger.budget(Account("p")).spent == {TEXT: 25}  # type: ignore[union-attr]
        store.verify_journal()


class TestVoiding:
    """What was reserved for a round of which nothing came can be given back, by somebody with a reason."""

    def test_it_is_off_the_budget_and_the_run_goes_on(self, store: Store, new_run: Callable[..., RunRecord]) -> None:
        set_budget(store, epsilon=2.0)
        new_run("a")
        assert go_through(store, "a", 1) == 1
        with store.acquire("a") as lease:
            lease.reserve(2, of())
            assert lease.void("the wrong file", by="ada") == 2
        assert store.ledger.budget(Account("p")).spent == spent_by(store, "a") == {TEXT: 1}  # type: ignore[union-attr]
        assert [charge.state for charge in store.ledger.charges()] == ["spent", "voided"]
        (row,) = [row for row in store.journal("a") if row.kind == "charge.voided"]
        assert (row.content["round"], row.content["reason"], row.content["by"]) == (2, "the wrong file", "ada")
        with store.acquire("a") as lease:
            assert lease.reserve(2, of()) == 2  # another collection: with other keys
            lease.seal(2, 2, b"sum")
            lease.commit(2, state=b"s", params_digest="d", result={"metrics": {}})
        assert [charge.state for charge in store.ledger.charges()] == ["spent", "voided", "spent"]
        store.verify_journal()

    def test_there_may_be_nothing_to_void(self, store: Store, new_run: Callable[..., RunRecord]) -> None:
        set_budget(store)
        new_run("a")
        with store.acquire("a") as lease:
            assert lease.void("x", by="ada") is None
        go_through(store, "a", 2)
        with store.acquire("a") as lease:
            assert lease.void("x", by="ada") is None

    def test_not_after_the_seal(self, store: Store, new_run: Callable[..., RunRecord]) -> None:
        """From there on noise may have been drawn, and what it was added to seen."""
        set_budget(store)
        new_run("a")
        with store.acquire("a") as lease:
            lease.seal(1, lease.reserve(1, of()), b"sum")
            with pytest.raises(StoreError, match="round 1 of run a is sealed: something of it may be known"):
                lease.void("x", by="ada")
        assert store.ledger.budget(Account("p")).spent == {TEXT: 1}  # type: ignore[union-attr]

    def test_not_where_the_run_failed(self, store: Store, new_run: Callable[..., RunRecord]) -> None:
        """That it failed may tell of somebody's data."""
        set_budget(store)
        new_run("a")
        with store.acquire("a") as lease:
            lease.reserve(1, of())
            lease.finish(RunState.FAILED, error={"code": "run_failed", "message": "m", "hint": None})
            with pytest.raises(StoreError, match="has failed"):
                lease.void("x", by="ada")
        with store.acquire("a") as lease:  # nor where a later attempt was stopped in the same round
            lease.begin_attempt()
            lease.finish(RunState.CANCELLED)
            with pytest.raises(StoreError, match="has failed"):
                lease.void("x", by="ada")

    def test_an_earlier_failure_is_another_round_s(self, store: Store, new_run: Callable[..., RunRecord]) -> None:
        set_budget(store)
        new_run("a")
        with store.acquire("a") as lease:
            lease.finish(RunState.FAILED, error={"code": "run_failed", "message": "m", "hint": None})
        go_through(store, "a", 1)
        with store.acquire("a") as lease:
            lease.reserve(2, of())
            assert lease.void("x", by="ada") == 2

    def test_a_round_without_a_claim(self, store: Store, new_run: Callable[..., RunRecord]) -> None:
        new_run("a")
        with store.acquire("a") as lease:
            lease.reserve(1)
            assert lease.void("x", by="ada") == 1
        store.verify_journal()


class TestReconciliation:
    """The tables beside the journal are not signed: what was changed in them shows beside it."""

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ("UPDATE totals SET spent = '[]' WHERE run_id = ''", "totals differ from what the journal says: p"),
            ("UPDATE totals SET spent = '[]' WHERE run_id = 'a'", "totals differ .*: p in a"),
            ("UPDATE budgets SET epsilon = 9", "budgets differ .*: p"),
            ("UPDATE budgets SET delta = 0.1", "budgets differ .*: p"),
            ("UPDATE charges SET event = '{}' WHERE round = 1", "charges differ .*: a round 1 collection 1"),
            (
                "UPDATE collections SET state = 'voided' WHERE round = 2",
                "collections differ .*: a round 2 collection 1",
            ),
            ("DELETE FROM charges WHERE round = 2", "charges differ .*: a round 2 collection 1"),
            ("UPDATE rounds SET params_digest = 'd' WHERE round = 1", "rounds differ .*: a round 1"),
            ("DELETE FROM bindings", "bindings differ .*: row 3"),
            ("UPDATE bindings SET population = 'q'", "bindings differ .*: row 3"),
            ("DELETE FROM fingerprints", "data differ"),
            ("DELETE FROM fingerprints WHERE digest = 'one'", "data differ"),
            ("UPDATE fingerprints SET client = 'z' WHERE digest = 'one'", "data differ"),
            ("DELETE FROM data_uses", "uses of data differ .*: row 2"),
            ("UPDATE data_uses SET units = '[]'", "uses of data differ .*: row 2"),
        ],
    )
    def test_a_changed_row_is_found(
        self, store: Store, new_run: Callable[..., RunRecord], change: str, told: str
    ) -> None:
        set_budget(store)
        enter(store, "p", {"one": "x", "two": "y"})
        new_run("a")
        go_through(store, "a", 2)
        store.verify_journal()
        with store._transaction() as connection:
            connection.execute(text(change))
        with pytest.raises(JournalBroken, match=told):
            store.verify_journal()

    def test_so_is_a_ledger_that_was_cut_with_its_totals(self, store: Store, new_run: Callable[..., RunRecord]) -> None:
        """Everything but the journal agrees that less was spent."""
        set_budget(store)
        new_run("a")
        go_through(store, "a", 2)
        with store._transaction() as connection:
            connection.execute(text("DELETE FROM charges WHERE round = 2"))
            connection.execute(text("UPDATE totals SET spent = :spent"), {"spent": json.dumps([[TEXT, 1]])})
        with pytest.raises(JournalBroken, match="charges differ"):
            store.verify_journal()


class TestTerms:
    def test_who_allowed_it_and_why_is_in_the_journal(self, store: Store) -> None:
        set_budget(store)
        (row,) = store.journal()
        assert row.kind == "budget.set"
        assert (row.content["epsilon"], row.content["reason"], row.content["by"]) == (3.0, "the board agreed", "ada")

    def test_the_same_again_changes_nothing(self, store: Store) -> None:
        assert set_budget(store) == set_budget(store)
        assert len(list(store.journal())) == 1

    def test_it_may_be_raised(self, store: Store, new_run: Callable[..., RunRecord]) -> None:
        set_budget(store)
        new_run("a")
        go_through(store, "a", 5)
        raised = set_budget(store, epsilon=4.0)
        assert (raised.epsilon, raised.spent) == (4.0, {TEXT: 3})
        assert [row.kind for row in store.journal() if row.run_id is None] == ["budget.set", "budget.set"]

    @pytest.mark.parametrize(
        "changes", [{"delta": 1e-4}, {"neighbouring": "zero_out"}, {"unit": "example"}, {"demonstration": True}]
    )
    def test_what_was_spent_keeps_its_meaning(
        self, store: Store, new_run: Callable[..., RunRecord], changes: dict[str, Any]
    ) -> None:
        set_budget(store)
        set_budget(store, **changes)  # nothing is spent yet
        set_budget(store)
        new_run("a")
        go_through(store, "a", 1)
        (name,) = changes
        with pytest.raises(ConfigError, match=rf"has spent under other terms: {name} \("):
            set_budget(store, **changes)

    def test_budgets_are_listed(self, store: Store) -> None:
        set_budget(store, "q"), set_budget(store, "p")
        assert list(store.ledger.budgets()) == [Account("p"), Account("q")]
        assert store.ledger.budget(Account("r")) is None


def enter(
    store: Store,
    population: str,
    digests: Mapping[str, str],
    run_id: str = "r",
    units: Sequence[str] = ("client",),
    check: Callable[[Owners], None] = lambda owners: None,
) -> None:
    store.memberships.enter(run_id=run_id, name="n", population=population, units=units, digests=digests, check=check)


def only(population: str) -> Callable[[Owners], None]:
    """Refuses what another population has."""

    def check(owners: Owners) -> None:
        for pairs in owners.values():
            for owner, _ in pairs:
                if owner != population:
                    raise ConfigError(owner)

    return check


class TestBindings:
    def test_clients_may_come_and_have_new_data(self, store: Store) -> None:
        """A hospital's data grow from night to night: what it spent stays spent."""
        set_budget(store)
        assert store.memberships.is_empty()
        enter(store, "p", {"one": "x", "two": ""})
        enter(store, "p", {"one": "x", "two": ""})
        enter(store, "p", {"one": "x", "two, a day later": "x", "three": "y"})
        assert not store.memberships.is_empty()
        assert store.memberships.owners(["one", "two", "three", "four"]) == {
            "one": {("p", "x")},
            "two": {("p", "")},
            "three": {("p", "y")},
        }
        kinds = [row.kind for row in store.journal()]
        assert kinds == ["budget.set", *["data.used", "population.bound"] * 2]
        store.verify_journal()

    def test_the_check_sees_whose_they_are_and_its_refusal_changes_nothing(self, store: Store) -> None:
        set_budget(store), set_budget(store, "q")
        enter(store, "p", {"one": "x", "two": "x"})
        with pytest.raises(ConfigError, match="p"):
            enter(store, "q", {"two": "x", "three": "x"}, check=only("q"))
        assert store.memberships.owners(["three"]) == {}
        store.verify_journal()

    def test_what_makes_no_claim_is_remembered_and_binds_nothing(self, store: Store) -> None:
        enter(store, "p", {"one": "x"}, units=())
        assert store.memberships.is_empty() and store.memberships.owners(["one"]) == {}
        assert [row.kind for row in store.journal()] == ["data.used"]
        store.verify_journal()

    def test_a_claim_needs_a_budget(self, store: Store) -> None:
        with pytest.raises(StoreError, match="population 'p' has no privacy budget"):
            enter(store, "p", {"one": "x"})

    def test_there_may_be_many(self, store: Store) -> None:
        set_budget(store)
        enter(store, "p", {f"{row:040d}": "x" for row in range(1201)})
        assert len(store.memberships.owners([f"{row:040d}" for row in range(1300)])) == 1201

    def test_the_journal_has_no_trace_of_the_data(self, store: Store) -> None:
        set_budget(store)
        enter(store, "p", {"digest of one": "x"})
        assert "digest of one" not in json.dumps([row.content for row in store.journal()])

    def test_two_processes_bind_the_same_data_to_one_population(
        self, home: Path, database_url: str, store: Store, start_process: Any
    ) -> None:
        set_budget(store), set_budget(store, "q")
        program = (
            "import sys; from pathlib import Path; from fedrounds.fl_components.store import Store\n"
            "from fedrounds.fl_components.errors import ConfigError\n"
            "from tests.fl_components.store.test_ledger import enter, only\n"
            "store = Store.open(Path(sys.argv[1]), database_url=sys.argv[2])\n"
            "print('ready', flush=True); input()\n"
            "bound = 0\n"
            "for each in range(40):\n"
            "    digests = {f'{each}': 'x', f'{each} too': 'y'}\n"
            "    try: enter(store, sys.argv[3], digests, f'{sys.argv[3]}{each}', check=only(sys.argv[3])); bound += 1\n"
            "    except ConfigError: pass\n"
            "print(bound, flush=True)\n"
        )
        processes = [start_process(program, home, database_url, population) for population in ("p", "q")]
        assert [process.answer() for process in processes] == ["ready"] * 2
        for process in processes:
            process.tell("")
        assert sum(int(process.answer()) for process in processes) == 40
        store.verify_journal()


class TestSharedKey:
    def test_all_hubs_of_a_database_have_the_same_one(self, home: Path, database_url: str, store: Store) -> None:
        key = store.memberships.fingerprint_key()
        with Store.open(home, database_url=database_url) as again:
            assert again.memberships.find_fingerprint_key() == again.memberships.fingerprint_key() == key
        (file,) = (home / "secrets").glob("fingerprints-*.key")
        assert file.read_bytes() == key and len(key) == 32 and file.stat().st_mode & 0o777 == 0o600
        assert key.hex() not in json.dumps([row.content for row in store.journal()])

    def test_a_home_without_it_is_told_which_file_it_needs_and_makes_none(
        self, home: Path, tmp_path: Path, database_url: str, store: Store
    ) -> None:
        key = store.memberships.fingerprint_key()
        (file,) = (home / "secrets").glob("fingerprints-*.key")
        with Store.open(tmp_path / "second", database_url=database_url) as second:
            second.keys.trust(store.keys.signing.public.hex())
            for act in (
                second.memberships.fingerprint_key,
                second.memberships.check_keys,
                second.memberships.find_fingerprint_key,
            ):
                with pytest.raises(StoreError, match=f"lacks the file secrets/{file.name}") as refused:
                    act()
                assert str(file) in str(refused.value.hint) and "backup" in str(refused.value.hint)
            copy = tmp_path / "second" / "secrets" / file.name
            assert not list(copy.parent.glob("fingerprints-*"))
            copy.write_bytes(key)
            assert second.memberships.fingerprint_key() == key
            copy.write_bytes(bytes(32))
            with pytest.raises(StoreError, match="is damaged"):
                second.memberships.fingerprint_key()

    def test_of_two_processes_that_make_it_one_wins(
        self, home: Path, database_url: str, store: Store, start_process: Any
    ) -> None:
        program = (
            "import sys; from pathlib import Path; from fedrounds.fl_components.store import Store\n"
            "store = Store.open(Path(sys.argv[1]), database_url=sys.argv[2])\n"
            "print('ready', flush=True); input()\n"
            "print(store.memberships.fingerprint_key().hex(), flush=True)\n"
        )
        processes = [start_process(program, home, database_url) for _ in range(3)]
        assert [process.answer() for process in processes] == ["ready"] * 3
        for process in processes:
            process.tell("")
        assert {process.answer() for process in processes} == {store.memberships.fingerprint_key().hex()}
        assert len(list((home / "secrets").glob("fingerprints-*"))) == 1


class TestHubKey:
    def test_a_hub_that_does_not_trust_who_began_the_journal_writes_nothing(
        self, tmp_path: Path, database_url: str, store: Store
    ) -> None:
        set_budget(store)
        with Store.open(tmp_path / "second", database_url=database_url) as second:
            with pytest.raises(StoreError, match="the journal of this database was begun by the hub key") as refused:
                set_budget(second, "q")
            assert "journal trust KEY" in str(refused.value.hint) and "backup" in str(refused.value.hint)
            second.keys.trust(store.keys.signing.public.hex())
            set_budget(second, "q")

    def test_a_lost_key_is_not_replaced(self, home: Path, database_url: str, store: Store) -> None:
        set_budget(store)
        key = (home / "secrets" / "hub.key").read_bytes()
        (home / "secrets" / "hub.key").unlink()
        lost = pytest.raises(StoreError, match="was begun by the hub key")
        with Store.open(home, database_url=database_url) as again, lost:
            set_budget(again, "q")
        (home / "secrets" / "hub.key").write_bytes(key)
        with Store.open(home, database_url=database_url) as again:
            again.anchor()
        (home / "secrets" / "hub.key").unlink()
        missing = pytest.raises(StoreError, match="is missing, and this home has signed rows")
        with Store.open(home, database_url=database_url) as again, missing:
            set_budget(again, "q")
        assert not (home / "secrets" / "hub.key").exists()
