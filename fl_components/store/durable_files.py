"""Files that are there whole and durable, or not at all."""

from __future__ import annotations

import glob
import os
import re
import uuid
from functools import partial
from pathlib import Path
from typing import Final

_ZEROS: Final = 1 << 20  # bytes that are written at a time


def write_durably(file: Path, data: bytes, *, private: bool = False) -> None:
    """Put `data` into the file, whole and durable, or leave the file as it was. Several processes may do so at once.

    `private` lets nobody but the owner read it (0600), nor look into a folder that is made for it (0700).
    """
    make_folder(file.parent, 0o700 if private else 0o777)
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb", opener=partial(os.open, mode=0o600 if private else 0o666)) as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(file.parent)


def erase(file: Path) -> bool:
    """Overwrite the file's bytes on the disk, then remove it, and what killed processes left as they wrote it.

    Returns whether it was there; a second call does nothing.

    A file system that never writes in place (copy-on-write, a solid-state disk) may keep the old bytes for a while.
    """
    for leftover in _leftovers(file):
        erase(leftover)
    try:
        with open(file, "r+b", buffering=0) as out:
            left = os.fstat(out.fileno()).st_size
            while left > 0:
                left -= out.write(bytes(min(left, _ZEROS)))
            os.fsync(out.fileno())
        file.unlink()
    except FileNotFoundError:
        return False
    sync_folder(file.parent)
    return True


def remove_leftovers(file: Path) -> None:
    """Remove what processes that were killed while they wrote this file have left."""
    for leftover in _leftovers(file):
        leftover.unlink(missing_ok=True)


def _leftovers(file: Path) -> list[Path]:
    beside = file.parent.glob(f".{glob.escape(file.name)}.*")  # those of other files are named otherwise
    return [each for each in beside if re.fullmatch("[0-9a-f]{32}", each.name[len(file.name) + 2 :])]


def make_folder(folder: Path, mode: int) -> None:
    """Create a folder durably, and those that it lies in, where they are missing."""
    if not folder.is_dir():
        make_folder(folder.parent, mode)
        folder.mkdir(mode, exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: a file that is flushed is lost with its name in a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
