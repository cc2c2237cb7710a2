"""Fingerprints: hashes that identify a client's rows, whatever a configuration selects and however a file is written.

They are taken from the rows as read: before columns are selected, numbers scaled and rows split into training and test
rows. The order of rows and of columns does not count, nor the columns' names, the file format and the spelling of a
number. docs/decisions/0013-fingerprints-of-data.md gives the reasons.

A *cell* is hashed to 64 bits, and a *row* is the sum of its cells' hashes, so that a row without one of its columns is
a subtraction. Each way of looking at rows is a *view*:

- `named`: all columns, with their names;
- `all`: all columns, without their names;
- `varying`: the same without constants and calendars (below), which exports like to add;
- `without X`: without one column (of tables with more than 64, without the columns of one of 64 groups by name), for a
  column that was added, removed, renamed or rescaled;
- `without label`: the features alone;
- `scaled`: the features of a row after an affine map of that row to [0, 1], for images that were normalised.

Of each view the smallest distinct hashes are kept (bottom-k sketches; Cohen and Kaplan 2007, "Summarizing data using
bottom-k sketches"): the sketches of a set and of its subset agree on their smallest hashes. Beside the rows there is a
hash of the multiset of all rows, and one of each column's multiset of values after an affine normalisation, which does
not change when the column is rescaled: for each client and for all of them together.

A calendar is anybody's: numbers or dates that lie evenly and occur about as often as each other (row numbers, months,
days). Such a column identifies nothing by itself, nor do rows that differ in nothing else.

These hashes have no key: whoever keeps them must key them first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from fedrounds.fl_components.data.cell_hashes import (
    CELLS_IN_CACHE,
    Hashes,
    cell_hashes,
    cell_numbers,
    count_values,
    hash_of_text,
    mix_hashes,
    multiset_hash,
    name_hashes,
    normalised_text,
    number_hashes,
)

if TYPE_CHECKING:
    from fedrounds.fl_components.data.federated import FederatedData

AsRead = Callable[[NDArray[Any]], NDArray[Any]]


MAX_ROWS: Final = 64
"""Hashes that are kept of one client's rows, in each view."""


MAX_ROWS_OF_ALL: Final = 4096
"""The same of all clients' rows together."""


MAX_COLUMNS: Final = 64
"""Columns of a row up to which each one is left out in a view of its own, and hashed for itself."""


MIN_FEATURES_SCALED: Final = 8
"""Features of a row from which on they are hashed after a normalisation of the row."""


MIN_ROWS_OF_A_COLUMN: Final = 16


MIN_VALUES_OF_A_COLUMN: Final = 8
"""Rows, and distinct values among them, from which on a column's values are no coincidence."""


MAX_REGULAR: Final = 0.5
"""The variance of a calendar's counts, at most, in parts of their mean."""


MAX_REGULAR_GAPS: Final = 0.1
"""The deviation of a calendar's gaps, at most, in parts of their mean: months have 28 to 31 days."""


MAX_STEPS: Final = 8


KINDS_OF_STEPS: Final = 4
"""The longest gap of a calendar of working days, in days, and how many lengths of gaps it has."""


MAX_CLIENTS: Final = 10_000
"""Clients up to which each one has fingerprints of its own."""


_CHUNK_CELLS: Final = 1 << 21


_GRID: Final = 997.0  # cells of a column's range: no fraction with a small denominator falls on a boundary


_OFFSET: Final = 0.3819660113


_GRIDS: Final = (_GRID, 499.0, 251.0, 127.0, 61.0, 31.0, 17.0)


_MOST_BOUNDARIES: Final = 5e5
"""The bound of the number of cells times the summed distances of values from the nearer end of the range."""


@dataclass(frozen=True, slots=True)
class Sketch:
    """The smallest distinct hashes of some rows in one view, sorted, and how many distinct ones there are in all.

    Those that differ by a calendar alone count as one.
    """

    hashes: Hashes
    distinct: int

    @classmethod
    def of(cls, hashes: Hashes, most: int) -> Sketch:
        """
        >>> Sketch.of(np.array([5, 2, 5, 9], np.uint64), 2)
        Sketch(hashes=array([2, 5], dtype=uint64), distinct=3)
        """
        distinct, _ = count_values(hashes)
        return cls(distinct[:most].copy(), len(distinct))


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What is known of some rows: their number, a sketch for each view, and hashes of all rows and of columns.

    Args:
      num_rows: how many there are.
      views: view -> sketch.
      whole: view -> the hash of the multiset of rows, for `named` and `all`. Rows that all occur k times count once.
      columns: a hash for each column whose values are no coincidence.
    """

    num_rows: int
    views: Mapping[str, Sketch]
    whole: Mapping[str, int] = field(default_factory=dict)
    columns: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Fingerprints:
    """The fingerprints of a federation's rows as read, training and test rows alike.

    Args:
      clients: of each client, by its id; empty above `MAX_CLIENTS` clients.
      all_rows: of all rows together, those that no client owns included.
      num_clients: how many clients there are.
    """

    clients: Mapping[str, Fingerprint]
    all_rows: Fingerprint
    num_clients: int

    @classmethod
    def of_clients(cls, clients: Mapping[str, Fingerprint]) -> Fingerprints:
        """Join those of single clients."""
        return cls(clients, joined(clients.values()), len(clients))

    @classmethod
    def of_tables(cls, tables: Mapping[str, Mapping[str, Any]]) -> Fingerprints:
        """Return the fingerprints of clients' tables as read, which hold the cells of each column by its name.

        A column is a pandas Series, an Arrow array or a list, or a list of Arrow arrays, one for each part of the
        table. Cells are numbers, text, dates, or missing.

        >>> import pandas as pd
        >>> csv = {"age": pd.Series(["63", "1e1"]), "sex": pd.Series(["m", "f"])}
        >>> parquet = {"sex": pd.Series(["m", "f"]), "age": pd.Series([63.0, 10.0])}
        >>> prints = Fingerprints.of_tables({"csv": csv, "parquet": parquet})
        >>> prints.clients["csv"].whole == prints.clients["parquet"].whole
        True
        """
        read = {client: _Table.of(columns) for client, columns in tables.items()}
        clients = {client: table.fingerprint() for client, table in read.items()}
        names = set[str]().union(*(table.values for table in read.values()))
        together = [[table.values[name] for table in read.values() if name in table.values] for name in sorted(names)]
        hashes = [column_hash(np.concatenate(parts)) for parts in together if len({each.dtype for each in parts}) == 1]
        return cls(clients, joined(clients.values(), hashes), len(clients))


def joined(parts: Iterable[Fingerprint], columns: Iterable[int | None] = ()) -> Fingerprint:
    """Return the fingerprint of several clients' rows together, as far as their sketches tell it, with the hashes of
    the columns of all rows."""
    by_view: dict[str, list[Sketch]] = {}
    num_rows = 0
    for part in parts:
        num_rows += part.num_rows
        for view, sketch in part.views.items():
            by_view.setdefault(view, []).append(sketch)
    return Fingerprint(
        num_rows,
        {
            view: Sketch(Sketch.of(np.concatenate([each.hashes for each in sketches]), MAX_ROWS_OF_ALL).hashes, total)
            for view, sketches in by_view.items()
            for total in [sum(each.distinct for each in sketches)]
        },
        columns=_telling(columns),
    )


@dataclass(frozen=True, slots=True)
class _Table:
    """A table as read: by column, the hashes of its cells [M], and its numbers [M] or else the hashes again."""

    cells: Mapping[str, Hashes]
    values: Mapping[str, NDArray[Any]]

    @classmethod
    def of(cls, columns: Mapping[str, Any]) -> _Table:
        read = {name: cell_hashes(column) for name, column in columns.items()}
        return cls(
            {name: cells for name, (cells, _) in read.items()},
            {name: cells if numbers is None else numbers for name, (cells, numbers) in read.items()},
        )

    def fingerprint(self) -> Fingerprint:
        num_rows = len(next(iter(self.cells.values()), ()))
        named, total, calendar, constant = (np.zeros(num_rows, np.uint64) for _ in range(4))
        calendars = {name for name, values in self.values.items() if is_calendar(values)}
        groups: dict[str, Hashes] = {}
        for name, cells in self.cells.items():
            of_name = np.uint64(hash_of_text(normalised_text(name)))
            named += name_hashes(cells, of_name)
            total += cells
            if name in calendars:
                calendar += cells
            elif num_rows and (cells == cells[0]).all():
                constant += cells
            group = name if len(self.cells) <= MAX_COLUMNS else f"group {int(of_name) % MAX_COLUMNS}"
            groups[group] = groups.get(group, np.uint64(0)) + cells
        views = {"named": named, "all": total, "varying": total - calendar - constant}
        views |= {f"without {group}": total - cells for group, cells in groups.items()}
        of_columns = fingerprint(views, map(column_hash, self.values.values()))
        if not calendars:
            return of_columns
        sketches = dict(of_columns.views)
        for group, cells in groups.items():  # rows that differ by a calendar alone count once
            rest = total - calendar - cells * np.uint64(group not in calendars)
            view = f"without {group}"
            sketches[view] = replace(sketches[view], distinct=min(sketches[view].distinct, len(count_values(rest)[0])))
        return replace(of_columns, views=sketches)


def fingerprint(
    views: Mapping[str, Hashes], columns: Iterable[int | None] = (), *, most: int = MAX_ROWS
) -> Fingerprint:
    """Return the fingerprint of rows whose hashes [M] are known in each view."""
    num_rows = len(next(iter(views.values())))
    return Fingerprint(
        num_rows,
        {view: Sketch.of(hashes, most) for view, hashes in views.items()},
        {view: multiset_hash(hashes) for view, hashes in views.items() if view in ("named", "all")},
        _telling(columns),
    )


def _telling(columns: Iterable[int | None]) -> tuple[int, ...]:
    """The hashes that there are, at most `MAX_COLUMNS`."""
    return tuple(sorted({each for each in columns if each is not None}))[:MAX_COLUMNS]


def of_texts(texts: Iterable[str]) -> Fingerprint:
    """Return the fingerprint of rows that are text and nothing else."""
    return fingerprint({"all": np.array([hash_of_text(text) for text in texts], np.uint64)})


def of_data(data: FederatedData, every_client: bool) -> Fingerprints:
    """Return the fingerprints of examples as they are in memory: those of data that no step has changed since they were
    read. Features and label are the columns of a row, and a number counts as the float32 that it is trained as."""
    return of_arrays(data, every_client)


def of_arrays(
    data: FederatedData,
    every_client: bool,
    features_as_read: AsRead = lambda x: x,
    labels_as_read: AsRead = lambda y: y,
) -> Fingerprints:
    """The same where features and labels [rows, ...] were others before a step that can be undone."""
    num_features = int(np.prod(data.x_train.shape[1:]))
    train, test = (
        _views(x.reshape(len(x), num_features), y.reshape(len(y), -1), features_as_read, labels_as_read)
        for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test))
    )
    each = {view: np.concatenate([train[view], test[view]]) for view in train}

    def columns(mine: slice, tested: slice) -> list[int | None]:
        if num_features > MAX_COLUMNS:
            return []
        x = features_as_read(np.concatenate([data.x_train[mine], data.x_test[tested]])).reshape(-1, num_features)
        return [column_hash(cell_numbers(column)) for column in x.T]

    of_all = fingerprint(each, columns(slice(None), slice(None)), most=MAX_ROWS_OF_ALL)
    if data.num_clients > MAX_CLIENTS and not every_client:
        return Fingerprints({}, of_all, data.num_clients)
    clients = {}
    for client in range(data.num_clients):
        mine, tested = (
            slice(int(rows.starts[client]), int(rows.stops[client])) for rows in (data.train_rows, data.test_rows)
        )
        clients[data.client_ids[client]] = fingerprint(
            {view: np.concatenate([train[view][mine], test[view][tested]]) for view in train}, columns(mine, tested)
        )
    return Fingerprints(clients, of_all, data.num_clients)


def column_hash(values: NDArray[Any]) -> int | None:
    """Return a hash of a column's multiset of values; None where it may be that of any client.

    Numbers (float64, NaN where one is missing) are brought to [0, 1] first, in either direction, so that a column that
    was rescaled or turned round has the same hash, unless rounding moves a value into another cell of the grid. For a
    float32 that happens once in some 33,000 values with 997 cells, so a column with more distinct values has a coarser
    grid. Repeated values do not change the grid, and the crowded end of a long-tailed column hardly does.
    Hashes of text (uint64) are taken as they are. Values that all occur k times count once.

    >>> column = np.array([*range(15), 40, 41, 47.0])
    >>> column_hash(column) == column_hash((131 - column) / 20), column_hash(column[:15])
    (True, None)
    """
    known = _known_values(values)
    if len(known) < MIN_ROWS_OF_A_COLUMN or is_calendar(values):
        return None
    distinct, _ = count_values(known)
    if len(distinct) < MIN_VALUES_OF_A_COLUMN:
        return None
    if values.dtype == np.uint64:
        return multiset_hash(known)
    place = (known - distinct[0]) / (distinct[-1] - distinct[0])
    distances = (distinct - distinct[0]) / (distinct[-1] - distinct[0])
    exposure = float(np.minimum(distances, 1 - distances).sum())
    cells = next((cells for cells in _GRIDS if cells * exposure <= _MOST_BOUNDARIES), _GRIDS[-1])
    return min(multiset_hash(np.floor(each * cells + _OFFSET).astype(np.uint64)) for each in (place, 1 - place))


def is_calendar(values: NDArray[Any]) -> bool:
    """Return whether values may be a row number, dates of a calendar, or months, days or hours of one.

    They lie evenly, or in steps of a few lengths, and each occurs about as often as the others.

    Draws of independent people vary more: the variance of their counts is about the mean (a Poisson distribution's).

    >>> months = np.repeat(np.arange(1.0, 13), [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31])
    >>> ages = np.random.default_rng(0).integers(40, 60, 365).astype(float)
    >>> is_calendar(months), is_calendar(ages)
    (True, False)
    """
    distinct, counts = count_values(_known_values(values))
    if len(distinct) < 3:
        return False
    is_regular = float(counts.var()) <= MAX_REGULAR * float(counts.mean())
    if values.dtype == np.uint64:  # text: names that all differ tell people apart
        return is_regular and len(distinct) < len(values) / 2
    gaps = np.diff(distinct)
    if is_regular and gaps.std() <= MAX_REGULAR_GAPS * gaps.mean():
        return True
    steps = gaps / gaps.min()
    is_in_steps = bool(np.abs(steps - np.round(steps)).max() < 1e-3) and steps.max() <= MAX_STEPS
    return is_in_steps and len(np.unique(np.round(steps))) <= KINDS_OF_STEPS and int(np.ptp(counts)) == 0


def _known_values(values: NDArray[Any]) -> NDArray[Any]:
    return values if values.dtype == np.uint64 else values[np.isfinite(values)]


def _views(x: NDArray[Any], y: NDArray[Any], features_as_read: AsRead, labels_as_read: AsRead) -> dict[str, Hashes]:
    """The hashes [M] of rows with features [M, F] and labels [M, ...], by view."""
    num_rows, num_features = x.shape
    each = num_features <= MAX_COLUMNS
    views = {
        name: np.empty(num_rows, np.uint64)
        for name in ("named", "all", "without label", *(f"without {column}" for column in range(num_features * each)))
    }
    is_scaled = num_features >= MIN_FEATURES_SCALED and x.dtype.kind == "f"
    if is_scaled:
        views["scaled"] = np.empty(num_rows, np.uint64)
    places = mix_hashes(np.arange(1, num_features + 1, dtype=np.uint64))
    of_label = np.uint64(hash_of_text("label"))
    step = max(1, _CHUNK_CELLS // num_features)
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        as_read = features_as_read(x[rows])
        cells, labels = number_hashes(as_read), number_hashes(labels_as_read(y[rows]))
        features, label = cells.sum(axis=1, dtype=np.uint64), labels.sum(axis=1, dtype=np.uint64)
        views["named"][rows] = name_hashes(cells, places).sum(axis=1, dtype=np.uint64) + name_hashes(label, of_label)
        views["all"][rows] = features + label
        views["without label"][rows] = features
        if is_scaled:
            views["scaled"][rows] = of_rows_scaled(as_read)
        for column in range(num_features * each):
            views[f"without {column}"][rows] = features + label - cells[:, column]
    return views


def of_rows_scaled(x: NDArray[Any]) -> Hashes:
    """The hashes [M] of rows [M, F] after an affine map of each to [0, 1], in whichever direction is the smaller: the
    same after value -> a * value + b, but for values that fall on a boundary of the grid by rounding. What is lowest
    adds nothing."""
    hash_of = mix_hashes(np.arange(int(_GRID) + 2, dtype=np.uint64))
    hash_of[0] = 0
    hashes = np.empty(len(x), np.uint64)
    step = max(1, CELLS_IN_CACHE // x.shape[1])
    for start in range(0, len(x), step):
        with np.errstate(over="ignore", invalid="ignore"):
            some = np.nan_to_num(x[start : start + step].astype(np.float32), posinf=0, neginf=0).clip(-1e38, 1e38)
        some -= some.min(axis=1, keepdims=True)
        span = some.max(axis=1, keepdims=True)
        some /= np.where(span > 0, span, np.float32(np.inf))
        some *= np.float32(_GRID)
        upwards, downwards = (
            hash_of[(each + np.float32(_OFFSET)).astype(np.int32)].sum(axis=1, dtype=np.uint64)
            for each in (some, np.float32(_GRID) - some)
        )
        np.minimum(upwards, downwards, out=hashes[start : start + step])
    return hashes
