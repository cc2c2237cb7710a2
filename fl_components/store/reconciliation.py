"""Whether the store is what its journal says: the journal's rows are signed, those of the other tables are not."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final

from sqlalchemy import Connection, select

from fl_components.errors import JournalBroken
from fl_components.store import bindings, ledger
from fl_components.store.journal import RESTORE
from fl_components.store.ledger import EACH_CLIENT
from fl_components.store.records import BudgetTerms
from fl_components.store.schema import (
    canonical_json,
    charges,
    example_charges,
    example_spending,
    rounds,
    runs,
)
from fl_components.store.schema import journal as journal_table

_KINDS: Final = (
    "budget.set",
    "clients.registered",
    "population.bound",
    "data.used",
    "charge.reserved",
    "charge.voided",
    "round.committed",
)


def reconcile(connection: Connection) -> None:
    """Raises `JournalBroken`, naming what differs, unless budgets, charges, totals and committed rounds are what the
    journal says. The journal itself is to be verified before."""
    told, stored = _told(connection), _stored(connection)
    for book in fields(_Books):
        expected, found = getattr(told, book.name), getattr(stored, book.name)
        if expected != found:
            differing = [key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)]
            raise JournalBroken(
                f"{book.name.replace('_', ' ')} differ from what the journal says: {', '.join(sorted(differing)[:3])}",
                hint=RESTORE,
            )


@dataclass
class _Books:
    """All that the journal vouches for, each by whom or what it is about."""

    budgets: dict[str, BudgetTerms] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)  # what names them, twice: the hash of their digests
    bindings: dict[str, tuple[str, str]] = field(default_factory=dict)  # of data to populations, by their journal rows
    uses: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # of data by runs, by their journal rows
    charges: dict[str, tuple[str, str, str]] = field(default_factory=dict)
    charges_of_examples: dict[str, str] = field(default_factory=dict)
    totals_of_populations: dict[str, Mapping[str, int]] = field(default_factory=dict)
    totals_of_runs: dict[str, Mapping[str, int]] = field(default_factory=dict)
    rounds: dict[str, tuple[int, str]] = field(default_factory=dict)


def _told(connection: Connection) -> _Books:
    """By the journal."""
    books, named = _Books(), set[str]()  # those that got their terms by their own name
    query = select(journal_table.c.sequence, journal_table.c.run_id, journal_table.c.kind, journal_table.c.content)
    for sequence, run_id, kind, text in connection.execute(
        query.where(journal_table.c.kind.in_(_KINDS)).order_by(journal_table.c.sequence)
    ):
        content = json.loads(text)
        if kind == "budget.set":
            terms = BudgetTerms(**{each.name: content[each.name] for each in fields(BudgetTerms)})
            named.add(content["population"])
            books.budgets[content["population"]] = terms
            if content["population"].endswith(EACH_CLIENT):
                prefix = content["population"].removesuffix("*")
                theirs = {name for name in books.budgets if name.startswith(prefix)} - named
                books.budgets |= dict.fromkeys(theirs, terms)
        elif kind == "clients.registered":
            books.budgets |= {name: books.budgets[content["population"]] for name in content["clients"]}
        elif kind == "population.bound":
            books.bindings[f"row {sequence}"] = (content["population"], content["data_id"])
        elif kind == "data.used":
            books.data[content["data_id"]] = content["data_id"]
            use = (content["name"], content["population"], tuple(content["units"]), content["data_id"])
            books.uses[f"row {sequence}"] = (run_id, *use)
        else:
            charge = _charge(run_id, content["round"], content["collection"])
            if kind == "charge.reserved":
                books.charges[charge] = (content["population"], canonical_json(content["event"]), "reserved")
                for event, names in content.get("examples", ()):
                    books.charges_of_examples |= {f"{charge} of {name}": canonical_json(event) for name in names}
            else:
                state = "voided" if kind == "charge.voided" else "spent"
                books.charges[charge] = (*books.charges[charge][:2], state)
            if kind == "round.committed":
                books.rounds[_round(run_id, content["round"])] = (content["collection"], content["params_digest"])
    spent: dict[str, Counter[str]] = defaultdict(Counter)
    by_runs: dict[str, Counter[str]] = defaultdict(Counter)
    for charge, (population, event, state) in books.charges.items():
        if population in books.budgets and state != "voided" and json.loads(event).get("kind") != "none":
            spent[population][event] += 1
            by_runs[charge.partition(" ")[0]][event] += 1
    for entry, event in books.charges_of_examples.items():
        charge, _, name = entry.partition(" of ")
        if books.charges[charge][2] != "voided":
            spent[name][event] += 1
            by_runs[f"{charge.partition(' ')[0]} at {name}"][event] += 1
    books.totals_of_populations, books.totals_of_runs = {**spent}, {**by_runs}
    return books


def _stored(connection: Connection) -> _Books:
    """By the other tables."""
    budgets = ledger.all_budgets(connection)
    return _Books(
        budgets={each.population: each.terms for each in budgets},
        **bindings.books(connection),
        charges={
            _charge(row.run_id, row.round, row.collection): (row.population, canonical_json(row.event), row.state)
            for row in connection.execute(select(charges))
        },
        charges_of_examples={
            f"{_charge(row.run_id, row.round, row.collection)} of {row.population}": canonical_json(row.event)
            for row in connection.execute(select(example_charges))
        },
        totals_of_populations={each.population: each.spent for each in budgets if each.spent},
        totals_of_runs={
            row.run_id: ledger.from_pairs(row.spent)
            for row in connection.execute(select(runs.c.run_id, runs.c.spent))
            if row.spent
        }
        | {
            f"{row.run_id} at {row.population}": ledger.from_pairs(row.spent)
            for row in connection.execute(select(example_spending))
            if row.spent
        },
        rounds={
            _round(row.run_id, row.round): (row.collection, row.params_digest)
            for row in connection.execute(
                select(rounds.c.run_id, rounds.c.round, rounds.c.collection, rounds.c.params_digest)
            )
        },
    )


def _round(run_id: str, round: int) -> str:
    return f"{run_id} round {round}"


def _charge(run_id: str, round: int, collection: int) -> str:
    return f"{_round(run_id, round)} collection {collection}"
