"""The ledger: what each population may spend and has spent, across all runs, and who allowed it.

A charge is counted when it is reserved, in the transaction that checks the budget: two runs cannot overspend together.
The totals stand beside the charges, so that the ten-thousandth round costs what the first did. Each act is a row of the
journal, to which `reconciliation` holds all of it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any, Final, TypeAlias

from sqlalchemy import Connection, insert, select, update

from fl_components.errors import ConfigError, StoreError
from fl_components.store import journal
from fl_components.store.keys import SigningKey
from fl_components.store.records import Budget, BudgetTerms
from fl_components.store.schema import AnyRow, canonical_json, charges, members, populations

Events: TypeAlias = "Mapping[str, int]"
"""How often each event was reserved or spent; an event is its canonical JSON text."""

Guard: TypeAlias = Callable[[Budget, Events, Events], None]
"""Decides on a reservation. Gets the budget, and what its population and the run will have spent with it; raises
`BudgetExhausted`."""

_PAGE: Final = 500  # of the values that a database takes in one query

_COLUMNS = [populations.c[each.name] for each in fields(Budget)]


def find(connection: Connection, population: str) -> Budget | None:
    return _budget(connection.execute(select(*_COLUMNS).where(populations.c.population == population)).one_or_none())


def all_budgets(connection: Connection) -> list[Budget]:
    rows = connection.execute(select(*_COLUMNS).order_by(populations.c.population))
    return [budget for budget in map(_budget, rows) if budget is not None]


def locked(connection: Connection, population: str) -> Budget:
    """The budget, locked against other reservations for the rest of the transaction. Raises `StoreError`."""
    budget = _find_locked(connection, population)
    if budget is None:
        raise unregistered(population)
    return budget


def _find_locked(connection: Connection, population: str) -> Budget | None:
    row = select(*_COLUMNS).where(populations.c.population == population).with_for_update()
    return _budget(connection.execute(row).one_or_none())


def unregistered(population: str) -> StoreError:
    command = f"`fedrounds privacy budget set {population} --epsilon E --delta D --reason ...`"
    return StoreError(f"population {population!r} has no privacy budget", hint=f"an administrator sets one: {command}")


def of_another_population(population: str, owner: str) -> ConfigError:
    return ConfigError(
        f"data of population {population!r} belong to population {owner!r}, which has a budget of its own",
        hint=f"populations that share clients are one: use population: {owner}",
    )


def set_budget(
    connection: Connection, key: SigningKey, population: str, terms: BudgetTerms, reason: str, *, by: str
) -> Budget:
    """Register a population, or change what it may spend. Raises `ConfigError` where that would change the meaning of
    what is spent already."""
    before = _find_locked(connection, population)
    if before is None:
        journal.lock(connection)  # so that of two processes that register it only one does
        before = _find_locked(connection, population)
    if before is not None and before.terms == terms:
        return before
    if before is not None and before.spent:
        old, new = asdict(before.terms), asdict(terms)
        differing = [f"{name} ({old[name]}, now {new[name]})" for name in old if old[name] != new[name]]
        fixed = [each for each in differing if not each.startswith("epsilon ")]
        if fixed:
            raise ConfigError(
                f"population {population!r} has spent under other terms: {', '.join(fixed)}",
                hint="only epsilon may change once something is spent; another population is a new beginning only if "
                "none of its clients is in this one",
            )
    content = {"population": population, **asdict(terms), "reason": reason, "by": by}
    row = journal.append(connection, key, None, "budget.set", content)
    values = {**asdict(terms), "journal_sequence": row.sequence, "set_at": row.at}
    if before is None:
        connection.execute(insert(populations).values(population=population, spent=[], **values))
    else:
        connection.execute(update(populations).where(populations.c.population == population).values(**values))
    found = find(connection, population)
    assert found is not None
    return found


def bind_members(connection: Connection, key: SigningKey, population: str, digests: Collection[str]) -> None:
    """Remember whose budget this is: each digest tells the data of a client (or of some) from others' to the hub whose
    key it was made with, and nothing of what is in them.

    Clients may come, and have new data: what was bound stays. Raises `ConfigError` where one belongs to another
    population.
    """
    locked(connection, population)
    journal.lock(connection)  # so that of two processes that bind the same data to two populations only one does
    known = bound(connection, digests)
    others = sorted(set(known.values()) - {population})
    if others:
        raise of_another_population(population, others[0])
    new = [digest for digest in digests if digest not in known]
    if new:
        content = {"population": population, "members": digest_of_members(new)}
        row = journal.append(connection, key, None, "population.bound", content)
        values = {"population": population, "key_id": key.id, "journal_sequence": row.sequence}
        connection.execute(insert(members), [{**values, "digest": digest} for digest in new])


def digest_of_members(digests: Iterable[str]) -> str:
    """What the journal has of them: they are made with a hub's key, so this tells nobody of the data either."""
    return hashlib.sha256(" ".join(sorted(digests)).encode()).hexdigest()


def bound(connection: Connection, digests: Collection[str]) -> dict[str, str]:
    """The populations that these digests are bound to, where they are."""
    found: dict[str, str] = {}
    wanted = list(digests)
    for start in range(0, len(wanted), _PAGE):
        query = select(members.c.digest, members.c.population).where(
            members.c.digest.in_(wanted[start : start + _PAGE])
        )
        found |= {row.digest: row.population for row in connection.execute(query)}
    return found


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
    return any(content["state"] == "Failed" for content in ends)


def give_back(connection: Connection, budget: Budget, run_spent: Events, event: dict[str, Any]) -> Events:
    """Take a reserved event off a locked budget again. Returns what the run has spent without it."""
    _write(connection, budget.population, minus(budget.spent, event))
    return minus(run_spent, event)


def as_pairs(spent: Events) -> list[list[Any]]:
    """As it is kept: [[event, count], ...], sorted."""
    return [[text, count] for text, count in sorted(spent.items())]


def from_pairs(pairs: Iterable[tuple[str, int]]) -> Events:
    return {text: count for text, count in pairs}


def plus(spent: Events, event: dict[str, Any]) -> Events:
    """With one event more."""
    return Counter(spent) + Counter([canonical_json(event)])


def minus(spent: Events, event: dict[str, Any]) -> Events:
    """With one event less."""
    return Counter(spent) - Counter([canonical_json(event)])


def _write(connection: Connection, population: str, spent: Events) -> None:
    connection.execute(update(populations).where(populations.c.population == population).values(spent=as_pairs(spent)))


def _budget(row: AnyRow | None) -> Budget | None:
    return None if row is None else Budget(**{**row._asdict(), "spent": from_pairs(row.spent)})
