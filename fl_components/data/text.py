"""Files of text, read with the line of what is wrong."""

from __future__ import annotations

from pathlib import Path

from fl_components.data.idx import content_of
from fl_components.errors import DataError


def read_text(file: Path) -> str:
    """A file of UTF-8 text, perhaps compressed with gzip, with `\\n` after each line.

    Raises `DataError` when it cannot be read, is empty, or is in another encoding.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "words.txt"
    >>> _ = file.write_bytes("née\\r\\n".encode())
    >>> read_text(file)
    'née\\n'
    """
    content = content_of(file)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + content[: error.start].count(b"\n")
        raise DataError(
            f"{file}, line {line}: the byte {content[error.start]:#04x} is not UTF-8 text",
            hint="save the file as UTF-8 (Excel: CSV UTF-8)",
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")
