"""The ledger: what each population may spend and has spent, across all runs, and who allowed it.

A charge is counted when it is reserved, in the transaction that checks the budget: two runs cannot overspend together.
The totals stand beside the charges, so that the ten-thousandth round costs what the first did. Each act is a row of the
journal, to which `reconciliation` holds all of it.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, fields
from typing import Any, Final

from sqlalchemy import Column, ColumnElement, Connection, bindparam, func, insert, select, update

from fedrounds.fl_components.canonical import canonical_json
from fedrounds.fl_components.errors import BudgetNotSet, ConfigError
from fedrounds.fl_components.run_state import RunState
from fedrounds.fl_components.store import journal
from fedrounds.fl_components.store.keys import SigningKey
from fedrounds.fl_components.store.records import Budget, BudgetTerms, Events, Guard
from fedrounds.fl_components.store.schema import AnyRow, charges, populations

_PAGE: Final = 500  # of the values that a database takes in one query

_COLUMNS = [populations.c[each.name] for each in fields(Budget)]


EACH_CLIENT: Final = "/*"
"""What follows a population's name where the terms of each client's own budget are meant."""


def of_client(population: str, client_id: str) -> str:
    """The population of one client: its examples, which have a budget of their own.

    >>> of_client("heart", "cleveland")
    'heart/cleveland'
    """
    return f"{population}/{client_id}"


def find(connection: Connection, population: str) -> Budget | None:
    return _budget(connection.execute(select(*_COLUMNS).where(populations.c.population == population)).one_or_none())


def all_budgets(connection: Connection) -> list[Budget]:
    rows = connection.execute(select(*_COLUMNS).order_by(populations.c.population))
    return [budget for budget in map(_budget, rows) if budget is not None]


def locked(connection: Connection, population: str) -> Budget:
    """The budget, locked against other reservations for the rest of the transaction. Raises `BudgetNotSet`."""
    budget = _find_locked(connection, population)
    if budget is None:
        raise unregistered_error(population)
    return budget


def _find_locked(connection: Connection, population: str) -> Budget | None:
    row = select(*_COLUMNS).where(populations.c.population == population).with_for_update()
    return _budget(connection.execute(row).one_or_none())


def unregistered_error(population: str) -> BudgetNotSet:
    options = " --unit example" * population.endswith(EACH_CLIENT)
    command = f"`fedrounds privacy budget set {shlex.quote(population)}{options} --epsilon E --delta D --reason ...`"
    return BudgetNotSet(
        f"population {population!r} has no privacy budget", hint=f"an administrator sets one: {command}"
    )


def of_another_population(population: str, owner: str) -> ConfigError:
    return ConfigError(
        f"data of population {population!r} belong to population {owner!r}, which has a budget of its own",
        hint=f"populations that share clients are one: use population: {owner}",
    )


def set_budget(
    connection: Connection, key: SigningKey, population: str, terms: BudgetTerms, reason: str, *, by: str
) -> Budget | None:
    """Register a population, or change what it may spend; of "POPULATION/*" what each client of it may, those that are
    known and those to come, but for those whose own budget was set by name: that one stays. Raises `ConfigError` where
    it would change the meaning of what is spent already.

    Returns None when another process has registered the population meanwhile: its row must be locked before the
    journal's head is, so the caller begins a new transaction.
    """
    before = _affected(connection, population)
    if population not in before:
        journal.lock(connection)  # so that of two processes that register it only one does
        if find(connection, population) is not None:
            return None
    same = population in before and all(each.terms == terms for each in before.values())
    if same and _is_named(connection, population):
        return before[population]
    for each in before.values():
        _check_meaning_stays(each, terms)
    content = {"population": population, **asdict(terms), "reason": reason, "by": by}
    row = journal.append(connection, key, None, "budget.set", content)
    values = {**asdict(terms), "journal_sequence": row.sequence, "set_at": row.at}
    for page in in_pages(populations.c.population, before):
        connection.execute(update(populations).where(page).values(**values))
    if population not in before:
        connection.execute(insert(populations).values(population=population, spent=[], **values))
    found = find(connection, population)
    assert found is not None
    return found


def _affected(connection: Connection, population: str) -> dict[str, Budget]:
    """The budgets whose terms are set with those of a population, locked.

    The lock on POPULATION/* comes before the others and keeps clients from being registered; which of these got terms
    by their own names is read once all of them are locked.
    """
    before = find_many(connection, [population], lock=True)
    if not before or not population.endswith(EACH_CLIENT):
        return before
    base = population.removesuffix(EACH_CLIENT)
    clients = find_many(connection, clients_of(connection, base).keys() - {population}, lock=True)
    return before | {name: clients[name] for name, named in clients_of(connection, base).items() if not named}


def _is_named(connection: Connection, population: str) -> bool:
    """Whether it got its terms by its own name."""
    sequence = select(populations.c.journal_sequence).where(populations.c.population == population)
    row = connection.execute(sequence).scalar_one()
    return bool(journal.contents(connection, [row])[row].get("population") == population)


def clients_of(connection: Connection, population: str) -> dict[str, bool]:
    """The budgets of a population's clients and POPULATION/*, each with whether it got its terms by its own name."""
    prefix = of_client(population, "")
    rows = connection.execute(
        select(populations.c.population, populations.c.journal_sequence)
        .where(func.substr(populations.c.population, 1, len(prefix)) == prefix)
        .order_by(populations.c.population)
    ).all()
    contents = journal.contents(connection, {row.journal_sequence for row in rows})
    return {row.population: contents[row.journal_sequence].get("population") == row.population for row in rows}


def _check_meaning_stays(before: Budget, terms: BudgetTerms) -> None:
    old, new = asdict(before.terms), asdict(terms)
    differing = [f"{name} ({old[name]}, now {new[name]})" for name in old if old[name] != new[name]]
    free = ("epsilon ", "demonstration ") if old["demonstration"] else ("epsilon ",)
    fixed = [each for each in differing if not each.startswith(free)]
    if before.spent and fixed:
        raise ConfigError(
            f"population {before.population!r} has spent under other terms: {', '.join(fixed)}",
            hint="only epsilon may change once something is spent; another population is a new beginning only if "
            "none of its clients is in this one",
        )


def in_pages(column: Column[str], values: Collection[str]) -> Iterator[ColumnElement[bool]]:
    """That a column is one of these values, as conditions that a database can take, in the order of the values."""
    wanted = sorted(values)
    for start in range(0, len(wanted), _PAGE):
        yield column.in_(wanted[start : start + _PAGE])


def charge(connection: Connection, budget: Budget, run_spent: Events, event: dict[str, Any], guard: Guard) -> Events:
    """Count one more event against a locked budget, if `guard` lets it. Returns what the run has spent with it."""
    population_after, run_after = plus(budget.spent, event), plus(run_spent, event)
    guard(budget, population_after, run_after)
    _write(connection, budget.population, population_after)
    return run_after


def open_charge(connection: Connection, run_id: str, round: int) -> AnyRow | None:
    """What is reserved for a round, and neither spent nor voided."""
    query = select(charges).where(charges.c.run_id == run_id, charges.c.round == round, charges.c.state == "reserved")
    return connection.execute(query).one_or_none()


def settle(connection: Connection, charge: AnyRow, state: str, at: float) -> None:
    """Write down what became of a reserved charge: "spent" or "voided"."""
    connection.execute(
        update(charges)
        .where(
            charges.c.run_id == charge.run_id,
            charges.c.round == charge.round,
            charges.c.collection == charge.collection,
        )
        .values(state=state, settled_at=at)
    )


def failed_since(connection: Connection, charge: AnyRow) -> bool:
    """Whether an attempt of the run has failed since the charge was reserved, whatever came after."""
    ends = journal.read_kind(connection, charge.run_id, "run.finished", after=charge.journal_sequence)
    return any(content["state"] == RunState.FAILED for content in ends)


def give_back(connection: Connection, budget: Budget, run_spent: Events, event: dict[str, Any]) -> Events:
    """Take a reserved event off a locked budget again. Returns what the run has spent without it."""
    _write(connection, budget.population, minus(budget.spent, event))
    return minus(run_spent, event)


def encode_events(spent: Events) -> list[list[Any]]:
    """As it is kept: [[event, count], ...], sorted."""
    return [[text, count] for text, count in sorted(spent.items())]


def decode_events(pairs: Iterable[tuple[str, int]]) -> Events:
    return {text: count for text, count in pairs}


def plus(spent: Events, event: dict[str, Any]) -> Events:
    """With one event more."""
    return Counter(spent) + Counter([canonical_json(event)])


def minus(spent: Events, event: dict[str, Any]) -> Events:
    """With one event less."""
    return Counter(spent) - Counter([canonical_json(event)])


def _write(connection: Connection, population: str, spent: Events) -> None:
    connection.execute(
        update(populations).where(populations.c.population == population).values(spent=encode_events(spent))
    )


def find_many(connection: Connection, names: Collection[str], *, lock: bool = False) -> dict[str, Budget]:
    """The budgets of these populations, where they have one; locked in the order of their names' code points."""
    found: dict[str, Budget] = {}
    for page in in_pages(populations.c.population, names):
        query = select(*_COLUMNS).where(page).order_by(_by_code_point(connection))
        budgets = map(_budget, connection.execute(query.with_for_update() if lock else query))
        found |= {each.population: each for each in budgets if each is not None}
    return found


def _by_code_point(connection: Connection) -> ColumnElement[str]:
    """The names in one order in all transactions, that of `in_pages`, whatever the database's collation is."""
    name = populations.c.population
    return name.collate("C") if connection.dialect.name == "postgresql" else name


def write_many(connection: Connection, spent: Mapping[str, Events]) -> None:
    """What these populations have spent from now on."""
    connection.execute(
        update(populations).where(populations.c.population == bindparam("whose")).values(spent=bindparam("all_spent")),
        [{"whose": population, "all_spent": encode_events(events)} for population, events in sorted(spent.items())],
    )


def _budget(row: AnyRow | None) -> Budget | None:
    return None if row is None else Budget(**{**row._asdict(), "spent": decode_events(row.spent)})
