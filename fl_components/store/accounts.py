"""Accounts in the database: the budget of each, and what is spent of it.

All functions work on the connection of a transaction that is open.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, fields
from typing import Any, Final

from sqlalchemy import Column, ColumnElement, Connection, String, func, insert, select, type_coerce, update

from fedrounds.fl_components.account import Account
from fedrounds.fl_components.canonical import canonical_json
from fedrounds.fl_components.errors import BudgetNotSet, ConfigError
from fedrounds.fl_components.store import journal
from fedrounds.fl_components.store.keys import SigningKey
from fedrounds.fl_components.store.records import Budget, BudgetTerms, Events
from fedrounds.fl_components.store.schema import budgets, totals

ALL_RUNS: Final = ""
"""In the place of a run id: the total of an account over all runs."""

_PAGE: Final = 500  # of the values that a database takes in one query

_TERMS: Final = [budgets.c[each.name] for each in fields(BudgetTerms)]


def find_budgets(
    connection: Connection, accounts: Collection[Account] | None = None, *, lock: bool = False
) -> dict[Account, Budget]:
    """Return the budgets of these accounts (by default of all), for those that have one.

    With `lock` no other transaction can reserve on them until this one ends. They are locked in the order of accounts.
    """
    query = select(budgets.c.account, *_TERMS, budgets.c.set_at).order_by(_by_code_point(connection))
    pages = [query] if accounts is None else [query.where(each) for each in in_pages(budgets.c.account, accounts)]
    rows = [row for each in pages for row in connection.execute(each.with_for_update() if lock else each)]
    # A statement of its own, after the lock: it sees what whoever had the lock before has written.
    spent = spent_of(connection, ALL_RUNS, None if accounts is None else [row.account for row in rows])
    return {row.account: Budget(**row._asdict(), spent=spent.get(row.account, {})) for row in rows}


def lock_budget(connection: Connection, account: Account) -> Budget:
    """Return the budget of an account, locked. Raises `BudgetNotSet`."""
    budget = find_budgets(connection, [account], lock=True).get(account)
    if budget is None:
        raise unregistered_error(account)
    return budget


def unregistered_error(account: Account, unit: str = "example") -> BudgetNotSet:
    """Return the error that an account has no budget; `unit` is that of a client's account."""
    options = "" if account.client is None else f" --unit {unit}"
    command = f"`fedrounds privacy budget set {shlex.quote(str(account))}{options} --epsilon E --delta D --reason ...`"
    return BudgetNotSet(
        f"population {str(account)!r} has no privacy budget", hint=f"an administrator sets one: {command}"
    )


def set_budget(
    connection: Connection, key: SigningKey, account: Account, terms: BudgetTerms, reason: str, *, by: str
) -> Budget | None:
    """Register an account, or change what it may spend.

    Raises `ConfigError` where that would change the meaning of what is spent already.

    The terms of a template are also those of the population's clients whose own budget was never set by name, and of
    the clients that are registered later.

    Returns None when another process has registered the account meanwhile: its row must be locked before the journal's
    head is, so the caller begins a new transaction.
    """
    before = _affected(connection, account)
    if account not in before:
        journal.lock(connection)  # so that of two processes that register it only one does
        if find_budgets(connection, [account]):
            return None
    unchanged = account in before and all(each.terms == terms for each in before.values())
    if unchanged and _is_named(connection, account):
        return before[account]
    for each in before.values():
        _check_meaning_stays(each, terms)
    content = {"account": str(account), **asdict(terms), "reason": reason, "by": by}
    row = journal.append(connection, key, None, "budget.set", content)
    values = {**asdict(terms), "journal_sequence": row.sequence, "set_at": row.at}
    for page in in_pages(budgets.c.account, before):
        connection.execute(update(budgets).where(page).values(**values))
    if account not in before:
        connection.execute(insert(budgets).values(account=account, **values))
    return find_budgets(connection, [account])[account]


def _affected(connection: Connection, account: Account) -> dict[Account, Budget]:
    """Return the budgets whose terms are set with those of an account, locked.

    The template's lock comes before the others and keeps clients from being registered. Which clients got terms by
    their own names is read once all of them are locked.
    """
    before = find_budgets(connection, [account], lock=True)
    if not before or not account.is_template:
        return before
    clients = find_budgets(connection, named_accounts(connection, account.population).keys() - {account}, lock=True)
    named = named_accounts(connection, account.population)
    return before | {each: clients[each] for each, is_named in named.items() if not is_named}


def _is_named(connection: Connection, account: Account) -> bool:
    """Return whether an account got its terms by its own name."""
    query = select(budgets.c.journal_sequence).where(budgets.c.account == account)
    sequence = connection.execute(query).scalar_one()
    return bool(journal.contents(connection, [sequence])[sequence].get("account") == str(account))


def named_accounts(connection: Connection, population: str) -> dict[Account, bool]:
    """Return the accounts of a population's clients and their template: whether each got its terms by its own name."""
    prefix = str(Account(population, ""))
    rows = connection.execute(
        select(budgets.c.account, budgets.c.journal_sequence)
        .where(func.substr(type_coerce(budgets.c.account, String), 1, len(prefix)) == prefix)
        .order_by(_by_code_point(connection))
    ).all()
    contents = journal.contents(connection, {row.journal_sequence for row in rows})
    return {row.account: contents[row.journal_sequence].get("account") == str(row.account) for row in rows}


def _check_meaning_stays(before: Budget, terms: BudgetTerms) -> None:
    old, new = asdict(before.terms), asdict(terms)
    differing = [f"{name} ({old[name]}, now {new[name]})" for name in old if old[name] != new[name]]
    free = ("epsilon ", "demonstration ") if old["demonstration"] else ("epsilon ",)
    fixed = [each for each in differing if not each.startswith(free)]
    if before.spent and fixed:
        raise ConfigError(
            f"population {str(before.account)!r} has spent under other terms: {', '.join(fixed)}",
            hint="only epsilon may change once something is spent; another population is a new beginning only if "
            "none of its clients is in this one",
        )


def register(connection: Connection, key: SigningKey, accounts: Collection[Account]) -> None:
    """Give each of these accounts of clients that has no budget yet one on its template's terms.

    Raises `BudgetNotSet`.
    """
    if len(find_budgets(connection, accounts)) == len(accounts):
        return
    (template,) = {each.template for each in accounts}
    # Locked, so that `set_budget` of the template either sees these clients or is seen here.
    terms = lock_budget(connection, template).terms
    journal.lock(connection)  # so that of two processes that register a client only one does
    new = sorted(set(accounts) - find_budgets(connection, accounts).keys())
    if new:
        content = {"account": str(template), "clients": [str(each) for each in new]}
        row = journal.append(connection, key, None, "clients.registered", content)
        values = {**asdict(terms), "journal_sequence": row.sequence, "set_at": row.at}
        connection.execute(insert(budgets), [{**values, "account": each} for each in new])


def spent_of(connection: Connection, run_id: str, accounts: Collection[Account] | None = None) -> dict[Account, Events]:
    """Return what a run (or `ALL_RUNS`) has spent of these accounts, by default of all that it has charged."""
    query = select(totals.c.account, totals.c.spent).where(totals.c.run_id == run_id)
    pages = [query] if accounts is None else [query.where(each) for each in in_pages(totals.c.account, accounts)]
    return {row.account: decode_events(row.spent) for each in pages for row in connection.execute(each) if row.spent}


def encode_events(spent: Events) -> list[list[Any]]:
    """Return events as the database has them: [[event, count], ...], sorted."""
    return [[text, count] for text, count in sorted(spent.items())]


def decode_events(pairs: Iterable[tuple[str, int]]) -> Events:
    """Return the events that `encode_events` encoded."""
    return {text: count for text, count in pairs}


def plus(spent: Events, event: Mapping[str, Any]) -> Events:
    """Return what is spent with one event more."""
    return Counter(spent) + Counter([canonical_json(event)])


def minus(spent: Events, event: Mapping[str, Any]) -> Events:
    """Return what is spent with one event less."""
    return Counter(spent) - Counter([canonical_json(event)])


def in_pages(column: Column[Any], values: Collection[Any]) -> Iterator[ColumnElement[bool]]:
    """Yield conditions that a column has one of these values, in their order, each short enough for a database."""
    ordered = sorted(values)
    for start in range(0, len(ordered), _PAGE):
        yield column.in_(ordered[start : start + _PAGE])


def _by_code_point(connection: Connection) -> ColumnElement[str]:
    """Return the order of accounts, which is one in all transactions, whatever the database's collation is."""
    text = type_coerce(budgets.c.account, String)
    return text.collate("C") if connection.dialect.name == "postgresql" else text
