"""Table: one client's rows as its files hold them, column by column, with the file and the line of each row."""

from __future__ import annotations

import csv
import datetime as dt
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from fedrounds.fl_components.data.arrow import Unusable, as_python, is_binary, is_text, plain_array
from fedrounds.fl_components.data.files import entries_of, is_file, is_folder, unreadable
from fedrounds.fl_components.data.text import read_text
from fedrounds.fl_components.errors import DataError, one_line

if TYPE_CHECKING:
    import pyarrow as pa

MISSING: Final = ("", "na", "n/a", "#n/a", "#nv", "nan", "null", "<na>", "nat", "?", ".")
"""Cells that stand for a missing value, in lower case: an empty cell, and what R, pandas, SQL, SAS, Weka and Excel
write (`#NV` is `#N/A` in German)."""

ENDINGS: Final = (".csv", ".csv.gz", ".parquet")
"""How the names of files that are read end, in lower case."""

_NUMBER: Final = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"
_VALUE: Final = re.compile(r"[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_GROUPED: Final = re.compile(r"[+-]?[0-9]{1,3}([.,'’ \u00a0\u202f][0-9]{3})+([.,][0-9]+)?")  # noqa: RUF001
_ISO_DATE: Final = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2}([T ][0-9]{2}:[0-9]{2}(:[0-9]{2}([.][0-9]{1,9})?)?)?)([Zz]|[+-][0-9]{2}:?[0-9]{2})?"
)
_LARGEST: Final = float(np.finfo(np.float32).max)
_MAX_DIGITS: Final = 30
_SEPARATORS: Final = (",", ";", "\t", "|")
_DAY: Final = dt.timedelta(days=1)

TRUTH: Final = {"true": "1", "false": "0"}
"""Values, as `text` has them, that are numbers too."""


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
class _Part:
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
    parts: Sequence[_Part]
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
            code_of_cell, distinct = _distinct(cells)
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
        return self._converted(column, lambda cells: _numbers(cells, self.dialect.decimal), self._not_a_number)

    def days(self, column: str, since: dt.date) -> NDArray[np.float64]:
        """Return a column of dates as days since `since`, float64 [rows], with NaN for missing values.

        A time of day is a part of a day; time zones are ignored. Raises `DataError` for a cell that is no date.
        """
        return self._converted(column, lambda cells: _days(cells, since, self.dialect.date_format), self._not_a_date)

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
                raise error(start + row, column, _shown(cell))
            converted.append(numbers)
            start += len(cells)
        return np.concatenate(converted)

    def _not_usable(self, row: int, column: str, cell: Unusable) -> DataError:
        return DataError(f"{self.where(row)}: the value in the column {column!r} {cell.problem}", hint=cell.hint)

    def _not_a_number(self, row: int, column: str, cell: str) -> DataError:
        if _GROUPED.fullmatch(cell):
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
        elif _as_date(cell, self.dialect.date_format) is not None:
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
        elif form is not None and _as_date(cell, None) is not None:
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


def text(value: Any, decimal: str = ".") -> str:
    """Return a value as text that is the same in CSV, in Parquet and in a configuration.

    Numbers that are equal have equal texts; a leading zero makes a code of a number, which is left as it is. A date has
    the form YYYY-MM-DD. Text is in Unicode's composed form (NFC).

    >>> [text(value) for value in (1, 1.0, "1", " 1.0 ", "+1", "1e+00", Decimal("1.00"), -0.0, "100000", "1e5", "01")]
    ['1', '1', '1', '1', '1', '1', '1', '0', '100000', '100000', '01']
    >>> text("2,50", decimal=","), text(2.5), text(True), text("TRUE"), text("yes"), text(float("nan")), text(None)
    ('2.5', '2.5', 'true', 'true', 'yes', '', '')
    """
    if value is None or value != value:
        return ""
    if isinstance(value, dt.datetime):
        return value.replace(tzinfo=None).isoformat(" ").removesuffix(" 00:00:00")
    words = str(value).strip()
    if not words.isascii():
        words = unicodedata.normalize("NFC", words)
    if words.lower() in ("true", "false"):
        return words.lower()
    written = isinstance(value, str) and decimal != "."
    if written and "." in words:
        return words
    plain = words.replace(decimal, ".") if written else words
    return words if not _VALUE.fullmatch(plain) else _number_text(plain) or words


def is_missing(value: str) -> bool:
    """
    >>> is_missing(""), is_missing("NA"), is_missing("none")
    (True, True, False)
    """
    return value.lower() in MISSING


def is_number(value: str) -> bool:
    """Whether a value, as `text` has it, is a number.

    >>> is_number("-1.5"), is_number("1e+300"), is_number("01"), is_number("nan")
    (True, True, False, False)
    """
    return _VALUE.fullmatch(value) is not None


def composed(name: str) -> str:
    """Return a name in Unicode's composed form (NFC), without blanks around it.

    >>> len("Ko\\u0308ln"), len(composed(" Ko\\u0308ln "))
    (5, 4)
    """
    return unicodedata.normalize("NFC", name).strip()


def ending(name: str) -> str | None:
    """Return which of `ENDINGS` a file's name ends in.

    >>> ending("North.CSV"), ending("west.csv.gz"), ending("notes.txt"), ending(".csv")
    ('.csv', '.csv.gz', None, None)
    """
    return next((each for each in ENDINGS if name.lower().endswith(each) and len(name) > len(each)), None)


def read_table(path: Path, dialect: Dialect) -> Table:
    """Read a CSV or Parquet file, or a folder of part files, as Spark and Dask write them.

    Raises `DataError` when it cannot be read, or has no rows or no proper header.
    """
    files = _part_files(path) if is_folder(path) else [path]
    read = [_read_csv(file, dialect) if ending(path.name) != ".parquet" else _read_parquet(file) for file in files]
    tables = [(file, *content) for file, content in zip(files, read, strict=True) if content is not None]
    if not tables or not any(part.num_rows for _, _, part, _ in tables):
        raise DataError(f"{path} has no rows", hint="leave out the files of clients without rows")
    first, columns = tables[0][0], list(tables[0][1])
    for file, found, _, _ in tables:
        if set(found) != set(columns):
            odd = next(iter(set(found) ^ set(columns)))
            has, lacks = (file, first) if odd in found else (first, file)
            raise DataError(
                f"{has} has the column {odd!r}, and {lacks} has not",
                hint="the part files of one client have the same columns: write the folder anew",
            )
    return Table(
        path,
        {name: [found[name] for _, found, _, _ in tables] for name in columns},
        [part for _, _, part, _ in tables],
        dialect,
        tables[0][3],
    )


_Read = tuple[dict[str, "pa.Array"], _Part, str | None]
"""The cells of a file by column, its part of the table, and the table's `separator_hint`."""


def _part_files(folder: Path) -> list[Path]:
    """Return the part files of a folder in the order of their names; hidden files and markers are left out."""
    of_folder = ending(folder.name)
    wanted = (".parquet",) if of_folder == ".parquet" else (".csv", ".csv.gz")
    files = []
    for entry in entries_of(folder):
        if entry.name == "_delta_log":
            raise DataError(
                f"{folder} is a Delta table, whose folder also holds rows that were deleted or replaced",
                hint="export the current rows as plain Parquet",
            )
        if entry.name.startswith((".", "_")) or entry.name.endswith(".crc"):
            continue
        if not is_file(entry) or ending(entry.name) not in wanted:
            what = "the folder" if entry.is_dir() else "a link to nothing," if entry.is_symlink() else "the file"
            raise DataError(
                f"{folder} has {what} {entry.name}, and a client's folder has nothing but {' and '.join(wanted)} files",
                hint="write the rows without partitions, and move other files elsewhere",
            )
        files.append(entry)
    if not files:
        raise DataError(f"{folder} is a folder without part files", hint=f"put the client's {wanted[0]} files there")
    return files


def _read_csv(file: Path, dialect: Dialect) -> _Read | None:
    """Return what a CSV file holds; None for an empty one among part files."""
    import pandas as pd
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        if ending(file.parent.name) is not None and not file.stat().st_size:
            return None
    except OSError as error:
        raise unreadable(file, error) from error
    content = read_text(file, dialect.encoding, "data.encoding")
    skipped = 0
    if announced := re.match(r'"?sep=(.)"?\n', content):  # Excel's own first line
        if announced[1] != dialect.separator:
            raise _other_separator(file, 1, announced[1], content, dialect)
        skipped, content = 1, content[announced.end() :]
    header = content.partition("\n")[0]
    other = _likely_separator(header, dialect.separator)
    if other is not None and _num_fields(header, dialect.separator) == 1:
        raise _other_separator(file, 1 + skipped, other, content, dialect)
    try:
        frame = pd.read_csv(
            StringIO(content),
            sep=dialect.separator,
            header=None,
            dtype=str,
            keep_default_na=False,
            skip_blank_lines=False,
        )
    except pd.errors.EmptyDataError as error:
        raise DataError(f"{file}, line 1: there is no header", hint="name the columns in the first line") from error
    except pd.errors.ParserError as error:
        if other is not None:
            raise _other_separator(file, 1 + skipped, other, content, dialect) from error
        raise _not_csv(file, one_line(error), skipped, dialect.separator) from error
    # pandas leaves empty what a short line lacks.
    cells = [pc.fill_null(plain_array(pa.array(frame[place], from_pandas=True)), "") for place in frame.columns]
    names = _checked_names(file, [column[0].as_py() for column in cells])
    hint = None if other is None else _separator_hint(other, content, dialect)
    breaks = np.zeros(len(frame) + 1, np.int64)  # line breaks within quoted cells of the records before
    if content.count("\n") + (not content.endswith("\n")) > len(frame):
        for column in cells:
            breaks[1:] += pc.count_substring(column, "\n").to_numpy(zero_copy_only=False)
    lines = np.arange(len(frame)) + 1 + skipped + breaks[:-1].cumsum()
    kept = np.zeros(len(frame), np.bool_)
    for column in cells:
        kept |= pc.not_equal(pc.utf8_trim_whitespace(column), "").to_numpy(zero_copy_only=False)
    kept[0] = False
    last_is_empty = pc.equal(cells[-1], "").to_numpy(zero_copy_only=False)
    starts = lines - 1 - skipped
    short = _short_line(content, starts, np.flatnonzero(kept & last_is_empty), dialect.separator, len(cells))
    if short is not None and other is not None:
        raise _other_separator(file, 1 + skipped, other, content, dialect)
    if short is not None:
        row, num_fields = short
        raise DataError(
            f"{file}, line {lines[row]}: {num_fields} field{'s' * (num_fields > 1)}, and there are {len(cells)} "
            "columns",
            hint="complete the line, which is cut short or lacks separators after its last value, or remove it",
        )
    rows = [column.slice(1) if kept[1:].all() else column.filter(pa.array(kept)) for column in cells]
    return dict(zip(names, rows, strict=True)), _Part(file, int(kept.sum()), lines[kept]), hint


def _short_line(
    content: str, starts: NDArray[np.int64], rows: NDArray[np.intp], separator: str, num_columns: int
) -> tuple[int, int] | None:
    """Return the first of `rows` with fewer fields than there are columns, and how many it has.

    pandas reads such a row like one whose last cells are empty: `rows` are those whose last cell is, and their fields
    are counted here. `starts` is the place of each row's first line among those of `content`.
    """
    lines = content.split("\n") if rows.size else []
    stops = np.append(starts[1:], len(lines))
    for row in rows.tolist():
        record = "\n".join(lines[starts[row] : stops[row]])
        num_fields = 1 + record.count(separator)
        if num_fields >= num_columns and any(separator in quoted for quoted in record.split('"')[1::2]):
            try:
                num_fields = len(next(csv.reader(StringIO(record), delimiter=separator)))
            except csv.Error:  # a cell of more than 131,072 characters
                continue
        if num_fields < num_columns:
            return row, num_fields
    return None


def _read_parquet(file: Path) -> _Read:
    import pyarrow.parquet as pq

    try:
        # As one file: what reads data sets makes columns of folders that are named like "year=2020".
        with pq.ParquetFile(file) as opened:
            read = opened.read()
        names, metadata = read.column_names, read.schema.pandas_metadata or {}
    except Exception as error:  # Arrow has many, and which it is depends on the byte that is damaged
        raise DataError(
            f"{file} cannot be read as Parquet: {one_line(error)}", hint="write it anew: it is damaged or cut short"
        ) from error
    index = [name for name in metadata.get("index_columns", ()) if isinstance(name, str)]
    named = [(place, name) for place, name in enumerate(names) if name not in index]
    checked = _checked_names(file, [name for _, name in named])
    columns = {name: plain_array(read.column(place)) for (place, _), name in zip(named, checked, strict=True)}
    return columns, _Part(file, read.num_rows, None), None


def _checked_names(file: Path, written: Sequence[str]) -> list[str]:
    names = [composed(str(name)) for name in written]
    for place, name in enumerate(names):
        if not name or name in names[:place]:
            raise DataError(
                f"{file}: {f'the column {name!r} is there twice' if name else f'column {place + 1} has no name'}",
                hint="name each column in the first line (pandas: to_csv(..., index=False) leaves the index out)",
            )
    return names


def _num_fields(line: str, separator: str) -> int:
    return len(next(csv.reader([line], delimiter=separator), [""]))


def _likely_separator(header: str, separator: str) -> str | None:
    """Return the separator that makes more columns of a header than the given one does.

    >>> _likely_separator("age;pressure;ill", ","), _likely_separator("age,ill", ",")
    (';', None)
    """
    fields = {each: _num_fields(header, each) for each in _SEPARATORS}
    best = max(_SEPARATORS, key=lambda each: fields[each])
    return best if fields[best] > _num_fields(header, separator) else None


def _other_separator(file: Path, line: int, separator: str, content: str, dialect: Dialect) -> DataError:
    """The error for a file whose columns are separated by another character than `data.separator`."""
    return DataError(
        f"{file}, line {line}: the columns seem to be separated by {_named(separator)}, and data.separator is "
        f"{in_quotes(dialect.separator)}",
        hint=_separator_hint(separator, content, dialect),
    )


def _separator_hint(separator: str, content: str, dialect: Dialect) -> str:
    """Return what to set for a file with this separator, and perhaps another decimal mark."""
    lines = content[:100_000].splitlines()[1:100]
    cells = [cell.strip() for row in csv.reader(lines, delimiter=separator) for cell in row]
    commas = sum(re.fullmatch(r"[+-]?[0-9]+,[0-9]+", cell) is not None for cell in cells)
    points = sum(re.fullmatch(r"[+-]?[0-9]+\.[0-9]+", cell) is not None for cell in cells)
    decimal = "," if commas > points else "." if points > commas or separator == "," else dialect.decimal
    fields = [f"data.separator: {in_quotes(separator)}"]
    fields += [f"data.decimal: {in_quotes(decimal)}"] if decimal not in (dialect.decimal, separator) else []
    return f"set {' and '.join(fields)}"


def in_quotes(character: str) -> str:
    r"""
    >>> in_quotes(";"), in_quotes("\t")
    ('";"', '"\\t"')
    """
    return '"\\t"' if character == "\t" else f'"{character}"'


def _named(character: str) -> str:
    return {",": "commas", ";": "semicolons", "\t": "tabs"}.get(character, repr(character))


def _not_csv(file: Path, words: str, skipped: int, separator: str) -> DataError:
    if fields := re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", words):
        expected, line, found = map(int, fields.groups())
        return DataError(
            f"{file}, line {line + skipped}: {found} fields, and there are {expected} columns",
            hint="give each line as many fields as the first, and put values that hold "
            f"{'a comma' if separator == ',' else repr(separator)} in double quotes",
        )
    if quote := re.search(r"EOF inside string starting at row (\d+)", words):
        return DataError(
            f"{file}, line {int(quote[1]) + 1 + skipped}: a double quote is opened and not closed",
            hint="close it, or double it",
        )
    return DataError(f"{file} cannot be read as CSV: {words}", hint="write it anew as CSV")


def _distinct(cells: pa.Array) -> tuple[NDArray[np.int64], list[Any]]:
    """Return the distinct values of cells, as `as_python` has them, and the place of each cell among them [rows]."""
    import pyarrow as pa

    half = pa.types.is_float16(cells.type)
    try:
        encoded = (cells.cast(pa.float32()) if half else cells).dictionary_encode("encode")
    except pa.ArrowNotImplementedError:  # lists, structs, maps and columns of nulls
        place_of: dict[Any, int] = {}
        codes = [place_of.setdefault(cell, len(place_of)) for cell in as_python(cells)]
        return np.array(codes, np.int64), list(place_of)
    codes_of_cells = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    values = encoded.dictionary
    if pa.types.is_float32(values.type):  # with the digits of their own type
        return codes_of_cells, list(values.to_numpy(False).astype(np.float16 if half else np.float32))
    return codes_of_cells, as_python(values)


def _numbers(cells: pa.Array, decimal: str) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return cells as numbers [rows], NaN for missing values, and which of them are no numbers [rows]."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = cells.type
    wrong = np.zeros(len(cells), np.bool_)
    if pa.types.is_decimal(kind):  # by way of its text, which is rounded correctly
        numbers = _float64(cells.cast(pa.string()).cast(pa.float64()))
    elif pa.types.is_boolean(kind):
        numbers = _float64(cells.cast(pa.int8()).cast(pa.float64()))
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
        numbers = _float64(cells.cast(pa.float64(), safe=False))
    elif is_text(kind):
        words = pc.utf8_trim_whitespace(cells)
        form = _NUMBER if decimal == "." else _NUMBER.replace(r"\.", ",")
        right = pc.match_substring_regex(words, f"^{form}$")
        plain = words if decimal == "." else pc.replace_substring(words, ",", ".")
        # Arrow does not read a plus sign.
        plain = pc.utf8_ltrim(pc.if_else(right, plain, pa.scalar(None, kind)), "+")
        numbers = _float64(plain.cast(pa.float64()))
        odd = np.flatnonzero(~right.fill_null(True).to_numpy(zero_copy_only=False))
        for row, word in zip(odd, words.take(pa.array(odd)).to_pylist(), strict=True):
            if word.lower() in ("true", "false"):
                numbers[row] = word.lower() == "true"
            else:
                wrong[row] = not is_missing(word)
    else:
        numbers = np.full(len(cells), np.nan)
        wrong = cells.is_valid().to_numpy(zero_copy_only=False)
        if is_binary(kind):  # of which some are not UTF-8
            wrong = np.array([isinstance(cell, Unusable) for cell in as_python(cells)], np.bool_)
    return numbers, wrong | (np.abs(numbers) > _LARGEST)


def _days(cells: pa.Array, since: dt.date, form: str | None) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return dates as days since a date [rows], NaN for missing values, and which cells are no dates [rows]."""
    codes, distinct = _distinct(cells)
    start = dt.datetime.combine(since, dt.time())
    days, wrong = np.full(len(distinct), np.nan), np.zeros(len(distinct), np.bool_)
    for place, cell in enumerate(distinct):
        if cell is None or cell != cell or (isinstance(cell, str) and is_missing(cell.strip())):
            continue
        moment = _as_date(cell, form)
        if moment is None:
            wrong[place] = True
        else:
            days[place] = _days_between(start, moment)
    return days[codes], wrong[codes]


def _as_date(cell: Any, form: str | None) -> dt.datetime | None:
    """Return a cell as a date and a time of day without a zone; None for what is no date."""
    if isinstance(cell, dt.datetime):
        return cell.replace(tzinfo=None)
    if isinstance(cell, dt.date):
        return dt.datetime.combine(cell, dt.time())
    if form is not None and isinstance(cell, int | float | Decimal) and not isinstance(cell, bool):
        # A number has lost the zeros before it: it is a date only where it must be this one.
        words = text(cell)
        moment = _as_date(words, form)
        return moment if moment is not None and moment.strftime(form) == words else None
    if not isinstance(cell, str):
        return None
    try:
        if form is not None:
            return dt.datetime.strptime(cell.strip(), form).replace(tzinfo=None)
        iso = _ISO_DATE.fullmatch(cell.strip())
        return dt.datetime.fromisoformat(iso[1]) if iso else None
    except ValueError:
        return None


def _days_between(start: dt.datetime, moment: dt.datetime) -> float:
    try:
        return (moment - start) / _DAY
    except (OverflowError, ValueError):  # pandas, for more nanoseconds than 64 bits hold
        return (moment.to_pydatetime(warn=False) - start) / _DAY  # type: ignore[attr-defined, no-any-return]


def _number_text(plain: str) -> str | None:
    """Return a number as text; None for one that float64 cannot hold.

    >>> [_number_text(each) for each in ("1e+05", "-0.0", "2.50", "12345678901234567890", "1e22", "1e300", "1e999")]
    ['100000', '0', '2.5', '12345678901234567890', '10000000000000000000000', '1e+300', None]
    """
    try:
        exact = Decimal(plain)
    except InvalidOperation:
        return None
    if abs(exact.adjusted()) <= _MAX_DIGITS and exact == exact.to_integral_value():
        return str(int(exact))
    rounded = float(exact)
    if not np.isfinite(rounded):
        return None
    return str(int(rounded)) if rounded.is_integer() and abs(rounded) < 10**_MAX_DIGITS else repr(rounded)


def _float64(cells: pa.Array) -> NDArray[np.float64]:
    """Return numbers as an array of our own, with NaN for nulls."""
    return np.array(cells.to_numpy(zero_copy_only=False), np.float64)


def _shown(cell: Any) -> str:
    """A cell as error messages show it."""
    return cell.strip() if isinstance(cell, str) else text(cell)
