"""Table files: read CSV and Parquet files into a `Table`."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from fedrounds.fl_components.data.arrow import plain_array
from fedrounds.fl_components.data.cells import character_name, composed, in_quotes
from fedrounds.fl_components.data.client_table import Dialect, Table, TablePart
from fedrounds.fl_components.data.files import entries_of, is_file, is_folder, unreadable
from fedrounds.fl_components.data.text import read_text
from fedrounds.fl_components.errors import DataError, one_line

if TYPE_CHECKING:
    import pyarrow as pa

ENDINGS: Final = (".csv", ".csv.gz", ".parquet")
"""How the names of files that are read end, in lower case."""


_SEPARATORS: Final = (",", ";", "\t", "|")


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


_Read = tuple[dict[str, "pa.Array"], TablePart, str | None]
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
    return dict(zip(names, rows, strict=True)), TablePart(file, int(kept.sum()), lines[kept]), hint


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
    return columns, TablePart(file, read.num_rows, None), None


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
        f"{file}, line {line}: the columns seem to be separated by {character_name(separator)}, and data.separator is "
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
