"""Text files, read with the line of what is wrong."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Final

from fedrounds.fl_components.data.idx import content_of
from fedrounds.fl_components.errors import DataError

_MARKS: Final = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark begins with the same two bytes
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte order marks, with the encoding that each one announces."""


def read_text(file: Path, encoding: str = "utf-8", field: str | None = None) -> str:
    """Return the text of a file, uncompressed if it is compressed with gzip, with `\\n` after each line.

    A byte order mark is removed. `field` is the configuration field that `encoding` comes from, if there is one: error
    messages then say what to write there.

    Raises `DataError` when the file cannot be read, is empty, or is in another encoding.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "words.txt"
    >>> _ = file.write_bytes("née\\r\\n".encode())
    >>> read_text(file)
    'née\\n'
    """
    content = content_of(file)
    if content.startswith(b"PK\x03\x04"):
        raise DataError(
            f"{file} is a ZIP archive or an Excel workbook, not a text file",
            hint="unpack the archive, or save the workbook as CSV",
        )
    announced = next((name for mark, name in _MARKS if content.startswith(mark)), None)
    declared = codecs.lookup(encoding).name
    if announced == "utf-8":
        declared = "utf-8-sig"
    elif announced is not None and not declared.startswith(announced):
        raise _other_encoding(file, f"{file} is {announced.upper()} text, not {_label(encoding)}", field, announced)
    try:
        text = content.decode(declared)
        if not declared.startswith("utf-8") and not text.isascii():
            text.encode()  # UTF-7 and Python's own encodings also have halves of surrogate pairs
    except UnicodeDecodeError as error:
        line = 1 + content[: error.start].count(b"\n")
        message = f"{file}, line {line}: the byte {content[error.start]:#04x} is not {_label(encoding)} text"
        guess = "cp1252" if declared.startswith("utf-8") else "utf-8"
        raise _other_encoding(file, message, field, guess) from error
    except UnicodeError as error:  # also UTF-16 and UTF-32 without a byte order mark where they need one
        message = f"{file} is not {_label(encoding)} text: {error}"
        raise _other_encoding(file, message, field, "utf-8") from error
    if "\0" in text:
        message = f"{file} holds NUL characters: it is not {_label(encoding)} text"
        raise _other_encoding(file, message, field, "utf-16-le")
    if field is not None and not declared.startswith("utf") and not content.isascii() and _is_utf8(content):
        raise _other_encoding(file, f"{file} is UTF-8 text, and {field} is {encoding}", field, "utf-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _label(encoding: str) -> str:
    """
    >>> _label("utf-8"), _label("cp1252")
    ('UTF-8', 'cp1252')
    """
    return encoding.upper() if encoding.lower().startswith("utf") else encoding


def _other_encoding(file: Path, message: str, field: str | None, guess: str) -> DataError:
    if guess != "utf-8" and field is None:
        return DataError(message, hint="save the file as UTF-8 (Excel: CSV UTF-8)")
    if field is None:
        return DataError(message, hint="save the file in this encoding")
    windows = " (Excel on Windows in Western Europe)" if guess == "cp1252" else ""
    save = "save the file as UTF-8 (Excel: CSV UTF-8)" if guess != "utf-8" else "save the file in that encoding"
    return DataError(message, hint=f"{save}, or set {field}: {guess}{windows}")
