"""Files that their owner alone may read."""

from __future__ import annotations

import glob
import os
import re
import uuid
from pathlib import Path


def write_privately(file: Path, data: bytes) -> None:
    """Put `data` into the file (0600), whole and durable, or leave the file as it was."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")  # several processes may write at once
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_leftovers(file: Path) -> None:
    """Remove what processes that were killed while they wrote this file have left."""
    for leftover in file.parent.glob(f".{glob.escape(file.name)}.*"):
        if re.fullmatch("[0-9a-f]{32}", leftover.name[len(file.name) + 2 :]):  # else it is another file's
            leftover.unlink(missing_ok=True)
