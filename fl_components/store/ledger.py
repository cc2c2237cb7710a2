"""The privacy ledger: what each account may spend and has spent, in all runs, and who allowed it.

A charge is counted when it is reserved, in the transaction that checks the budget, so that two runs cannot overspend
together. All charges of a cohort are read, checked and written in a few statements. The totals stand beside the
charges: the ten-thousandth round costs what the first one did. Each act is a row of the journal, against which
`reconciliation` checks all tables.

The functions work on the connection of a transaction that is open; `Ledger` opens one for each call.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

from sqlalchemy import Connection, Row, String, func, insert, select, type_coerce, update
from sqlalchemy.dialects import postgresql, sqlite

from fedrounds.fl_components.account import Account
from fedrounds.fl_components.canonical import canonical_json
from fedrounds.fl_components.errors import BudgetExhausted, StoreError
from fedrounds.fl_components.run_state import RunState
from fedrounds.fl_components.store import accounts as accounts_
from fedrounds.fl_components.store import journal
from fedrounds.fl_components.store.accounts import (
    ALL_RUNS,
    decode_events,
    encode_events,
    find_budgets,
    minus,
    plus,
    spent_of,
    unregistered_error,
)
from fedrounds.fl_components.store.database import Database
from fedrounds.fl_components.store.keys import SigningKey
from fedrounds.fl_components.store.records import Budget, BudgetTerms, ChargeRecord, Charges, CollectionRecord, Events
from fedrounds.fl_components.store.schema import AnyRow, budgets, charges, collections, totals

NAMED: Final = 5
"""How many accounts an error names besides the first."""

_KEY: Final = ("run_id", "round", "collection")


def charge(connection: Connection, run_id: str, requests: Sequence[Charges]) -> dict[Account, dict[str, Any]]:
    """Count what a round costs against the budgets of its accounts, and return the event of each that pays.

    Raises `BudgetExhausted` when too few accounts can pay under one of the claims, and `BudgetNotSet`.
    """
    accounts = {account for each in requests for account in each.events}
    if not accounts:
        return {}
    after = payable(find_budgets(connection, accounts, lock=True), spent_of(connection, run_id, accounts), requests)
    rows = {(account, ALL_RUNS): by_all for account, (by_all, _) in after.items()}
    _write_totals(connection, rows | {(account, run_id): by_run for account, (_, by_run) in after.items()})
    return {account: each.events[account] for each in requests for account in each.events if account in after}


def payable(
    found: Mapping[Account, Budget], by_run: Mapping[Account, Events], requests: Sequence[Charges]
) -> dict[Account, tuple[Events, Events]]:
    """Return the accounts that can pay, each with what it will have spent in all runs and in this one.

    Raises `BudgetExhausted` when fewer can pay than a claim needs, and `BudgetNotSet`.
    """
    after: dict[Account, tuple[Events, Events]] = {}
    for each in requests:
        refusals: dict[Account, BudgetExhausted] = {}
        for account, event in each.events.items():
            if account not in found:
                raise unregistered_error(account)
            spent = plus(found[account].spent, event), plus(by_run.get(account, {}), event)
            try:
                each.guard(found[account], *spent)
                after[account] = spent
            except BudgetExhausted as error:
                refusals[account] = error
        if refusals and len(each.events) - len(refusals) < each.least:
            raise _exhausted(refusals)
    return after


def _exhausted(refusals: Mapping[Account, BudgetExhausted]) -> BudgetExhausted:
    first, *others = refusals
    named = ", ".join(repr(str(each)) for each in others[:NAMED])
    named += f" and {len(others) - NAMED} more" * (len(others) > NAMED)
    also = f"; nor can {len(others)} other{'s' * (len(others) > 1)} pay: {named}" if others else ""
    return BudgetExhausted(refusals[first].message + also, hint=refusals[first].hint)


def give_back(connection: Connection, run_id: str, paid: Mapping[Account, Mapping[str, Any]]) -> None:
    """Take the events of a collection off the budgets of the accounts that pay for it."""
    found, by_run = find_budgets(connection, paid, lock=True), spent_of(connection, run_id, paid)
    rows = {(account, ALL_RUNS): minus(found[account].spent, event) for account, event in paid.items()}
    rows |= {(account, run_id): minus(by_run[account], event) for account, event in paid.items()}
    _write_totals(connection, rows)


def open_collection(connection: Connection, run_id: str, round: int) -> AnyRow | None:
    """Return what is reserved for a round, and neither spent nor voided."""
    query = select(collections).where(
        collections.c.run_id == run_id, collections.c.round == round, collections.c.state == "reserved"
    )
    return connection.execute(query).one_or_none()


def enter(
    connection: Connection,
    run_id: str,
    round: int,
    collection: int,
    row: journal.Link,
    paid: Mapping[Account, Mapping[str, Any]],
) -> None:
    """Write a reservation that is journalled in `row`, and the charges that are counted for it."""
    key = {"run_id": run_id, "round": round, "collection": collection}
    connection.execute(
        insert(collections).values(**key, state="reserved", reserved_at=row.at, journal_sequence=row.sequence)
    )
    if paid:
        rows = [{**key, "account": account, "event": event} for account, event in sorted(paid.items())]
        connection.execute(insert(charges), rows)


def settle(connection: Connection, collection: AnyRow, state: str, at: float) -> None:
    """Write what became of a reservation: "spent" or "voided"."""
    here = [collections.c[name] == getattr(collection, name) for name in _KEY]
    connection.execute(update(collections).where(*here).values(state=state, settled_at=at))


def paid_by(connection: Connection, collection: AnyRow) -> dict[Account, dict[str, Any]]:
    """Return the event of each account that pays for a collection."""
    here = [charges.c[name] == getattr(collection, name) for name in _KEY]
    return {row.account: row.event for row in connection.execute(select(charges).where(*here))}


def check_same(paid: Mapping[Account, dict[str, Any]], requests: Sequence[Charges], where: str) -> None:
    """Raise `StoreError` when the charges of a reservation are not those that a resume would reserve."""
    wanted = {account: event for each in requests for account, event in each.events.items()}
    required = {account for account in wanted if account.client is None}
    for account in sorted(paid.keys() | required):
        if paid.get(account) != wanted.get(account):
            raise StoreError(
                f"{where} is already reserved for another privacy event of {account}: {paid.get(account)}, now "
                f"{wanted.get(account)}",
                hint="resume it with the version of fedrounds that began it",
            )


def failed_since(connection: Connection, collection: AnyRow) -> bool:
    """Return whether an attempt of the run has failed since the reservation, whatever came after."""
    ends = journal.read_kind(connection, collection.run_id, "run.finished", after=collection.journal_sequence)
    return any(content["state"] == RunState.FAILED for content in ends)


def as_groups(paid: Mapping[Account, Mapping[str, Any]]) -> list[list[Any]]:
    """Return charges as the journal has them, [[event, [account, ...]], ...], since most accounts pay for the same."""
    groups: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
    for account, event in sorted(paid.items()):
        groups.setdefault(canonical_json(event), (event, []))[1].append(str(account))
    return [[event, accounts] for _, (event, accounts) in sorted(groups.items())]


def _write_totals(connection: Connection, spent: Mapping[tuple[Account, str], Events]) -> None:
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(totals)
    statement = statement.on_conflict_do_update(
        index_elements=[totals.c.account, totals.c.run_id], set_={"spent": statement.excluded.spent}
    )
    rows = [
        {"account": account, "run_id": run_id, "spent": encode_events(events)}
        for (account, run_id), events in sorted(spent.items())
    ]
    connection.execute(statement, rows)


@dataclass(frozen=True, slots=True)
class RunTotals:
    """What a run has cost some accounts; equal ones are given once.

    Args:
      num_accounts: how many accounts pay for the run.
      spent: each different sum of events in this run.
      budgets: for each different budget and total of these accounts, one that has it.
    """

    num_accounts: int
    spent: list[Events]
    budgets: list[Budget]


class Ledger:
    """The privacy ledger of a store (`Store.ledger`). What a round costs is reserved by the run's `Lease`."""

    def __init__(self, database: Database, signing: Callable[[Connection], SigningKey]) -> None:
        self._database = database
        self._signing = signing

    def set_budget(self, account: Account, terms: BudgetTerms, *, reason: str, by: str) -> Budget:
        """Register an account, or change what it may spend: an act of an administrator, journalled with its reason.

        Terms that are the same already change nothing. Raises `ConfigError` when they would change the meaning of what
        is spent: only epsilon may differ then.
        """
        while True:
            with self._database.transaction() as connection:
                budget = accounts_.set_budget(connection, self._signing(connection), account, terms, reason, by=by)
            if budget is not None:
                return budget

    def register(self, accounts: Collection[Account]) -> None:
        """Give each of these accounts of one population's clients a budget on the terms of their template, where it has
        none yet. Raises `BudgetNotSet` when there are no such terms."""
        if accounts:
            with self._database.transaction() as connection:
                accounts_.register(connection, self._signing(connection), accounts)

    def budget(self, account: Account) -> Budget | None:
        """Return the budget of an account, if it has one."""
        return self.budgets([account]).get(account)

    def budgets(self, accounts: Collection[Account] | None = None) -> dict[Account, Budget]:
        """Return the budgets of these accounts (by default of all), for those that have one, in their order."""
        with self._database.snapshot() as connection:
            return find_budgets(connection, accounts)

    def named_accounts(self, population: str) -> dict[Account, bool]:
        """Return the accounts of a population's clients and their template.

        Whether each got its terms by its own name.
        """
        with self._database.snapshot() as connection:
            return accounts_.named_accounts(connection, population)

    def collections(self, run_id: str) -> list[CollectionRecord]:
        """Return what was reserved for the rounds of a run, in the order of reservation."""
        query = select(*(collections.c[each.name] for each in fields(CollectionRecord)))
        rows = self._rows(query.where(collections.c.run_id == run_id).order_by(collections.c.journal_sequence))
        return [CollectionRecord(**row._asdict()) for row in rows]

    def charges(self, account: Account | None = None, run_id: str | None = None) -> list[ChargeRecord]:
        """Return the charges of an account, of a run, or all, in the order of reservation."""
        query = (
            select(*(collections.c[each.name] for each in fields(CollectionRecord)), charges.c.account, charges.c.event)
            .join(charges, charges.c.run_id == collections.c.run_id)
            .where(charges.c.round == collections.c.round, charges.c.collection == collections.c.collection)
            .order_by(collections.c.journal_sequence, type_coerce(charges.c.account, String))
        )
        if account is not None:
            query = query.where(charges.c.account == account)
        if run_id is not None:
            query = query.where(charges.c.run_id == run_id)
        return [ChargeRecord(**row._asdict()) for row in self._rows(query)]

    def spent(self, run_id: str, accounts: Collection[Account] | None = None) -> dict[Account, Events]:
        """Return what a run has spent of each account that it has charged, or of these accounts."""
        with self._database.snapshot() as connection:
            return spent_of(connection, run_id, accounts)

    def spent_by_run(self, account: Account) -> dict[str, Events]:
        """Return what each run has spent of an account."""
        query = select(totals.c.run_id, totals.c.spent).where(totals.c.account == account, totals.c.run_id != ALL_RUNS)
        return {row.run_id: decode_events(row.spent) for row in self._rows(query) if row.spent}

    def totals(self, run_id: str, account: Account) -> RunTotals:
        """Return what a run has cost an account, or all accounts that a template stands for."""
        own, overall = totals.alias(), totals.alias()
        prefix = str(Account(account.population, ""))
        of_clients = func.substr(type_coerce(own.c.account, String), 1, len(prefix)) == prefix
        mine = (own.c.run_id == run_id) & (of_clients if account.is_template else own.c.account == account)
        representatives = (
            select(func.min(type_coerce(own.c.account, String)))
            .join(overall, (overall.c.account == own.c.account) & (overall.c.run_id == ALL_RUNS))
            .join(budgets, budgets.c.account == own.c.account)
            .where(mine)
            .group_by(overall.c.spent, budgets.c.epsilon)
        )
        with self._database.snapshot() as connection:
            count = connection.execute(select(func.count()).select_from(own).where(mine)).scalar_one()
            spent = [decode_events(each) for each in connection.scalars(select(own.c.spent).where(mine).distinct())]
            accounts = [Account.parse(text) for text in connection.scalars(representatives)]
            return RunTotals(count, spent, list(find_budgets(connection, accounts).values()))

    def check(self, run_id: str, requests: Sequence[Charges]) -> None:
        """Raise `BudgetExhausted` when a reservation of these charges would be refused; it decides itself later."""
        accounts = {account for each in requests for account in each.events}
        with self._database.snapshot() as connection:
            payable(find_budgets(connection, accounts), spent_of(connection, run_id, accounts), requests)

    def is_reserved(self, run_id: str, round: int) -> bool:
        """Return whether a round is reserved, and neither committed nor voided."""
        with self._database.snapshot() as connection:
            return open_collection(connection, run_id, round) is not None

    def num_spent(self, run_id: str) -> int:
        """Return how many collections of a run are charged for good."""
        return sum(each.state == "spent" for each in self.collections(run_id))

    def _rows(self, query: Any) -> list[Row[Any]]:
        with self._database.snapshot() as connection:
            return list(connection.execute(query))
