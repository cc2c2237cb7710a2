"""Table: one client's rows as its files hold them, column by column, with the file and the line of each row."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedrounds.fl_components.data.arrow import Unusable, as_python
from fedrounds.fl_components.data.cells import (
    GROUPED_NUMBER,
    TRUTH,
    as_date,
    composed,
    displayed_cell,
    distinct_cells,
    is_missing,
    parse_days,
    parse_numbers,
    text,
)
from fedrounds.fl_components.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a text file is written.

    Args:
      separator: the character between columns.
      decimal: the mark before the decimals of a number, a point or a comma.
      encoding: a text encoding that Python knows.
      date_format: the form of dates in the notation of `strptime`; None is ISO 8601.
    """

    separator: str = ","
    decimal: str = "."
    encoding: str = "utf-8"
    date_format: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class TablePart:
    """One file of a table: how many rows it has and, of CSV, the line that each one begins on [rows]."""

    file: Path
    num_rows: int
    lines: NDArray[np.int64] | None


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """The rows of a CSV or Parquet file, or of a folder of part files, before anything is selected or scaled.

    `columns` holds the cells of each column by name, in the order of the file: an Arrow array for each part file. Cells
    of CSV are text; those of Parquet have their type. A cell is read in the same way whichever of the two holds it.
    `separator_hint` says what to set where the header of a CSV file seems to have another separator.
    """

    path: Path
    columns: Mapping[str, Sequence[pa.Array]]
    parts: Sequence[TablePart]
    dialect: Dialect
    separator_hint: str | None = None

    @property
    def num_rows(self) -> int:
        return sum(part.num_rows for part in self.parts)

    def where(self, row: int) -> str:
        """Return the file and the line of a row, or in Parquet the file and the row's number."""
        for part in self.parts:
            if row < part.num_rows:
                break
            row -= part.num_rows
        return f"{part.file}, row {row} (from 0)" if part.lines is None else f"{part.file}, line {part.lines[row]}"

    def values(self, column: str) -> tuple[NDArray[np.int64], list[str]]:
        """Return the distinct values of a column, as `text` has them, and the place of each cell among them [rows].

        A null is the empty text. Raises `DataError` for a cell that cannot be text.
        """
        places: dict[str, int] = {}
        codes, start = [], 0
        for cells in self.columns[column]:
            code_of_cell, distinct = distinct_cells(cells)
            for code, value in enumerate(distinct):
                if isinstance(value, Unusable):
                    raise self._not_usable(start + int(np.argmax(code_of_cell == code)), column, value)
            start += len(cells)
            words = [text(value, self.dialect.decimal) for value in distinct]
            place_of_code = np.array([places.setdefault(each, len(places)) for each in words], np.int64)
            codes.append(place_of_code[code_of_cell] if words else np.zeros(0, np.int64))
        return np.concatenate(codes), list(places)

    def texts(self, column: str) -> list[str]:
        """Return each cell of a column as `text` has it. Raises `DataError` for a missing value."""
        codes, words = self.values(column)
        self.check_complete(column, np.isin(codes, [i for i, each in enumerate(words) if is_missing(each)]))
        return [words[code] for code in codes]

    def as_written(self, column: str) -> list[str]:
        """Return each cell of a column as it is written: "1" and "01" differ.

        Raises `DataError` for a cell that cannot be text.
        """
        self.values(column)
        return [composed(str(cell)) for cells in self.columns[column] for cell in as_python(cells)]

    def numbers(self, column: str) -> NDArray[np.float64]:
        """Return a column of numbers, float64 [rows], with NaN for missing values.

        True and false are 1 and 0. Raises `DataError` for a cell that is no number, or too large for float32.
        """
        return self._converted(column, lambda cells: parse_numbers(cells, self.dialect.decimal), self._not_a_number)

    def days(self, column: str, since: dt.date) -> NDArray[np.float64]:
        """Return a column of dates as days since `since`, float64 [rows], with NaN for missing values.

        A time of day is a part of a day; time zones are ignored. Raises `DataError` for a cell that is no date.
        """
        return self._converted(
            column, lambda cells: parse_days(cells, since, self.dialect.date_format), self._not_a_date
        )

    def places(
        self, column: str, known: Sequence[str], field: str, among: NDArray[np.bool_] | None = None
    ) -> NDArray[np.int64]:
        """Return the place of each cell of a column in `known`, int64 [rows], with -1 for missing values.

        True and false are 1 and 0, whichever of them `known` has.

        Raises `DataError` for a cell that is not in `known`, which the configuration gives as `field`; where `among`
        [rows] is given, only for a cell of these rows.
        """
        codes, words = self.values(column)
        place_of = {value: place for place, value in enumerate(known)}
        for word, number in TRUTH.items():  # one value in two spellings
            for spelling, other in ((word, number), (number, word)):
                if spelling not in place_of and other in known:
                    place_of[spelling] = place_of[other]
        place_of_code = np.array([place_of.get(each, -1 if is_missing(each) else -2) for each in words], np.int64)
        places = place_of_code[codes]
        unknown = np.flatnonzero((places == -2) if among is None else (places == -2) & among)
        if unknown.size:
            row = int(unknown[0])
            raise self._not_listed(row, column, words[codes[row]], known, field)
        return places

    def check_complete(self, column: str, missing: NDArray[np.bool_]) -> None:
        """Raise `DataError` when a cell of a column is missing [rows]."""
        rows = np.flatnonzero(missing)
        if rows.size:
            more = f" (and {rows.size - 1:,} more of its {self.num_rows:,} values)" if rows.size > 1 else ""
            raise DataError(
                f"{self.where(int(rows[0]))}: the value of the column {column!r} is missing{more}",
                hint="fill it in, leave the row out, or set data.missing: drop_row or indicator",
            )

    def _converted(
        self,
        column: str,
        convert: Callable[[pa.Array], tuple[NDArray[np.float64], NDArray[np.bool_]]],
        error: Callable[[int, str, str], DataError],
    ) -> NDArray[np.float64]:
        converted, start = [], 0
        for cells in self.columns[column]:
            numbers, wrong = convert(cells)
            if wrong.any():
                row = int(np.argmax(wrong))
                cell = as_python(cells.slice(row, 1))[0]
                if isinstance(cell, Unusable):
                    raise self._not_usable(start + row, column, cell)
                raise error(start + row, column, displayed_cell(cell))
            converted.append(numbers)
            start += len(cells)
        return np.concatenate(converted)

    def _not_usable(self, row: int, column: str, cell: Unusable) -> DataError:
        return DataError(f"{self.where(row)}: the value in the column {column!r} {cell.problem}", hint=cell.hint)

    def _not_a_number(self, row: int, column: str, cell: str) -> DataError:
        if GROUPED_NUMBER.fullmatch(cell):
            hint = f"write numbers without thousands separators, with {self.dialect.decimal!r} before the decimals"
            one_comma = re.fullmatch(r"[+-]?[0-9]+,[0-9]+", cell) and self.dialect.decimal == "."
            if one_comma and self.dialect.separator != ",":
                hint += ', or set data.decimal: "," for decimal commas'
        elif self.dialect.decimal == "." and re.fullmatch(r"[+-]?[0-9]*,[0-9]+", cell):
            hint = "write a decimal point" + (
                "" if self.dialect.separator == "," else ', or set data.decimal: "," for decimal commas'
            )
        elif self.dialect.decimal == "," and re.fullmatch(r"[+-]?[0-9]*\.[0-9]+", cell):
            hint = 'write a decimal comma, or set data.decimal: "." for decimal points'
        elif as_date(cell, self.dialect.date_format) is not None:
            hint = f"list the column in data.dates, with a date to count the days from ({column}: 2020-01-01)"
        else:
            hint = "correct it, list the column's values in data.categories, or leave it out of data.columns"
        return DataError(
            f"{self.where(row)}: {cell[:40]!r} in the column {column!r} is not a number that can be trained on",
            hint=hint,
        )

    def _not_a_date(self, row: int, column: str, cell: str) -> DataError:
        form = self.dialect.date_format
        known = "YYYY-MM-DD" if form is None else form
        if form is None and re.fullmatch(r"[0-9]{1,2}\.[0-9]{1,2}\.[0-9]{4}", cell):
            hint = 'set data.date_format: "%d.%m.%Y"'
        elif form is None and re.fullmatch(r"[0-9]{1,2}/[0-9]{1,2}/[0-9]{4}", cell):
            hint = 'set data.date_format: "%d/%m/%Y" (day first) or "%m/%d/%Y" (month first)'
        elif form is not None and as_date(cell, None) is not None:
            hint = "leave data.date_format out: dates are then YYYY-MM-DD"
        else:
            hint = "correct it, or set data.date_format to the form of the dates in these files"
        return DataError(
            f"{self.where(row)}: {cell[:40]!r} in the column {column!r} is not a date ({known})", hint=hint
        )

    def _not_listed(self, row: int, column: str, cell: str, known: Sequence[str], field: str) -> DataError:
        listed = ", ".join(repr(value) for value in known[:10]) + (", ..." if len(known) > 10 else "")
        hint = f"it lists {listed}: correct the row, or add the value there"
        return DataError(f"{self.where(row)}: {cell[:40]!r} in the column {column!r} is not in {field}", hint=hint)
