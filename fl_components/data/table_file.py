"""One CSV or Parquet file, its columns as numbers or as values from a list, with the row of what is wrong."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from fl_components.data.text import read_text
from fl_components.errors import DataError, one_line

if TYPE_CHECKING:
    import pandas as pd

_MISSING: Final = ("", "na", "n/a", "nan", "null", "<na>", "nat")
_NUMBER: Final = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?")
_LARGEST: Final = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True, eq=False)
class TableFile:
    """The rows of a file: of CSV all cells are text, and the frame's index counts the records before."""

    file: Path
    frame: pd.DataFrame
    is_csv: bool

    @property
    def columns(self) -> list[str]:
        return list(self.frame.columns)

    def where(self, row: int) -> str:
        """The file and the line that the row stands on, or in Parquet the row's number."""
        if not self.is_csv:
            return f"{self.file}, row {row} (from 0)"
        line_breaks = sum(cell.count("\n") for cell in self.frame.iloc[:row].to_numpy().ravel())  # in quoted cells
        return f"{self.file}, line {int(self.frame.index[row]) + 1 + line_breaks}"

    def numbers(self, column: str) -> NDArray[np.float64]:
        """A column of numbers, float64 [rows]. Raises `DataError` for a cell that is none, or too large for float32."""
        import pandas as pd

        cells = self.frame[column]
        if self.is_csv:
            numbers = pd.to_numeric(cells, errors="coerce").to_numpy(np.float64)
        elif pd.api.types.is_numeric_dtype(cells.dtype):
            numbers = cells.to_numpy(np.float64, na_value=np.nan)
        else:
            numbers = np.full(len(cells), np.nan)
        wrong = np.flatnonzero(~(np.abs(numbers) <= _LARGEST))
        if wrong.size:
            row = int(wrong[0])
            cell = text(cells.iloc[row])
            if cell.lower() in _MISSING:
                raise self._no_value(row, column)
            raise DataError(
                f"{self.where(row)}: {cell[:40]!r} in the column {column!r} is not a number that can be trained on",
                hint="correct it, list the column's values in data.categories, or leave it out of data.columns",
            )
        return numbers

    def texts(self, column: str, known: Collection[str] = ()) -> list[str]:
        """A column of values as `text` has them. Raises `DataError` for one that is missing, and not `known`."""
        texts = [text(cell) for cell in self.frame[column]]
        for row, each in enumerate(texts):
            if each.lower() in _MISSING and each not in known:
                raise self._no_value(row, column)
        return texts

    def places(self, column: str, known: Sequence[str], field: str) -> NDArray[np.int64]:
        """The place of each cell of a column in `known`, int64 [rows]. Raises `DataError` for a cell that has none."""
        place_of = {each: place for place, each in enumerate(known)}
        texts = self.texts(column, place_of)
        for row, each in enumerate(texts):
            if each not in place_of:
                shown = ", ".join(repr(value) for value in known[:10]) + (", ..." if len(known) > 10 else "")
                quotes = "true" in known and each.lower() in ("yes", "no", "on", "off")
                raise DataError(
                    f"{self.where(row)}: {each[:40]!r} in the column {column!r} is not in {field}",
                    hint=f"write {each!r} in quotes there: without, YAML reads it as true or false"
                    if quotes
                    else f"it lists {shown}: correct the row, or add the value there",
                )
        return np.array([place_of[each] for each in texts], np.int64)

    def _no_value(self, row: int, column: str) -> DataError:
        return DataError(
            f"{self.where(row)}: the value of the column {column!r} is missing", hint="fill it in, or leave the row out"
        )


def text(value: Any) -> str:
    """A value as text that is the same in CSV, in Parquet and in a configuration.

    >>> [text(value) for value in (1, 1.0, "1", " 1.0 ", "01", True, "TRUE", "yes", float("nan"))]
    ['1', '1', '1', '1', '01', 'true', 'true', 'yes', 'nan']
    """
    words = str(value).strip()
    if words.lower() in ("true", "false"):
        return words.lower()
    if not _NUMBER.fullmatch(words):
        return words
    return str(int(words)) if "." not in words else str(float(words)).removesuffix(".0")


def read_table(file: Path) -> TableFile:
    """A file's rows and columns. Raises `DataError` when it cannot be read, or has no rows or no proper header."""
    is_csv = file.suffix.lower() == ".csv"
    names, frame = _read_csv(file) if is_csv else _read_parquet(file)
    for place, name in enumerate(names):
        if not name or name in names[:place]:
            raise DataError(
                f"{file}: {f'the column {name!r} is there twice' if name else f'column {place + 1} has no name'}",
                hint="name each column in the first line (pandas: to_csv(..., index=False) leaves the index out)",
            )
    frame.columns = names
    if not len(frame):
        raise DataError(f"{file} has no rows", hint="leave out the files of clients without rows")
    return TableFile(file, frame, is_csv)


def _read_csv(file: Path) -> tuple[list[str], pd.DataFrame]:
    import pandas as pd

    try:
        frame = pd.read_csv(
            StringIO(read_text(file)), header=None, dtype=str, keep_default_na=False, skip_blank_lines=False
        )
    except pd.errors.EmptyDataError as error:
        raise DataError(f"{file}, line 1: there is no header", hint="name the columns in the first line") from error
    except pd.errors.ParserError as error:
        raise _not_csv(file, one_line(error)) from error
    names = [str(name).strip() for name in frame.iloc[0]]
    rows = frame.iloc[1:]
    return names, rows[(rows != "").any(axis=1)]


def _not_csv(file: Path, words: str) -> DataError:
    if fields := re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", words):
        expected, line, found = fields.groups()
        return DataError(
            f"{file}, line {line}: {found} fields, and there are {expected} columns",
            hint="give each line as many fields as the first, and put values that hold a comma in double quotes",
        )
    if quote := re.search(r"EOF inside string starting at row (\d+)", words):
        return DataError(
            f"{file}, line {int(quote[1]) + 1}: a double quote is opened and not closed", hint="close it, or double it"
        )
    return DataError(f"{file} cannot be read as CSV: {words}", hint="write it anew, as CSV with commas")


def _read_parquet(file: Path) -> tuple[list[str], pd.DataFrame]:
    import pandas as pd

    try:
        frame = pd.read_parquet(file, engine="pyarrow")
    except Exception as error:  # pyarrow has many, and which it is depends on the byte that is damaged
        raise DataError(
            f"{file} cannot be read as Parquet: {one_line(error)}", hint="write it anew: it is damaged or cut short"
        ) from error
    return [str(name).strip() for name in frame.columns], frame.reset_index(drop=True)
