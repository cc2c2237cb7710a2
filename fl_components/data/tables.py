"""Tables: a folder of your own CSV or Parquet files, one per client."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, model_validator

from fl_components import randomness
from fl_components.data.base import DataRule
from fl_components.data.federated import Array, ClientExamples, FederatedData
from fl_components.data.fingerprints import Fingerprints, of_table
from fl_components.data.table_file import TableFile, read_table, text
from fl_components.errors import DataError

_KINDS: Final = (".csv", ".parquet")


def _two_or_more(values: list[bool | int | float | str]) -> list[bool | int | float | str]:
    if len(values) < 2 or len({text(value) for value in values}) < len(values):
        raise ValueError("list two or more values, none of them twice")
    return values


def _above_zero(constants: tuple[float, float]) -> tuple[float, float]:
    if constants[1] <= 0:
        raise ValueError("give [centre, scale] with a scale above 0")
    return constants


Values = Annotated[list[bool | int | float | str], AfterValidator(_two_or_more)]
Constants = Annotated[tuple[float, float], AfterValidator(_above_zero)]


class Tables(DataRule):
    """A folder of CSV or Parquet files, one per client; a file's name without its ending is the client's id.

    All files have the same columns, in any order: the label, and inputs. An input is a number or, where `categories`
    says so, one of the values listed there, each of which becomes an indicator (0 or 1). Features are float32 [F], in
    the order of `columns`. CSV files are UTF-8, with a header, commas between columns and a point in decimal numbers.

    Args:
      folder: where the files are. Files with another ending than .csv or .parquet are left alone.
      label: the column that is to be predicted.
      columns: the columns that are inputs; further ones are left alone. By default all but the label.
      test_fraction: the part of each client's rows to test on, rounded down; which ones is drawn from the seed.
      classes: the values of the label, in the order of the classes. By default all that occur, sorted: with private
        data give them, so that the model's size does not tell which occur.
      scale: for a column [centre, scale]: its input is (value - centre) / scale. Public constants: they are published
        with the configuration, so they must not be statistics of private rows.
      categories: for a column that is not a number, its values.
      clients_file: a CSV file whose column `client` has each id once; its other columns become attributes of clients.
        A relative path is taken from `folder`.
      public: True only for data that anyone may download.
    """

    kind: Literal["tables"] = "tables"
    folder: str
    label: str
    columns: list[str] | None = None
    test_fraction: float = Field(default=0.2, ge=0.0, lt=1.0)
    classes: Values | None = None
    scale: dict[str, Constants] = Field(default_factory=dict)
    categories: dict[str, Values] = Field(default_factory=dict)
    clients_file: str | None = None
    public: bool = False

    @model_validator(mode="after")
    def _check_columns(self) -> Tables:
        columns = self.columns
        if columns is not None and (not columns or len(set(columns)) < len(columns) or self.label in columns):
            raise ValueError("columns must name one or more columns, none of them twice, and not the label")
        for field, named in (("scale", self.scale), ("categories", self.categories)):
            for column in named:
                if column == self.label or (columns is not None and column not in columns):
                    raise ValueError(f"{field} names {column}, which is not an input")
        both = sorted(self.scale.keys() & self.categories.keys())
        if both:
            raise ValueError(f"{both[0]} is in scale and in categories; a column is a number or a category")
        return self

    def known_num_clients(self) -> None:
        return None

    def load(self, seed: int) -> FederatedData:
        """Raises `DataError`, with file and row, for files that cannot be used or do not belong together."""
        folder = Path(self.folder).expanduser()
        about = None if self.clients_file is None else folder / Path(self.clients_file).expanduser()
        tables = {client_id: read_table(file) for client_id, file in _files(folder, about).items()}
        prints = Fingerprints.of_clients(
            {name: of_table({column: each.frame[column] for column in each.columns}) for name, each in tables.items()}
        )
        first = next(iter(tables.values()))
        inputs = [column for column in first.columns if column != self.label] if self.columns is None else self.columns
        if not inputs:
            raise DataError(f"{first.file} has no column besides the label", hint="add columns to predict it from")
        for table in tables.values():
            self._check_same_columns(table, inputs, first)
        classes = self._classes(list(tables.values()))
        y = {client_id: table.places(self.label, classes, "data.classes") for client_id, table in tables.items()}
        tested = {client_id: self._draw_test(seed, client_id, len(labels)) for client_id, labels in y.items()}
        trained = np.concatenate([y[client_id][~tested[client_id]] for client_id in tables])
        clients = {}
        for client_id, table in tables.items():
            test, labels, x = tested[client_id], y[client_id], self._features(table, inputs)
            unlearnt = np.flatnonzero(test & ~np.isin(labels, trained))
            if unlearnt.size:
                row = int(unlearnt[0])
                raise DataError(
                    f"{table.where(row)}: this is a test row, and no training row of any client has its label, "
                    f"{classes[labels[row]]!r}",
                    hint="bring more rows with this label, leave them out, or set data.test_fraction lower",
                )
            clients[client_id] = ClientExamples(x[~test], labels[~test], x[test], labels[test])
        return FederatedData.from_clients(
            clients,
            num_classes=len(classes),
            public=self.public,
            attributes=None if about is None else _attributes(about, list(tables)),
            as_read=lambda *_: prints,
        )

    def _check_same_columns(self, table: TableFile, inputs: list[str], first: TableFile) -> None:
        listed = ", ".join(repr(column) for column in table.columns[:20])
        for column in (self.label, *inputs, *self.scale, *self.categories):
            if column not in table.columns:
                raise DataError(
                    f"{table.file} has no column {column!r}; it has {listed}",
                    hint="separate the columns by commas"
                    if len(table.columns) == 1
                    else f"give all files the columns of {first.file}, or correct what data names",
                )
        further = [column for column in table.columns if column not in first.columns]
        if self.columns is None and further:
            raise DataError(
                f"{table.file} has the column {further[0]!r}, and {first.file} has not",
                hint="give all files the same columns, or list those to use as data.columns",
            )

    def _classes(self, tables: list[TableFile]) -> list[str]:
        """The labels' values as `text` has them: numbers in their order, then words in theirs."""
        if self.classes is not None:
            return [text(value) for value in self.classes]
        found = {value for table in tables for value in table.texts(self.label)}
        return sorted(found, key=lambda value: (0, float(value), "") if _is_number(value) else (1, 0.0, value))

    def _draw_test(self, seed: int, client_id: str, num_rows: int) -> NDArray[np.bool_]:
        """Which of a client's rows are there to test on, bool [rows]."""
        order = randomness.generator(seed, 0, "partition", client_id).permutation(num_rows)
        chosen = np.zeros(num_rows, np.bool_)
        chosen[order[: int(self.test_fraction * num_rows)]] = True
        return chosen

    def _features(self, table: TableFile, inputs: list[str]) -> NDArray[np.float32]:
        """The inputs of a table, float32 [rows, F]."""
        features = []
        for column in inputs:
            if column in self.categories:
                values = [text(value) for value in self.categories[column]]
                places = table.places(column, values, f"data.categories.{column}")
                features.append(places[:, None] == np.arange(len(values)))
            else:
                centre, scale = self.scale.get(column, (0.0, 1.0))
                features.append((table.numbers(column)[:, None] - centre) / scale)
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes Inf, which is refused by name
            return np.hstack(features).astype(np.float32)


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _files(folder: Path, about: Path | None) -> dict[str, Path]:
    """Each client's file, by client id; `about` is none."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder", hint="data.folder is where the clients' files are")
    files: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if (
            file.suffix.lower() not in _KINDS
            or not file.is_file()
            or (about is not None and file.resolve() == about.resolve())
        ):
            continue
        if file.stem in files:
            raise DataError(
                f"{files[file.stem]} and {file.name} would both be the client {file.stem!r}",
                hint="leave one of them out, or give it another name",
            )
        files[file.stem] = file
    if not files:
        raise DataError(f"{folder} has no .csv or .parquet files", hint="put one file per client there")
    return files


def _attributes(file: Path, client_ids: list[str]) -> Mapping[str, Array]:
    """What a file says about each client: column -> values [n], in the order of `client_ids`."""
    table = read_table(file)
    columns = [column for column in table.columns if column != "client"]
    if not columns or len(columns) == len(table.columns):
        raise DataError(
            f"{file} has no column {'besides client' if not columns else repr('client')}",
            hint="give it a column client with the clients' ids, and one or more columns of what is known of them",
        )
    row_of: dict[str, int] = {}
    for row, client_id in enumerate(str(cell).strip() for cell in table.frame["client"]):
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
