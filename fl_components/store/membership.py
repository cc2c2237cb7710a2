"""Whose data these are.

Keyed fingerprints of the data of runs, the populations that data are bound to, and the runs that have used them.

A digest is made with the key of fingerprints, which all hubs of one database share, so that it reveals nothing
of the data to others. Its first letter says what it stands for: `r` a row, `w` all rows of a client, `c` a column of a
client. Data are named by the hash of their digests, which the journal holds.
"""

from __future__ import annotations

import hashlib
import platform
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sqlalchemy import Connection, and_, func, insert, select

from fedrounds.fl_components.account import Account
from fedrounds.fl_components.errors import StoreError
from fedrounds.fl_components.run_state import RunState
from fedrounds.fl_components.store import accounts, journal
from fedrounds.fl_components.store.database import Database
from fedrounds.fl_components.store.keys import KeyRing, SigningKey
from fedrounds.fl_components.store.schema import bindings, data_uses, fingerprint_key, fingerprints, runs
from fedrounds.fl_components.store.schema import journal as journal_table

MIN_ROWS: Final = 4
"""Rows that two data sets must share to count as the same clients' where no more is known of them."""

Owners = Mapping[str, Collection[tuple[str, str]]]
"""Digest -> the (population, client) pairs that it is bound to; a client "" is any of the population's."""


@dataclass(frozen=True, slots=True)
class DataUse:
    """A run on data that are not known to be public.

    Args:
      units: whose data a budget answers for in this run: "client", "example", both, or none.
      rounds: how many it has committed.
      deleted: whether the run itself is gone; this record stays.
    """

    run_id: str
    name: str
    population: str
    units: list[str]
    began_at: float
    rounds: int
    deleted: bool


def shared_key(connection: Connection, keys: KeyRing) -> bytes | None:
    """The key of fingerprints of this database; None where it has none yet.

    Raises `StoreError` where this home lacks it.
    """
    row = connection.execute(select(fingerprint_key)).one_or_none()
    if row is None:
        return None
    key = keys.fingerprint_key(row.key_id)
    if key is None:
        name = keys.fingerprint_file(row.key_id).name
        raise StoreError(
            f"this home lacks the file secrets/{name}: without this key a run's data cannot be "
            "compared with those that belong to a population that has a privacy budget",
            hint=f"copy {Path(row.home) / 'secrets' / name} of host {row.host}, where the key was made, or of another "
            f"hub of this database, to {keys.fingerprint_file(row.key_id)} (mode 0600); a key that is lost must be "
            "restored from a backup of one of them",
        )
    return key


def make_shared_key(connection: Connection, keys: KeyRing, signing: SigningKey, id: str, home: Path) -> bool:
    """Record a key that was made here as this database's; False where another one was first."""
    journal.lock(connection)
    if connection.execute(select(fingerprint_key.c.key_id)).one_or_none() is not None:
        return False
    content = {"key_id": id, "host": platform.node(), "home": str(home)}
    row = journal.append(connection, signing, None, "fingerprints.key", content)
    connection.execute(insert(fingerprint_key).values(id=1, journal_sequence=row.sequence, **content))
    return True


def owners_of(connection: Connection, digests: Collection[str]) -> dict[str, set[tuple[str, str]]]:
    """The populations and clients that these digests are bound to."""
    owners: dict[str, set[tuple[str, str]]] = {}
    query = select(fingerprints.c.digest, bindings.c.population, fingerprints.c.client).join(
        bindings, bindings.c.data_id == fingerprints.c.data_id
    )
    for page in accounts.in_pages(fingerprints.c.digest, digests):
        for digest, population, client in connection.execute(query.where(page)):
            owners.setdefault(digest, set()).add((population, client))
    return owners


def enter(
    connection: Connection,
    key: SigningKey,
    *,
    run_id: str,
    name: str,
    population: str,
    units: Sequence[str],
    digests: Mapping[str, str],
    check: Callable[[Owners], None],
) -> None:
    """Remember that a run uses data, given as digests (digest -> client), and bind them to its population where it
    answers for them to a budget.

    `check` sees whose the digests are once nothing else can be bound any more, and raises where they are another's. The
    locks are those of the accounts, in their order, and then the journal's head.
    """
    if units:
        account = Account(population)
        if not accounts.find_budgets(connection, [account, account.template], lock=True):
            raise accounts.unregistered_error(account)
    journal.lock(connection)
    check(owners_of(connection, digests))
    data_id = id_of(digests)
    if (
        connection.execute(select(fingerprints.c.digest).where(fingerprints.c.data_id == data_id).limit(1)).first()
        is None
    ):
        rows = [{"data_id": data_id, "digest": digest, "client": client} for digest, client in sorted(digests.items())]
        if rows:
            connection.execute(insert(fingerprints), rows)
    where = and_(data_uses.c.run_id == run_id, data_uses.c.data_id == data_id)
    if connection.execute(select(data_uses.c.run_id).where(where)).first() is None:
        content = {"name": name, "population": population, "units": sorted(units), "data_id": data_id}
        row = journal.append(connection, key, run_id, "data.used", content)
        connection.execute(insert(data_uses).values(run_id=run_id, journal_sequence=row.sequence, at=row.at, **content))
    where = and_(bindings.c.population == population, bindings.c.data_id == data_id)
    if units and connection.execute(select(bindings.c.data_id).where(where)).first() is None:
        content = {"population": population, "data_id": data_id}
        row = journal.append(connection, key, None, "population.bound", content)
        connection.execute(insert(bindings).values(journal_sequence=row.sequence, **content))


def id_of(digests: Mapping[str, str]) -> str:
    """The name of data with these digests, each with the client that holds what it stands for."""
    lines = "\n".join(f"{digest} {client}" for digest, client in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def ids_by_content(connection: Connection) -> Iterator[tuple[str, str]]:
    """The name of all data that there are, each with the name that their digests have now."""
    query = select(fingerprints).order_by(fingerprints.c.data_id, fingerprints.c.digest)
    of_one: dict[str, str] = {}
    current: str | None = None
    for row in connection.execute(query.execution_options(yield_per=1000)):
        if current is not None and row.data_id != current:
            yield current, id_of(of_one)
            of_one = {}
        current = row.data_id
        of_one[row.digest] = row.client
    if current is not None:
        yield current, id_of(of_one)


def uses_without(connection: Connection, population: str, unit: str, client: str | None = None) -> list[DataUse]:
    """The runs that have committed rounds on the data of a population, or on one client's, and answer for them to no
    budget of this unit. The oldest first.

    They are the population's runs, and those on data of which enough is bound to it: `MIN_ROWS` rows, or all rows or
    a column of a client.
    """
    rows = [row for row in connection.execute(select(data_uses.c.data_id, data_uses.c.units).distinct())]
    candidates = {row.data_id for row in rows if unit not in row.units}
    theirs = _shared_data(connection, candidates, population, client) if candidates else set()
    holding = candidates
    if client is not None:
        # What no single client owns is of them all; the columns of all clients together are of none.
        unowned = (fingerprints.c.client == "") & (func.substr(fingerprints.c.digest, 1, 1) != "a")
        of_client = (fingerprints.c.client == client) | unowned
        holding = set(connection.scalars(select(fingerprints.c.data_id).where(of_client).distinct()))
    committed = (
        select(func.count())
        .select_from(journal_table)
        .where(journal_table.c.run_id == data_uses.c.run_id, journal_table.c.kind == "round.committed")
        .scalar_subquery()
    )
    query = (
        select(data_uses, committed.label("rounds"), runs.c.state)
        .outerjoin(runs, runs.c.run_id == data_uses.c.run_id)
        .order_by(data_uses.c.journal_sequence)
    )
    uses: dict[str, DataUse] = {}
    for row in connection.execute(query):
        of_population = row.population == population and row.data_id in holding
        if unit not in row.units and row.rounds and (of_population or row.data_id in theirs):
            is_deleted = row.state == RunState.DELETED
            use = DataUse(row.run_id, row.name, row.population, row.units, row.at, row.rounds, is_deleted)
            uses.setdefault(row.run_id, use)
    return list(uses.values())


def _shared_data(connection: Connection, candidates: set[str], population: str, client: str | None) -> set[str]:
    """Those of these data of which enough is bound to the population, or to one of its clients."""
    bound = fingerprints.alias("bound")
    shared = (
        select(fingerprints.c.data_id, fingerprints.c.digest)
        .join(bound, bound.c.digest == fingerprints.c.digest)
        .join(bindings, bindings.c.data_id == bound.c.data_id)
        .where(bindings.c.population == population)
        .distinct()
    )
    if client is not None:
        shared = shared.where(bound.c.client == client)
    weights: Counter[str] = Counter()
    for page in accounts.in_pages(fingerprints.c.data_id, candidates):
        found = shared.where(page).subquery()
        kind = func.substr(found.c.digest, 1, 1)
        counts = select(found.c.data_id, kind.label("kind"), func.count()).group_by(found.c.data_id, kind)
        for data_id, letter, count in connection.execute(counts):
            weights[data_id] += count if letter == "r" else MIN_ROWS * count
    return {data_id for data_id, weight in weights.items() if weight >= MIN_ROWS}


def clients_known(connection: Connection, population: str) -> set[str]:
    """The ids of the clients whose data runs of a population have used, as far as each has fingerprints of its own."""
    query = (
        select(fingerprints.c.client)
        .join(data_uses, data_uses.c.data_id == fingerprints.c.data_id)
        .where(data_uses.c.population == population, fingerprints.c.client != "")
        .distinct()
    )
    return set(connection.scalars(query))


class Memberships:
    """Which data belong to which population (`Store.memberships`): what runs have used, known by keyed fingerprints."""

    def __init__(
        self, database: Database, keys: KeyRing, signing: Callable[[Connection], SigningKey], home: Path
    ) -> None:
        self._database = database
        self._keys = keys
        self._signing = signing
        self._home = home

    def fingerprint_key(self) -> bytes:
        """Return the key of fingerprints, 32 bytes, which all hubs of this database share; made when there is none yet.

        Raises `StoreError` when the database has one that this home lacks.
        """
        while (key := self.find_fingerprint_key()) is None:
            id = self._keys.create_fingerprint_key()  # durable before anything may be made with it
            with self._database.transaction() as connection:
                first = make_shared_key(connection, self._keys, self._signing(connection), id, self._home)
            if not first:
                self._keys.remove_fingerprint_key(id)
        return key

    def find_fingerprint_key(self) -> bytes | None:
        """Return the key of fingerprints, and None where there is none yet. Raises `StoreError` as above."""
        with self._database.snapshot() as connection:
            return shared_key(connection, self._keys)

    def check_keys(self) -> None:
        """Raise `StoreError` where this home may not write to its database.

        It lacks the key of fingerprints, or the journal was begun by a hub that it does not trust.
        """
        with self._database.snapshot() as connection:
            self._signing(connection)
            shared_key(connection, self._keys)

    def enter(
        self,
        *,
        run_id: str,
        name: str,
        population: str,
        units: Sequence[str],
        digests: Mapping[str, str],
        check: Callable[[Owners], None],
    ) -> None:
        """Record that a run uses data, given as keyed digests (digest -> client, "" for any), and bind them to its
        population where it has `units`: "client" or "example" where a budget answers for these.

        `check` gets the populations and clients that the digests are bound to, and raises where the run may not have
        them; nothing else is bound meanwhile. Raises `BudgetNotSet` when the population has no budget.
        """
        with self._database.transaction() as connection:
            enter(
                connection,
                self._signing(connection),
                run_id=run_id,
                name=name,
                population=population,
                units=units,
                digests=digests,
                check=check,
            )

    def owners(self, digests: Collection[str]) -> Owners:
        """Return the populations and clients that these digests are bound to."""
        with self._database.snapshot() as connection:
            return owners_of(connection, digests)

    def is_empty(self) -> bool:
        """Return whether no data are bound to any population."""
        with self._database.snapshot() as connection:
            return connection.execute(select(bindings.c.data_id).limit(1)).first() is None

    def uses_without(self, account: Account, unit: str) -> list[DataUse]:
        """Return the runs that have committed rounds on a population's data, or on one client's, and answer for them to
        no budget of this unit ("client" or "example"). The oldest first; deleted runs too."""
        client = None if account.is_template else account.client
        with self._database.snapshot() as connection:
            return uses_without(connection, account.population, unit, client)

    def clients(self, population: str) -> set[str]:
        """Return the ids of the clients whose data runs of a population have used, as far as they are recorded."""
        with self._database.snapshot() as connection:
            return clients_known(connection, population)
