"""Tables: a folder of your own CSV or Parquet files, one per client."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from fedrounds.fl_components import randomness
from fedrounds.fl_components.data.base import ColumnSummary, TargetReader
from fedrounds.fl_components.data.cells import TRUTH, is_missing, is_number, text
from fedrounds.fl_components.data.client_files import ClientFiles, client_files
from fedrounds.fl_components.data.client_table import Dialect, Table
from fedrounds.fl_components.data.federated import Array, ClientExamples, FederatedData
from fedrounds.fl_components.data.files import expanded
from fedrounds.fl_components.data.fingerprints import Fingerprints
from fedrounds.fl_components.data.table_files import read_table
from fedrounds.fl_components.data.table_options import (
    Constants,
    DayZero,
    Missing,
    Name,
    Values,
    check_separator,
    known_rules,
    text_encoding,
    whole_dates,
)
from fedrounds.fl_components.errors import DataError
from fedrounds.fl_components.targets import TargetType

MAX_CLASSES: Final = 20
"""The most distinct values that a numeric label may have, unless `classes` lists them."""


REGRESSION_HINT: Final = "to predict a quantity, set task: {kind: regression}"


class _Client(NamedTuple):
    """One client's table with its inputs [rows, F], and which rows are kept and which are there to test on [rows]."""

    table: Table
    x: NDArray[np.float32]
    kept: NDArray[np.bool_]
    test: NDArray[np.bool_]


class Tables(TargetReader):
    """A folder of CSV or Parquet files, one per client; a file's name without its ending is the client's id.

    All files have the same columns, in any order: the label, and inputs. An input is a number, a date where `dates`
    says so or, where `categories` says so, one of the values listed there, each of which becomes an indicator (0 or 1).
    Features are float32 [F], in the order of `columns`. CSV files have a header. In place of a file there may be a
    folder of part files, which are read in the order of their names.

    Args:
      folder: where the files are. Hidden files, and those with another ending than .csv, .csv.gz or .parquet, are left
        alone.
      label: the column that is to be predicted: a class, or a number where the learning task is regression.
      columns: the columns that are inputs; further ones are left alone. By default all but the label.
      test_fraction: the part of each client's rows to test on, rounded down; which ones is drawn from the seed.
      classes: the values of the label, in the order of the classes. By default all that occur, sorted: with private
        data give them, so that the model's size does not tell which occur.
      scale: for a column [centre, scale]: its input is (value - centre) / scale. Public constants: they are published
        with the configuration, so they must not be statistics of private rows.
      categories: for a column that is not a number, its values.
      dates: for a column of dates, the date that its days are counted from: a public constant too.
      missing: what is done with missing values, for all columns or by column. "refuse" is an error; "drop_row" leaves
        the row out; "indicator" makes the input 0 (after scaling) and adds an input to each column concerned, which is
        1 where its value is missing. Which inputs there are depends on the configuration alone.
      separator: the character between the columns of CSV files.
      decimal: the mark before the decimals of numbers that are text.
      encoding: of CSV files. A byte order mark is removed.
      date_format: the form of dates that are text, in the notation of Python's `strptime`; by default YYYY-MM-DD,
        perhaps with a time.
      clients_file: a CSV file whose column `client` has each id once; its other columns become attributes of clients.
        A relative path is taken from `folder`.
      public: True only for data that anyone may download.
    """

    kind: Literal["tables"] = "tables"
    folder: str
    label: Name
    columns: list[Name] | None = None
    test_fraction: float = Field(default=0.2, ge=0.0, lt=1.0)
    classes: Values | None = None
    scale: dict[Name, Constants] = Field(default_factory=dict)
    categories: dict[Name, Values] = Field(default_factory=dict)
    dates: dict[Name, DayZero] = Field(default_factory=dict)
    missing: Annotated[Missing | dict[Name, Missing], BeforeValidator(known_rules)] = "refuse"
    separator: Annotated[str, AfterValidator(check_separator)] = ","
    decimal: Literal[".", ","] = "."
    encoding: Annotated[str, AfterValidator(text_encoding)] = "utf-8"
    date_format: Annotated[str | None, AfterValidator(whole_dates)] = None
    clients_file: str | None = None
    public: bool = False

    class_field: ClassVar[str] = "classes"

    @model_validator(mode="after")
    def _check_columns(self) -> Tables:
        columns = self.columns
        if columns is not None and (not columns or len(set(columns)) < len(columns) or self.label in columns):
            raise ValueError("columns must name one or more columns, none of them twice, and not the label")
        for field in ("scale", "categories", "dates"):
            for column in getattr(self, field):
                if column == self.label or (columns is not None and column not in columns):
                    raise ValueError(f"{field} names {column}, which is not an input")
        for one, other in (("scale", "categories"), ("dates", "categories")):
            both = sorted(getattr(self, one).keys() & getattr(self, other).keys())
            if both:
                raise ValueError(f"{both[0]} is in {one} and in {other}; a column is a number, a date or a category")
        for column, rule in self.missing.items() if isinstance(self.missing, dict) else ():
            if column == self.label and rule == "indicator":
                raise ValueError(f"missing.{column} is indicator, and {column} is the label: choose drop_row or refuse")
            if columns is not None and column not in (self.label, *columns):
                raise ValueError(f"missing names {column}, which is neither an input nor the label")
        return self

    @model_validator(mode="after")
    def _check_dialect(self) -> Tables:
        if self.separator == self.decimal:
            raise ValueError(
                f"separator and decimal are both {self.separator!r}: with decimal commas set separator, "
                'for instance to ";"'
            )
        if self.date_format is not None and not self.dates:
            raise ValueError("date_format is set, and dates names no column")
        return self

    def known_num_clients(self) -> None:
        return None

    def read(self) -> dict[str, Table]:
        """Return each client's rows as they are in its file, before anything is selected, scaled or split, by id.

        Raises `DataError`, with file and line, for files that cannot be read or do not belong together.
        """
        tables = {client_id: read_table(path, self._dialect) for client_id, path in self._files().paths.items()}
        first = next(iter(tables.values()))
        inputs = self._inputs(first)
        if not inputs:
            raise DataError(f"{first.path} has no column besides the label", hint="add columns to predict it from")
        for table in tables.values():
            self._check_same_columns(table, inputs, first)
        return tables

    def load(self, seed: int, targets: TargetType = TargetType.CLASS) -> FederatedData:
        """Read the files and return their examples.

        Raises `DataError`, with file and row, for files that cannot be used or do not belong together.
        """
        tables = self.read()
        prints = Fingerprints.of_tables({name: table.columns for name, table in tables.items()})
        inputs = self._inputs(next(iter(tables.values())))  # in the order of the first file's columns
        clients = {
            client_id: self._client(seed, client_id, table, inputs, targets) for client_id, table in tables.items()
        }
        classes = self._classes(list(clients.values())) if targets is TargetType.CLASS else []
        examples = {}
        for client_id, (table, x, kept, test) in clients.items():
            y: NDArray[Any]
            if targets is TargetType.CLASS:
                y = table.places(self.label, classes, "data.classes", among=kept)
            else:
                y = table.numbers(self.label).astype(np.float32)  # `numbers` refuses what float32 cannot hold
            train, test = kept & ~test, kept & test
            examples[client_id] = ClientExamples(x[train], y[train], x[test], y[test])
        if targets is TargetType.CLASS:
            self._check_trained(clients, examples, classes)
        return FederatedData.from_clients(
            examples,
            num_classes=len(classes),
            class_names=tuple(classes),
            public=self.public,
            attributes=None if self._about is None else _attributes(self._about, self._dialect, list(clients)),
            as_read=lambda *_: prints,
        )

    def _check_trained(
        self, clients: Mapping[str, _Client], examples: Mapping[str, ClientExamples], classes: list[str]
    ) -> None:
        """Raise `DataError` for a test row whose class no training row has."""
        trained = np.unique(np.concatenate([each.y_train for each in examples.values()]))
        for client_id, (table, _, kept, test) in clients.items():
            untrained = np.flatnonzero(~np.isin(examples[client_id].y_test, trained))
            if untrained.size:
                place = untrained[0]
                row, value = np.flatnonzero(kept & test)[place], classes[examples[client_id].y_test[place]]
                raise self._never_trained(table, int(row), value, classes)

    def left_alone(self) -> tuple[str, ...]:
        return self._files().left_alone

    def columns_read(self, targets: TargetType = TargetType.CLASS) -> list[ColumnSummary]:
        tables = self.read()
        summaries = []
        for column in (*self._inputs(next(iter(tables.values()))), self.label):
            kind = self._kind(column, targets)
            values = {client_id: self._values(table, column, targets) for client_id, table in tables.items()}
            missing = {client_id: np.isnan(each) for client_id, each in values.items()}
            present = np.concatenate([each[~missing[client_id]] for client_id, each in values.items()])
            bounds: tuple[float | str, float | str] | None = None
            counts: dict[str, int] | None = None
            if kind in ("number", "date", "target") and present.size:
                low, high = float(present.min()), float(present.max())
                bounds = (self._date(column, low), self._date(column, high)) if kind == "date" else (low, high)
            elif kind == "category":
                listed = [text(value) for value in self.categories[column]]
                found = np.bincount(present.astype(np.int64), minlength=len(listed))
                counts = dict(zip(listed, found.tolist(), strict=True))
            summaries.append(
                ColumnSummary(
                    name=column,
                    kind=kind,
                    range=bounds,
                    counts=counts,
                    missing=float(np.mean(np.concatenate(list(missing.values())))),
                    missing_by_client={client_id: float(each.mean()) for client_id, each in missing.items()},
                )
            )
        return summaries

    def hint_without_test_rows(self, data: FederatedData) -> str:
        sizes = data.train_rows.lengths
        smallest, largest = int(np.argmin(sizes)), int(np.argmax(sizes))
        least = max(int(sizes[smallest]), 2)
        return (
            f"data.test_fraction is {self.test_fraction:g}, which is less than one row of every client (the smallest, "
            f"{data.client_ids[smallest]!r}, has {sizes[smallest]}, the largest, {data.client_ids[largest]!r}, "
            f"{sizes[largest]}): set it to {np.ceil(100 / least) / 100:g} or more"
        )

    @property
    def _dialect(self) -> Dialect:
        return Dialect(self.separator, self.decimal, self.encoding, self.date_format)

    @property
    def _about(self) -> Path | None:
        return None if self.clients_file is None else self._folder / expanded(self.clients_file, "data.clients_file")

    @property
    def _folder(self) -> Path:
        return expanded(self.folder, "data.folder")

    def _files(self) -> ClientFiles:
        return client_files(self._folder, self._about)

    def _inputs(self, first: Table) -> list[str]:
        return [column for column in first.columns if column != self.label] if self.columns is None else self.columns

    def _check_same_columns(self, table: Table, inputs: list[str], first: Table) -> None:
        names = list(table.columns)
        named = [*self.missing] if isinstance(self.missing, dict) else []
        for column in (self.label, *inputs, *self.scale, *self.categories, *self.dates, *named):
            if column not in names:
                alike = [each for each in names if each.casefold() == column.casefold()]
                raise DataError(
                    f"{table.path} has no column {column!r}; it has {', '.join(map(repr, names[:20]))}",
                    hint=table.separator_hint
                    if table.separator_hint is not None
                    else f"write it as {alike[0]!r}"
                    if alike
                    else "correct what data names, or give the files this column"
                    if table is first
                    else f"give all files the columns of {first.path}, or correct what data names",
                )
        further = [column for column in names if column not in first.columns]
        if self.columns is None and further:
            raise DataError(
                f"{table.path} has the column {further[0]!r}, and {first.path} has not",
                hint="give all files the same columns, or list those to use as data.columns",
            )

    def _rule_for_missing(self, column: str) -> Missing:
        if isinstance(self.missing, dict):
            return self.missing.get(column, "refuse")
        return "refuse" if self.missing == "indicator" and column == self.label else self.missing

    def _client(self, seed: int, client_id: str, table: Table, inputs: Sequence[str], targets: TargetType) -> _Client:
        """Return a client's inputs, and which of its rows are kept: those that no missing value drops."""
        kept = np.ones(table.num_rows, np.bool_)
        self._settle(table, self.label, np.isnan(self._values(table, self.label, targets)), kept)
        features = []
        for column in inputs:
            features += self._features(table, column, kept)
        if not kept.any():
            raise DataError(
                f"{table.path}: each row has a missing value, and data.missing drops them all",
                hint="leave the column that is always missing out of data.columns, or set data.missing: indicator",
            )
        with np.errstate(over="ignore"):  # as in `_features`
            x = np.hstack(features).astype(np.float32)
        # Drawn from all rows, so that whether a row is complete does not decide what becomes of another one.
        return _Client(table, x, kept, self._draw_test(seed, client_id, table.num_rows))

    def _features(self, table: Table, column: str, kept: NDArray[np.bool_]) -> list[NDArray[Any]]:
        """Return the inputs that a column becomes, each [rows, ...], and clear what it drops in `kept`."""
        values = self._values(table, column)
        missing = np.isnan(values)
        self._settle(table, column, missing, kept)
        if column in self.categories:
            feature = values[:, None] == np.arange(len(self.categories[column]))
        else:
            centre, scale = self.scale.get(column, (0.0, 1.0))
            # What float32 cannot hold becomes Inf or NaN, which is refused by its place.
            with np.errstate(over="ignore", invalid="ignore"):
                feature = (np.where(missing, centre, values)[:, None] - centre) / scale
        return [feature, missing[:, None]] if self._rule_for_missing(column) == "indicator" else [feature]

    def _values(self, table: Table, column: str, targets: TargetType = TargetType.CLASS) -> NDArray[np.float64]:
        """Return a column as numbers, days or places among its values [rows], with NaN for missing values."""
        if column in self.dates:
            return table.days(column, self.dates[column])
        is_class = column == self.label and targets is TargetType.CLASS
        if column not in self.categories and not is_class:
            return table.numbers(column)
        listed = self.classes if column == self.label else self.categories[column]
        if listed is None:
            codes, words = table.values(column)
            places = np.where(np.array([is_missing(word) for word in words])[codes], -1, codes)
        else:
            field = "data.classes" if column == self.label else f"data.categories.{column}"
            places = table.places(column, [text(value) for value in listed], field)
        return np.where(places < 0, np.nan, places)

    def _kind(self, column: str, targets: TargetType) -> Literal["number", "date", "category", "label", "target"]:
        if column == self.label:
            return "label" if targets is TargetType.CLASS else "target"
        return "category" if column in self.categories else "date" if column in self.dates else "number"

    def _settle(self, table: Table, column: str, missing: NDArray[np.bool_], kept: NDArray[np.bool_]) -> None:
        """Raise `DataError` for a missing value that is refused; clear the rows that are dropped in `kept`."""
        rule = self._rule_for_missing(column)
        if rule == "refuse":
            table.check_complete(column, missing)
        if rule == "drop_row":
            kept &= ~missing

    def _classes(self, clients: Sequence[_Client]) -> list[str]:
        """Return the label's values as `text` has them: numbers in their order, then words in theirs.

        Raises `DataError` for a label that seems to be a quantity, or an identifier.
        """
        if self.classes is not None:
            return [text(value) for value in self.classes]
        values: set[str] = set()
        num_rows = 0
        for client in clients:
            codes, words = client.table.values(self.label)
            values |= {words[code] for code in np.unique(codes[client.kept])}
            num_rows += int(client.kept.sum())
        if values & {*TRUTH.values()}:  # true and false are 1 and 0
            values = {TRUTH.get(value, value) for value in values}
        classes = sorted(values, key=_order)
        if len(classes) > MAX_CLASSES and all(map(is_number, classes)):
            raise DataError(
                f"the label {self.label!r} has {len(classes):,} different values, all numbers from {classes[0]} to "
                f"{classes[-1]}: it seems to be a quantity, not a class",
                hint=f"{REGRESSION_HINT}; if its values are classes, list them as data.classes",
            )
        if len(classes) > max(MAX_CLASSES, num_rows // 2):
            raise DataError(
                f"the label {self.label!r} has {len(classes):,} different values in {num_rows:,} rows: it seems to be "
                "an identifier or free text, not a class",
                hint="name another column as data.label, or list its values as data.classes if they are classes",
            )
        return classes

    def _never_trained(self, table: Table, row: int, value: str, classes: list[str]) -> DataError:
        hint = "bring more rows with this label, leave them out, or set data.test_fraction lower"
        quantity = self.classes is None and len(classes) > 2 and all(map(is_number, classes))
        return DataError(
            f"{table.where(row)}: this is a test row, and no training row of any client has its label, {value!r}",
            hint=f"{hint}; {REGRESSION_HINT}" if quantity else hint,
        )

    def _draw_test(self, seed: int, client_id: str, num_rows: int) -> NDArray[np.bool_]:
        """Which of a client's rows are there to test on, bool [rows]."""
        order = randomness.generator(seed, 0, "partition", client_id).permutation(num_rows)
        chosen = np.zeros(num_rows, np.bool_)
        chosen[order[: int(self.test_fraction * num_rows)]] = True
        return chosen

    def _date(self, column: str, days: float) -> str:
        try:
            return text(dt.datetime.combine(self.dates[column], dt.time()) + dt.timedelta(days=days))
        except OverflowError:  # the last microseconds of the year 9999, rounded up
            return text(dt.datetime.max)


def _order(value: str) -> tuple[int, float, str]:
    """Where a class comes in the order of the classes."""
    try:
        return 0, float(value), value
    except ValueError:
        return 1, 0.0, value


def _attributes(file: Path, dialect: Dialect, client_ids: list[str]) -> Mapping[str, Array]:
    """What a file says about each client: column -> values [n], in the order of `client_ids`."""
    table = read_table(file, dialect)
    columns = [column for column in table.columns if column != "client"]
    if not columns or len(columns) == len(table.columns):
        raise DataError(
            f"{file} has no column {'besides client' if not columns else repr('client')}",
            hint="give it a column client with the clients' ids, and one or more columns of what is known of them",
        )
    row_of: dict[str, int] = {}
    for row, client_id in enumerate(table.as_written("client")):
        if client_id not in client_ids or client_id in row_of:
            wrong = "is there twice" if client_id in row_of else "has no file"
            raise DataError(
                f"{table.where(row)}: client {client_id!r} {wrong}",
                hint="give each file's name, without its ending, exactly once",
            )
        row_of[client_id] = row
    without = [client_id for client_id in client_ids if client_id not in row_of]
    if without:
        raise DataError(f"{file} says nothing about client {without[0]!r}", hint="add a row for every client")
    order = [row_of[client_id] for client_id in client_ids]
    return {column: np.array(table.texts(column))[order] for column in columns}
