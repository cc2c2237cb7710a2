"""Cell hashes: 64-bit hashes of a column's cells, equal for every spelling of a value."""

from __future__ import annotations

import contextlib
import hashlib
import re
import unicodedata
from contextlib import suppress
from datetime import date
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from fedrounds.fl_components.data.arrow import as_python

if TYPE_CHECKING:
    import pandas as pd


Hashes = NDArray[np.uint64]


CELLS_IN_CACHE: Final = 1 << 16


_MISSING: Final = frozenset({"", "na", "n/a", "#n/a", "nan", "null", "none", "<na>", "nat", "?", "."})


_DECIMAL_COMMA: Final = re.compile(r"[+-]?[0-9]+,[0-9]+([eE][+-]?[0-9]+)?")


_SERIAL: Final = re.compile(r"(\D*)([0-9]{1,15})(\D*)")


_MIDNIGHT: Final = re.compile(r"([0-9]{4}-[0-9]{2}-[0-9]{2})[ T]00:00(:00(\.0+)?)?")


def cell_numbers(x: NDArray[Any]) -> NDArray[np.float64]:
    with np.errstate(over="ignore"):  # what float32 cannot hold is refused later, by its place
        return np.asarray(x, np.float32).astype(np.float64)


def number_hashes(numbers: NDArray[Any]) -> Hashes:
    """Of numbers, as the float32 that they are; 0 and what is missing add nothing to a row."""
    with np.errstate(over="ignore", invalid="ignore"):
        as_float = np.asarray(numbers).astype(np.float32)
    as_float[~np.isfinite(as_float)] = 0
    as_float += 0.0  # -0.0 is 0
    bits = as_float.view(np.uint32).astype(np.uint64)
    hashes = mix_hashes(bits)
    hashes[bits == 0] = 0
    return hashes


def mix_hashes(values: Hashes) -> Hashes:
    """A bijection of 64 bits in which each bit depends on all (the finaliser of SplitMix64; Steele, Lea and Flood
    2014)."""
    with np.errstate(over="ignore"):
        mixed = values + np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(30)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(27)
        mixed *= np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return mixed


def name_hashes(cells: Hashes, names: Any) -> Hashes:
    """The cells' hashes with their columns' names; what adds nothing without a name adds nothing with one."""
    mixed = mix_hashes(cells ^ names)
    mixed[cells == 0] = 0
    return mixed


def multiset_hash(hashes: Hashes) -> int:
    """A hash of the rows and how often each occurs, where that is divided by what all counts have in common."""
    if not len(hashes):
        return 0
    distinct, counts = count_values(hashes)
    counts //= np.gcd.reduce(counts)
    return int((mix_hashes(distinct) * mix_hashes(counts.astype(np.uint64))).sum(dtype=np.uint64))


def count_values(values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The distinct values, sorted, and how often each occurs.

    `np.unique`, which looks values up in a table and is 50 times slower where most differ.
    """
    in_order = np.sort(values)
    first = np.flatnonzero(np.concatenate([[True], in_order[1:] != in_order[:-1]])[: len(in_order)])
    return in_order[first], np.diff(first, append=len(in_order))


def hash_of_text(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def normalised_text(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


def cell_hashes(column: Any) -> tuple[Hashes, NDArray[np.float64] | None]:
    """The hashes of a column's cells [M], and its numbers where it has numbers only (NaN where one is missing)."""
    chunks = (
        column if isinstance(column, list | tuple) and any(hasattr(each, "to_pandas") for each in column) else [column]
    )
    found = [_chunk(chunk) for chunk in chunks]
    hashes = np.concatenate([each for each, _ in found])
    numbers = [each for _, each in found if each is not None]
    return hashes, np.concatenate(numbers) if len(numbers) == len(found) else None


def _chunk(chunk: Any) -> tuple[Hashes, NDArray[np.float64] | None]:
    import pandas as pd

    if not hasattr(chunk, "to_pandas"):
        return _of_series(pd.Series(chunk))
    try:
        return _of_series(chunk.to_pandas())
    except Exception:  # lists, structs and maps, and times that Python or pandas cannot hold
        return _of_series(pd.Series(as_python(chunk), dtype=object))


def _of_series(series: pd.Series[Any]) -> tuple[Hashes, NDArray[np.float64] | None]:
    import pandas as pd

    if pd.api.types.is_bool_dtype(series.dtype) or pd.api.types.is_numeric_dtype(series.dtype):
        numbers = series.astype("Float64").to_numpy(np.float64, na_value=np.nan)
        return number_hashes(numbers), cell_numbers(numbers)
    codes, uniques = pd.factorize(series)  # cells repeat: each different one is looked at once
    texts = [None if value is None else _cell_text(value) for value in uniques]
    parsed = [None if text is None else _cell_number(text) for text in texts]
    hashes = np.zeros(len(texts) + 1, np.uint64)  # the last one is what a missing cell has
    numbers = np.full(len(texts) + 1, np.nan)
    only_numbers = True
    for place, (text, number) in enumerate(zip(texts, parsed, strict=True)):
        if number is not None:
            numbers[place] = number
        elif text is not None:
            hashes[place] = hash_of_text(text)
            only_numbers = False
    is_number = np.isfinite(numbers)
    hashes[is_number] = number_hashes(numbers[is_number])
    if not only_numbers:  # dates and the like are compared as the days or numbers that they count
        serials = _serials([text for text in texts if text is not None])
        if serials is None:
            return hashes[codes], None
        numbers[[place for place, text in enumerate(texts) if text is not None]] = serials
    return hashes[codes], cell_numbers(numbers)[codes]


def _serials(texts: list[str]) -> list[float] | None:
    """Return the days of ISO dates, or the numbers in texts that differ in one number alone, such as `P-0017`.

    None for other texts.

    >>> _serials(["2024-01-01", "2024-01-03"]), _serials(["P1", "P20"]), _serials(["P1", "Q1"])
    ([738886.0, 738888.0], [1.0, 20.0], None)
    """
    with suppress(ValueError):
        return [float(date.fromisoformat(text).toordinal()) for text in texts]
    matches = [_SERIAL.fullmatch(text) for text in texts]
    if len({(match[1], match[3]) if match else None for match in matches}) != 1 or matches[0] is None:
        return None
    return [float(match[2]) for match in matches if match]


def _cell_text(value: Any) -> str | None:
    """A cell as text that is the same in CSV and in Parquet; None where it is missing."""
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            value = value.decode()
    text = normalised_text(str(value))
    if text.casefold() in _MISSING:
        return None
    if text.casefold() in ("true", "false"):
        return "1" if text.casefold() == "true" else "0"
    midnight = _MIDNIGHT.fullmatch(text)
    return midnight[1] if midnight else text


def _cell_number(text: str) -> float | None:
    if "_" in text:  # Python's spelling of a number, and no file's
        return None
    try:
        return float(text.replace(",", ".") if _DECIMAL_COMMA.fullmatch(text) else text)
    except ValueError:
        return None
