"""Whose data a run would use: its fingerprints, keyed, beside those that are bound to populations."""

from __future__ import annotations

import hmac
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final, TypeVar

from fedrounds.fl_components.data.cell_hashes import Hashes
from fedrounds.fl_components.data.fingerprints import Fingerprint, Fingerprints
from fedrounds.fl_components.store import Owners

T = TypeVar("T")

MAX_DIGESTS: Final = 100_000
"""Digests of all clients' rows together, but for `MIN_ROWS` of each client."""

MIN_ROWS: Final = 4
"""Rows that must be the same before a client's data count as another's."""

SHARE_OF_A_POPULATION: Final = 0.25
"""The share of rows from which on they count as those of a population that they are bound to."""

SHARE_OF_A_CLIENT: Final = 0.5
"""The share of a client's rows from which on they count as those of another client of the same population."""

COINCIDENT: Final = {"named": 0.1, "all": 0.1}
COINCIDENT_WITHOUT_A_COLUMN: Final = 0.02
"""The share of rows that other rows equal, up to which a view identifies rows and is kept."""

MIN_ROWS_WITHOUT_A_COLUMN: Final = 100
"""The least number of rows for which views without one column are judged."""

MIN_DISTINCT: Final = 0.25
"""The least share of distinct rows among a client's for which `named` identifies rows: in a table of a few short
columns, rows are anybody's."""

MIN_IN_WHOLE: Final = {"named": 2, "all": 8}
"""The least number of distinct rows for which the multiset of a client's rows identifies it."""


@dataclass(frozen=True, slots=True)
class KeyedClient:
    """The digests of one client.

    Of its rows, by view and in the order of their hashes, and of all of them and their columns.
    """

    client: str
    rows: Mapping[str, Sequence[str]]
    others: Sequence[str]


@dataclass(frozen=True, slots=True)
class KeyedData:
    """The digests of a run's data.

    Args:
      clients: of each client.
      all_rows: of all rows together, by view.
      all_columns: of the columns of all rows together.
      recorded: digest -> client: those that tell these data from others' and are kept. A client is "" where several
        hold what the digest stands for, or where single clients are not recorded.
    """

    clients: Sequence[KeyedClient]
    all_rows: Mapping[str, Sequence[str]]
    all_columns: Sequence[str]
    recorded: Mapping[str, str]

    def digests(self) -> set[str]:
        """All of them."""
        found = {digest for rows in self.all_rows.values() for digest in rows} | set(self.all_columns)
        for client in self.clients:
            found.update(client.others)
            found.update(*client.rows.values())
        return found


@dataclass(frozen=True, slots=True)
class Match:
    """Data of a client of this run ("" for all clients together) that are bound to a population, and to one of its
    clients ("" where that is not known)."""

    client: str
    population: str
    owner: str


def keyed(prints: Fingerprints, key: bytes) -> KeyedData:
    """Return the digests of data by a key.

    Which rows represent a client is the same for all data that hold these rows, as far as there is room: at most
    `MAX_DIGESTS` for all clients, at least `MIN_ROWS` for each.
    """

    @cache  # views share rows
    def digest(kind: str, value: int) -> str:
        code = hmac.new(key, f"{kind} {value:016x}".encode(), "sha256").hexdigest()
        return kind[0] + code[:40]

    def rows(view: str, hashes: Hashes, most: int) -> list[str]:
        kind = "row named" if view == "named" else "row"
        return [digest(kind, value) for value in hashes[:most].tolist()]

    views = _order(prints.all_rows.views)
    telling = [view for view in views if _tells_apart(view, prints)]
    clients: list[KeyedClient] = []
    recorded: dict[str, str] = {}
    if prints.clients:
        num_views = max(1, min(len(views), MAX_DIGESTS // (2 * MIN_ROWS * len(prints.clients))))
        most = max(MIN_ROWS, MAX_DIGESTS // (num_views * len(prints.clients)))
        checked, kept = set(views[:num_views]), set(telling[:num_views])
        for name, each in prints.clients.items():
            mine = {view: rows(view, sketch.hashes, most) for view, sketch in each.views.items()}
            others = [
                *(
                    digest(f"whole {view}", value)
                    for view, value in each.whole.items()
                    if each.views[view].distinct >= MIN_IN_WHOLE[view]
                ),
                *(digest("column", value) for value in each.columns),
            ]
            clients.append(KeyedClient(name, {view: mine[view] for view in mine if view in checked | kept}, others))
            for code in {*others, *(code for view in kept & mine.keys() for code in mine[view])}:
                recorded[code] = "" if code in recorded else name
        shared = {code for code, name in recorded.items() if not name}
        recorded = {code: name for code, name in recorded.items() if code not in shared or code[0] == "r"}
    most_of_all = max(256, MAX_DIGESTS // max(1, len(views)))
    all_rows = {view: rows(view, prints.all_rows.views[view].hashes, most_of_all) for view in views}
    for view in telling:
        for code in all_rows[view][: MAX_DIGESTS // max(1, len(telling))]:
            recorded.setdefault(code, "")
    all_columns = [digest("all of a column", value) for value in prints.all_rows.columns]
    recorded |= dict.fromkeys(all_columns, "")
    return KeyedData(clients, all_rows, all_columns, recorded)


def matches(data: KeyedData, owners: Owners) -> set[Match]:
    """Whose the data are, by what is bound.

    A client's data are another's where the multiset of their rows or the values of a column are the same, or enough of
    their rows: at least `MIN_ROWS`, and of the rows with the smallest hashes up to any one of them
    `SHARE_OF_A_POPULATION`, or `SHARE_OF_A_CLIENT` to count as those of one client. (The smallest hashes of a part are
    among the smallest of the whole, so a part is recognised however small it is.)
    """
    found: set[Match] = set()
    for mine in data.clients:
        for code in mine.others:
            found |= {Match(mine.client, population, owner) for population, owner in owners.get(code, ()) if owner}
        for codes in mine.rows.values():
            found |= {
                Match(mine.client, population, "")
                for population in _enough(codes, owners, SHARE_OF_A_POPULATION, lambda each: each[0])
            }
            found |= {
                Match(mine.client, *each)
                for each in _enough(codes, owners, SHARE_OF_A_CLIENT, lambda each: each)
                if each[1]
            }
    for code in data.all_columns:
        found |= {Match("", population, "") for population, _ in owners.get(code, ())}
    for codes in data.all_rows.values():
        found |= {
            Match("", population, "")
            for population in _enough(codes, owners, SHARE_OF_A_POPULATION, lambda each: each[0])
        }
    return found


def _enough(codes: Sequence[str], owners: Owners, share: float, whose: Callable[[tuple[str, str]], T]) -> Iterator[T]:
    """Those who own at least `MIN_ROWS` of the first digests, and this share of them."""
    counts: Counter[T] = Counter()
    found: set[T] = set()
    for seen, code in enumerate(codes, 1):
        for owner in {whose(each) for each in owners.get(code, ())}:
            counts[owner] += 1
            if counts[owner] >= MIN_ROWS and counts[owner] >= share * seen and owner not in found:
                found.add(owner)
                yield owner


def _order(views: Iterable[str]) -> list[str]:
    """The views, those first that tell most."""
    first = ("all", "named", "varying", "without label", "scaled")
    known = set(views)
    return [view for view in first if view in known] + sorted(known - set(first))


def _tells_apart(view: str, prints: Fingerprints) -> bool:
    """Whether rows in this view are seldom the same by coincidence, so that those of strangers are not either."""
    parts: list[Fingerprint] = [each for each in (*prints.clients.values(), *[prints.all_rows] * (not prints.clients))]
    parts = [each for each in parts if view in each.views and each.num_rows]
    if not parts:
        return False
    reference = "named" if "named" in parts[0].views else "all"
    rows = sum(each.views[reference].distinct for each in parts)
    limit = COINCIDENT.get(view, COINCIDENT_WITHOUT_A_COLUMN)
    if view not in COINCIDENT and rows < MIN_ROWS_WITHOUT_A_COLUMN:
        return False
    if view == reference and rows < MIN_DISTINCT * sum(each.num_rows for each in parts):
        return False
    if sum(each.views[view].distinct for each in parts) < (1 - limit) * rows:
        return False
    codes = [code for each in parts for code in each.views[view].hashes.tolist()]
    return len(set(codes)) >= (1 - limit) * len(codes)
