"""Clients' own budgets: charged with the round, each for itself, and held to the journal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import text

from fedrounds.fl_components.account import Account
from fedrounds.fl_components.errors import BudgetExhausted, ConfigError, JournalBroken, StoreError
from fedrounds.fl_components.store import Budget, BudgetTerms, Charges, RunRecord, Store

TERMS = BudgetTerms(
    epsilon=2.0, delta=1e-3, unit="example", neighbouring="zero_out", accountant="RDP", demonstration=False
)
EVENT = {"kind": "gaussian", "noise_multiplier": 1.0}
TEXT = '{"kind":"gaussian","noise_multiplier":1.0}'
X, Y, Z = (Account("p", client) for client in "xyz")


def one_each(budget: Budget, by_all: Mapping[str, int], by_run: Mapping[str, int]) -> None:
    """A guard that counts: one event costs an epsilon of 1."""
    if budget.epsilon is not None and sum(by_all.values()) > budget.epsilon:
        raise BudgetExhausted(f"too much for {budget.account}")


def of(*clients: str, least: int = 1) -> Charges:
    return Charges({Account("p", client): EVENT for client in clients}, one_each, least)


def set_budget(store: Store, whose: str = "p/*", **changes: Any) -> Budget:
    return store.ledger.set_budget(Account.parse(whose), replace(TERMS, **changes), reason="the board agreed", by="ada")


def commit(lease: Any, round: int) -> None:
    lease.seal(round, 1, b"sum")
    lease.commit(round, state=b"state", params_digest=f"{round:064d}", result={"metrics": {}})


@pytest.fixture
def begun(store: Store, new_run: Callable[..., RunRecord]) -> Store:
    """A run "a", and three clients that may spend 2 each."""
    set_budget(store)
    store.ledger.register([Account("p", "x"), Account("p", "y"), Account("p", "z")])
    new_run("a")
    return store


def spent(store: Store, client: str) -> int:
    budget = store.ledger.budget(Account.parse(f"p/{client}"))
    assert budget is not None
    return sum(budget.spent.values())


class TestCharges:
    def test_each_client_pays_for_the_rounds_it_takes_part_in(self, begun: Store) -> None:
        with begun.acquire("a") as lease:
            for round, cohort in enumerate((of("x", "y"), of("x")), 1):
                lease.reserve(round, [cohort])
                assert lease.paying(round) == set(cohort.events)
                commit(lease, round)
        assert [spent(begun, client) for client in "xyz"] == [2, 1, 0]
        assert begun.ledger.spent("a") == {X: {TEXT: 2}, Y: {TEXT: 1}}
        assert begun.ledger.spent("a", [Y, Z]) == {Y: {TEXT: 1}}
        assert [(each.round, each.state, each.event) for each in begun.ledger.charges(Account("p", "x"))] == [
            (1, "spent", EVENT),
            (2, "spent", EVENT),
        ]
        assert begun.ledger.charges(Account("p", "z")) == []
        begun.verify_journal()

    def test_who_cannot_pay_is_left_out_and_the_others_go_on(self, begun: Store) -> None:
        set_budget(begun, "p/x", epsilon=0.0)
        with begun.acquire("a") as lease:
            lease.reserve(1, [of("x", "y")])
            assert lease.paying(1) == {Y}
        assert [spent(begun, client) for client in "xy"] == [0, 1]

    @pytest.mark.parametrize("least", [2, 3])
    def test_fewer_than_are_needed_refuse_the_round(self, begun: Store, least: int) -> None:
        set_budget(begun, "p/x", epsilon=0.0), set_budget(begun, "p/y", epsilon=0.0)
        before = begun.verify_journal()
        with (
            begun.acquire("a") as lease,
            pytest.raises(BudgetExhausted, match=r"too much for p/x; nor can 1 other pay: 'p/y'"),
        ):
            lease.reserve(1, [of("x", "y", "z", least=least)])
        assert begun.verify_journal() == before and spent(begun, "z") == 0 and begun.ledger.charges() == []
        with pytest.raises(BudgetExhausted):
            begun.ledger.check("a", [of("x", "y", "z", least=least)])
        begun.ledger.check("a", [of("x", "y", "z")])

    def test_nobody_who_can_pay_refuses_the_round(self, begun: Store) -> None:
        set_budget(begun, epsilon=0.0)
        with begun.acquire("a") as lease, pytest.raises(BudgetExhausted):
            lease.reserve(1, [of("x", "y")])

    def test_a_round_of_nobody_costs_nobody(self, begun: Store) -> None:
        with begun.acquire("a") as lease:
            assert lease.reserve(1, [of()]) == 1
            assert lease.paying(1) == set()

    def test_a_budget_is_shared_by_runs(self, begun: Store, new_run: Callable[..., RunRecord]) -> None:
        new_run("b")
        paying = []
        for run_id in ("a", "b"):
            with begun.acquire(run_id) as lease:
                for round in (1, 2):
                    lease.reserve(round, [of("x", "yz"[round - 1])])
                    paying.append(lease.paying(round))
                    commit(lease, round)
        assert paying == [{X, Y}, {X, Z}, {Y}, {Z}]

    def test_again_it_is_the_same_reservation(self, begun: Store) -> None:
        for _ in range(3):
            with begun.acquire("a") as lease:
                assert lease.reserve(1, [of("x", "y")]) == 1
                assert lease.paying(1) == {X, Y}
        assert spent(begun, "x") == 1 and begun.ledger.is_reserved("a", 1) and not begun.ledger.is_reserved("a", 2)

    def test_of_another_event_it_is_refused(self, begun: Store) -> None:
        with begun.acquire("a") as lease:
            lease.reserve(1, [of("x")])
            other = Charges({X: EVENT | {"noise_multiplier": 2.0}}, one_each)
            with pytest.raises(StoreError, match="already reserved for another privacy event of p/x"):
                lease.reserve(1, [other])

    def test_it_is_never_given_back(self, begun: Store) -> None:
        """A client may have sent its update, which is what is paid for."""
        with begun.acquire("a") as lease:
            lease.reserve(1, [of("x", "y")])
            with pytest.raises(StoreError, match="round 1 of run a is paid for by clients themselves"):
                lease.void("nothing came of it", by="ada")
            assert [spent(begun, client) for client in "xy"] == [1, 1]

    def test_a_clients_and_a_populations_budget_are_charged_together(self, begun: Store) -> None:
        client_level = replace(TERMS, unit="client", epsilon=1.0)
        both = [Charges({Account("p"): EVENT}, one_each), of("x")]
        begun.ledger.set_budget(Account("p"), client_level, reason="both", by="ada")
        with begun.acquire("a") as lease:
            lease.reserve(1, both)
            commit(lease, 1)
            with pytest.raises(BudgetExhausted, match=r"too much for p$"):
                lease.reserve(2, both)
        assert spent(begun, "x") == 1 and begun.ledger.spent("a") == {Account("p"): {TEXT: 1}, X: {TEXT: 1}}
        begun.verify_journal()

    def test_totals_name_each_different_sum_once(self, begun: Store) -> None:
        with begun.acquire("a") as lease:
            for round, cohort in enumerate((of("x", "y", "z"), of("x")), 1):
                lease.reserve(round, [cohort])
                commit(lease, round)
        totals = begun.ledger.totals("a", Account("p").template)
        assert totals.num_accounts == 3
        assert sorted(sum(each.values()) for each in totals.spent) == [1, 2]
        assert sorted(sum(each.spent.values()) for each in totals.budgets) == [1, 2]


class TestTerms:
    def test_new_clients_have_the_terms_of_all(self, begun: Store) -> None:
        assert begun.ledger.budget(Account("p", "x")).epsilon == 2.0  # type: ignore[union-attr]
        set_budget(begun, epsilon=5.0)
        assert {each.epsilon for each in begun.ledger.budgets().values()} == {5.0}
        begun.ledger.register([Account("p", "x"), Account("p", "new")])
        assert begun.ledger.budget(Account("p", "new")).epsilon == 5.0  # type: ignore[union-attr]
        begun.verify_journal()

    def test_one_client_may_have_its_own(self, begun: Store) -> None:
        set_budget(begun, "p/x", epsilon=9.0)
        assert [begun.ledger.budget(Account.parse(f"p/{each}")).epsilon for each in "xy"] == [9.0, 2.0]  # type: ignore[union-attr]
        begun.verify_journal()

    def test_populations_with_like_names_are_others(self, begun: Store) -> None:
        for name in ("P/*", "pp/*", "p_/*"):
            set_budget(begun, name, epsilon=7.0)
        set_budget(begun, epsilon=3.0)
        assert {str(account): each.epsilon for account, each in begun.ledger.budgets().items()} == {
            "P/*": 7.0,
            "pp/*": 7.0,
            "p_/*": 7.0,
            "p/*": 3.0,
            "p/x": 3.0,
            "p/y": 3.0,
            "p/z": 3.0,
        }

    def test_registering_again_changes_nothing(self, begun: Store) -> None:
        before = begun.verify_journal()
        begun.ledger.register([Account("p", "x"), Account("p", "y")])
        assert begun.verify_journal() == before

    def test_without_terms_nobody_is_registered(self, store: Store) -> None:
        with pytest.raises(StoreError, match=r"population 'q/\*' has no privacy budget") as refused:
            store.ledger.register([Account("q", "x")])
        assert "budget set 'q/*' --unit example" in str(refused.value.hint)

    def test_the_meaning_of_what_is_spent_stays(self, begun: Store) -> None:
        with begun.acquire("a") as lease:
            lease.reserve(1, [of("x")])
        with pytest.raises(ConfigError, match="population 'p/x' has spent under other terms: delta"):
            set_budget(begun, delta=1e-6)

    def test_a_budget_that_was_set_by_name_stays(self, begun: Store) -> None:
        with begun.acquire("a") as lease:
            lease.reserve(1, [of("x", "y", "z")])
        set_budget(begun, "p/x", epsilon=0.5)
        set_budget(begun, "p/y", epsilon=begun.ledger.budget(Account("p", "y")).epsilon)  # type: ignore[union-attr]
        set_budget(begun, "p/new", epsilon=0.25)
        set_budget(begun, "p/*", epsilon=77.0)
        limits = {str(account): each.epsilon for account, each in begun.ledger.budgets().items()}
        assert limits["p/x"] == 0.5 and limits["p/new"] == 0.25
        assert limits["p/y"] != 77.0 and limits["p/z"] == limits["p/*"] == 77.0
        assert begun.ledger.named_accounts("p") == {
            Account("p").template: True,
            Account("p", "new"): True,
            X: True,
            Y: True,
            Z: False,
        }
        begun.verify_journal()
        set_budget(begun, "p/x", epsilon=8.0)
        assert begun.ledger.budget(Account("p", "x")).epsilon == 8.0  # type: ignore[union-attr]
        begun.verify_journal()


class TestJournal:
    @pytest.mark.parametrize(
        ("statement", "named"),
        [
            ("UPDATE totals SET spent = '[]' WHERE account = 'p/x' AND run_id = ''", "totals differ.*p/x"),
            ("UPDATE budgets SET epsilon = 99 WHERE account = 'p/x'", "budgets differ.*p/x"),
            ("UPDATE totals SET spent = '[]' WHERE account = 'p/x' AND run_id = 'a'", "totals differ.*p/x in a"),
            ("DELETE FROM charges WHERE account = 'p/x'", "charges differ.*by p/x"),
            (
                "UPDATE charges SET event = '{\"kind\":\"none\"}' WHERE account = 'p/y'",
                "charges differ.*by p/y",
            ),
        ],
    )
    def test_what_does_not_add_up_is_named(self, begun: Store, statement: str, named: str) -> None:
        with begun.acquire("a") as lease:
            lease.reserve(1, [of("x", "y")])
            commit(lease, 1)
        begun.verify_journal()
        with begun._transaction() as connection:
            connection.execute(text(statement))
        with pytest.raises(JournalBroken, match=named):
            begun.verify_journal()

    def test_a_row_of_a_round_names_who_paid(self, begun: Store) -> None:
        with begun.acquire("a") as lease:
            lease.reserve(1, [of("y", "x")])
        (content,) = [row.content for row in begun.journal() if row.kind == "charge.reserved"]
        assert content["charges"] == [[EVENT, ["p/x", "p/y"]]]
