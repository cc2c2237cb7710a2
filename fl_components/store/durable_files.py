"""Files that are there whole and durable, or not at all."""

from __future__ import annotations

import glob
import os
import re
import uuid
from functools import partial
from pathlib import Path


def write_durably(file: Path, data: bytes, *, private: bool = False) -> None:
    """Put `data` into the file, whole and durable, or leave the file as it was. Several processes may do so at once.

    `private` lets nobody but the owner read it (0600), nor look into a folder that is made for it (0700).
    """
    _make_folder(file.parent, 0o700 if private else 0o777)
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


def remove_leftovers(file: Path) -> None:
    """Remove what processes that were killed while they wrote this file have left."""
    for leftover in file.parent.glob(f".{glob.escape(file.name)}.*"):
        if re.fullmatch("[0-9a-f]{32}", leftover.name[len(file.name) + 2 :]):  # else it is another file's
            leftover.unlink(missing_ok=True)


def _make_folder(folder: Path, mode: int) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent, mode)
        folder.mkdir(mode, exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make what was added to the folder, or removed from it, durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
