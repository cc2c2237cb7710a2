"""The ledgers of clients that answer for their own examples: each has a population of its own, POPULATION/CLIENT.

They are charged in the transaction that reserves a round, and what becomes of that charge becomes of theirs. The
journal has them in the row of the reservation.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from sqlalchemy import Connection, and_, bindparam, func, insert, select, update

from fedrounds.fl_components.canonical import canonical_json
from fedrounds.fl_components.errors import BudgetExhausted, StoreError
from fedrounds.fl_components.store import journal, ledger
from fedrounds.fl_components.store.keys import SigningKey
from fedrounds.fl_components.store.ledger import EACH_CLIENT, in_pages, plus
from fedrounds.fl_components.store.records import Budget, ChargeRecord, Events, ExampleCharges
from fedrounds.fl_components.store.schema import (
    AnyRow,
    charges,
    example_charges,
    example_spending,
    populations,
)

NAMED: Final = 5
"""Clients that an error names besides the first."""


def register(connection: Connection, key: SigningKey, population: str, names: Collection[str]) -> None:
    """Give each of these clients that has no budget yet one on the terms of POPULATION/*. Raises `StoreError`."""
    if len(ledger.find_many(connection, names)) == len(names):
        return
    # Locked, so that `set_budget` of POPULATION/* either sees these clients or is seen here.
    terms_of_all = ledger.locked(connection, population + EACH_CLIENT)
    journal.lock(connection)  # so that of two processes that register a client only one does
    new = sorted(set(names) - ledger.find_many(connection, names).keys())
    if new:
        content = {"population": terms_of_all.population, "clients": new}
        row = journal.append(connection, key, None, "clients.registered", content)
        values = {**asdict(terms_of_all.terms), "spent": [], "journal_sequence": row.sequence, "set_at": row.at}
        connection.execute(insert(populations), [{**values, "population": name} for name in new])


def charge(connection: Connection, run_id: str, wanted: ExampleCharges) -> dict[str, dict[str, Any]]:
    """Count a round against the budgets of its clients, where the guard lets it. Returns the events of those that pay.

    Raises `BudgetExhausted` when fewer can than are needed.
    """
    budgets = ledger.find_many(connection, wanted.events, lock=True)
    before = spending_of(connection, run_id, wanted.events)
    after = payable(budgets, before, wanted)
    if after:
        ledger.write_many(connection, {name: by_all for name, (by_all, _) in after.items()})
        _write(connection, run_id, {name: by_run for name, (_, by_run) in after.items()}, before)
    return {name: wanted.events[name] for name in after}


def payable(
    budgets: Mapping[str, Budget], before: Mapping[str, Events], wanted: ExampleCharges
) -> dict[str, tuple[Events, Events]]:
    """The clients that can pay, each with what it will have spent by all runs and by this one."""
    found, refusals = {}, {}
    for name, event in wanted.events.items():
        after = plus(budgets[name].spent, event), plus(before.get(name, {}), event)
        try:
            wanted.guard(budgets[name], *after)
            found[name] = after
        except BudgetExhausted as error:
            refusals[name] = error
    if refusals and len(found) < wanted.least:
        first, *others = refusals
        named = ", ".join(map(repr, others[:NAMED])) + (
            f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
        )
        beside = f"; nor can {len(others)} other{'s' * (len(others) > 1)} pay: {named}" if others else ""
        raise BudgetExhausted(refusals[first].message + beside, hint=refusals[first].hint)
    return found


def enter(
    connection: Connection, run_id: str, round: int, collection: int, paid: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write the clients' charges beside the round's own."""
    which = {"run_id": run_id, "round": round, "collection": collection}
    connection.execute(
        insert(example_charges), [{**which, "population": name, "event": event} for name, event in sorted(paid.items())]
    )


def paid(connection: Connection, charge: AnyRow) -> dict[str, dict[str, Any]]:
    """The clients that pay for a charge, each with its event."""
    query = select(example_charges.c.population, example_charges.c.event).where(
        example_charges.c.run_id == charge.run_id,
        example_charges.c.round == charge.round,
        example_charges.c.collection == charge.collection,
    )
    return {row.population: row.event for row in connection.execute(query)}


def check_same(found: Mapping[str, dict[str, Any]], wanted: ExampleCharges, where: str) -> None:
    """Raises `StoreError` when an open reservation's events are not those that a resume would reserve."""
    other = next((name for name, event in found.items() if wanted.events.get(name) != event), None)
    if other is not None:
        raise StoreError(
            f"{where} is already reserved for another privacy event of {other}: {found[other]}, now "
            f"{wanted.events.get(other)}",
            hint="resume it with the version of fedrounds that began it",
        )


def spending_of(connection: Connection, run_id: str, names: Collection[str] | None = None) -> dict[str, Events]:
    """What a run has spent of each client's budget, or of these clients'."""
    query = select(example_spending.c.population, example_spending.c.spent).where(example_spending.c.run_id == run_id)
    pages = [query] if names is None else [query.where(each) for each in in_pages(example_spending.c.population, names)]
    return {row.population: ledger.decode_events(row.spent) for each in pages for row in connection.execute(each)}


@dataclass(frozen=True, slots=True)
class ExampleTotals:
    """What clients have spent, each different sum once: `of_run` in one run, and `budgets` of those that took part in
    it, by all runs."""

    num_clients: int
    of_run: list[Events]
    budgets: list[Budget]


def totals(connection: Connection, run_id: str) -> ExampleTotals:
    mine = example_spending.c.run_id == run_id
    count = connection.execute(select(func.count()).select_from(example_spending).where(mine)).scalar_one()
    spent = connection.scalars(select(example_spending.c.spent).where(mine).distinct())
    each = (
        select(func.min(populations.c.population))
        .join(example_spending, example_spending.c.population == populations.c.population)
        .where(mine)
        .group_by(populations.c.spent, populations.c.epsilon)
    )
    names = list(connection.scalars(each))
    return ExampleTotals(
        count, [ledger.decode_events(pairs) for pairs in spent], list(ledger.find_many(connection, names).values())
    )


def runs_of(connection: Connection, population: str) -> dict[str, Events]:
    """What each run has spent of one client's budget."""
    query = select(example_spending.c.run_id, example_spending.c.spent).where(
        example_spending.c.population == population
    )
    return {row.run_id: ledger.decode_events(row.spent) for row in connection.execute(query)}


def charges_of(connection: Connection, population: str) -> list[ChargeRecord]:
    """A client's ledger, in the order of reservation."""
    theirs = (
        select(
            example_charges.c.population,
            charges.c.run_id,
            charges.c.round,
            charges.c.collection,
            example_charges.c.event,
            charges.c.state,
            charges.c.reserved_at,
            charges.c.settled_at,
        )
        .join(
            charges,
            and_(*(charges.c[name] == example_charges.c[name] for name in ("run_id", "round", "collection"))),
        )
        .where(example_charges.c.population == population)
        .order_by(charges.c.journal_sequence)
    )
    return [ChargeRecord(*row) for row in connection.execute(theirs)]


def as_groups(paid: Mapping[str, Mapping[str, Any]]) -> list[list[Any]]:
    """As the journal has them: [[event, [population, ...]], ...], since most pay for the same event."""
    groups: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
    for name, event in sorted(paid.items()):
        groups.setdefault(canonical_json(event), (event, []))[1].append(name)
    return [[event, names] for _, (event, names) in sorted(groups.items())]


def _write(connection: Connection, run_id: str, spent: Mapping[str, Events], known: Collection[str]) -> None:
    rows = [{"whose": name, "all_spent": ledger.encode_events(events)} for name, events in sorted(spent.items())]
    old, new = ([row for row in rows if (row["whose"] in known) == before] for before in (True, False))
    if old:
        connection.execute(
            update(example_spending)
            .where(example_spending.c.run_id == run_id, example_spending.c.population == bindparam("whose"))
            .values(spent=bindparam("all_spent")),
            old,
        )
    if new:
        connection.execute(
            insert(example_spending),
            [{"run_id": run_id, "population": row["whose"], "spent": row["all_spent"]} for row in new],
        )
