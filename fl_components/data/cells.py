"""Cells: parse the numbers, dates and texts of a table's columns."""

from __future__ import annotations

import datetime as dt
import re
import unicodedata
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from fedrounds.fl_components.data.arrow import Unusable, as_python, is_binary, is_text

if TYPE_CHECKING:
    import pyarrow as pa


MISSING: Final = ("", "na", "n/a", "#n/a", "#nv", "nan", "null", "<na>", "nat", "?", ".")
"""Cells that stand for a missing value, in lower case: an empty cell, and what R, pandas, SQL, SAS, Weka and Excel
write (`#NV` is `#N/A` in German)."""


_NUMBER: Final = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"


_VALUE: Final = re.compile(r"[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


GROUPED_NUMBER: Final = re.compile(r"[+-]?[0-9]{1,3}([.,'’ \u00a0\u202f][0-9]{3})+([.,][0-9]+)?")  # noqa: RUF001


_ISO_DATE: Final = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2}([T ][0-9]{2}:[0-9]{2}(:[0-9]{2}([.][0-9]{1,9})?)?)?)([Zz]|[+-][0-9]{2}:?[0-9]{2})?"
)


_LARGEST: Final = float(np.finfo(np.float32).max)


_MAX_DIGITS: Final = 30


_DAY: Final = dt.timedelta(days=1)


TRUTH: Final = {"true": "1", "false": "0"}
"""Values, as `text` has them, that are numbers too."""


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


def in_quotes(character: str) -> str:
    r"""
    >>> in_quotes(";"), in_quotes("\t")
    ('";"', '"\\t"')
    """
    return '"\\t"' if character == "\t" else f'"{character}"'


def character_name(character: str) -> str:
    return {",": "commas", ";": "semicolons", "\t": "tabs"}.get(character, repr(character))


def distinct_cells(cells: pa.Array) -> tuple[NDArray[np.int64], list[Any]]:
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


def parse_numbers(cells: pa.Array, decimal: str) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
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


def parse_days(cells: pa.Array, since: dt.date, form: str | None) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return dates as days since a date [rows], NaN for missing values, and which cells are no dates [rows]."""
    codes, distinct = distinct_cells(cells)
    start = dt.datetime.combine(since, dt.time())
    days, wrong = np.full(len(distinct), np.nan), np.zeros(len(distinct), np.bool_)
    for place, cell in enumerate(distinct):
        if cell is None or cell != cell or (isinstance(cell, str) and is_missing(cell.strip())):
            continue
        moment = as_date(cell, form)
        if moment is None:
            wrong[place] = True
        else:
            days[place] = _days_between(start, moment)
    return days[codes], wrong[codes]


def as_date(cell: Any, form: str | None) -> dt.datetime | None:
    """Return a cell as a date and a time of day without a zone; None for what is no date."""
    if isinstance(cell, dt.datetime):
        return cell.replace(tzinfo=None)
    if isinstance(cell, dt.date):
        return dt.datetime.combine(cell, dt.time())
    if form is not None and isinstance(cell, int | float | Decimal) and not isinstance(cell, bool):
        # A number has lost the zeros before it: it is a date only where it must be this one.
        words = text(cell)
        moment = as_date(words, form)
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


def displayed_cell(cell: Any) -> str:
    """A cell as error messages show it."""
    return cell.strip() if isinstance(cell, str) else text(cell)
