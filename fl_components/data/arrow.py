"""Cells of Arrow arrays as values of Python, also where Python has no value for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True)
class Unusable:
    """A cell that can be neither a number nor a date nor text.

    Args:
      text: the cell as text: that of equal cells is equal.
      problem: what is wrong with it, after "the value".
      hint: what to do about it.
    """

    text: str
    problem: str
    hint: str

    def __str__(self) -> str:
        return self.text


def plain_array(cells: Any) -> pa.Array:
    """Return the column of a Parquet file as one array without extension types and dictionaries.

    Bytes become text where all of them are UTF-8: Impala, Hive and old versions of Spark do not mark text as such.
    Text that is not UTF-8 becomes bytes.
    """
    import pyarrow as pa

    array = cells.combine_chunks() if isinstance(cells, pa.ChunkedArray) else cells
    if isinstance(array, pa.ChunkedArray):  # of an extension type
        array = pa.concat_arrays(array.chunks)
    while isinstance(array, pa.ExtensionArray | pa.DictionaryArray):
        array = array.storage if isinstance(array, pa.ExtensionArray) else array.dictionary_decode()
    if is_text(array.type):
        try:
            array.validate(full=True)
        except pa.ArrowInvalid:
            return array.cast(pa.large_binary())
    elif is_binary(array.type):
        try:
            return array.cast(pa.large_string() if pa.types.is_large_binary(array.type) else pa.string())
        except pa.ArrowInvalid:
            return array
    return array


def is_text(kind: pa.DataType) -> bool:
    import pyarrow.types as types

    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def is_binary(kind: pa.DataType) -> bool:
    import pyarrow.types as types

    return bool(
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_fixed_size_binary(kind)
        or types.is_binary_view(kind)
    )


def as_python(cells: pa.Array) -> list[Any]:
    """Return each cell as a value of Python, None for nulls, and `Unusable` for what cannot be a value of a table.

    These are lists, structs and maps, bytes that are not UTF-8, and times that Python's `datetime` cannot hold.

    >>> import pyarrow as pa
    >>> [str(cell) for cell in as_python(pa.array([[1, 2], None]))]
    ['[1, 2]', 'None']
    >>> as_python(pa.array([8, 10**8], pa.date32()))[1].problem
    'lies outside the years 1 to 9999'
    """
    import pyarrow as pa

    if pa.types.is_nested(cells.type):
        return [_nested(cell) if cell.is_valid else None for cell in cells]
    if is_binary(cells.type):
        return [None if cell is None else _decoded(cell) for cell in cells.to_pylist()]
    try:
        return list(cells.to_pylist())
    except Exception:  # Python, pandas and the module of time zones each raise errors of their own
        return [_value(cell) for cell in cells]


def _value(cell: pa.Scalar[Any]) -> Any:
    try:
        return cell.as_py()
    except Exception:
        problem, hint = _problem(cell.type)
        return Unusable(f"{cell.type} {_integer(cell)}", problem, hint)


def _problem(kind: pa.DataType) -> tuple[str, str]:
    """Return what is wrong with a value of this type that Python cannot hold, and what to do."""
    import pyarrow as pa

    if pa.types.is_timestamp(kind) and kind.tz is not None:
        try:
            pa.lib.string_to_tzinfo(kind.tz)
        except Exception:
            return (
                f"is in the time zone {kind.tz!r}, which is not known",
                "write the time stamps with a zone such as Europe/Berlin or UTC, or without one",
            )
    if pa.types.is_date(kind) or (pa.types.is_timestamp(kind) and kind.unit != "ns"):
        return (
            "lies outside the years 1 to 9999",
            "correct it or, where it stands for a date that is not known, leave it empty and set data.missing",
        )
    return f"is out of range ({kind})", "correct it, or leave the column out of data.columns"


def _integer(cell: Any) -> Any:
    """Return the integer that a date or a time is stored as."""
    return getattr(cell, "value", None)


def _nested(cell: pa.Scalar[Any]) -> Unusable:
    try:
        text = str(cell.as_py())
    except Exception:
        text = _nested_text(cell)
    return Unusable(
        text,
        f"is a {_kind_of_nested(cell.type)}, which is neither a number nor text",
        "write one value in each cell, or leave the column out of data.columns",
    )


def _nested_text(cell: Any) -> str:
    """Return a nested cell as text where a value in it is none of Python's."""
    import pyarrow as pa

    if not cell.is_valid:
        return "None"
    if pa.types.is_struct(cell.type):
        return "{" + ", ".join(f"{name!r}: {_nested_text(each)}" for name, each in cell.items()) + "}"
    if pa.types.is_nested(cell.type):
        return "[" + ", ".join(map(_nested_text, cell.values)) + "]"
    value = _value(cell)
    return str(value) if isinstance(value, Unusable) else repr(value)


def _kind_of_nested(kind: pa.DataType) -> str:
    import pyarrow as pa

    return "struct" if pa.types.is_struct(kind) else "map" if pa.types.is_map(kind) else "list"


def _decoded(cell: bytes) -> str | Unusable:
    try:
        return cell.decode()
    except UnicodeDecodeError:
        return Unusable(
            str(cell),
            "is not UTF-8 text",
            "write the column as text (string) in UTF-8, or leave it out of data.columns",
        )
