"""Files that their owner alone may read."""

from __future__ import annotations

import os
from pathlib import Path


def temporary(file: Path) -> Path:
    """Where the next content of a file is written before it takes its place."""
    return file.with_name(f"{file.name}.next")


def write_privately(file: Path, data: bytes) -> None:
    """Put `data` into the file (0600), whole and durable, or leave the file as it was. One process at a time."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(os.open(temporary(file), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary(file), file)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
