"""The files of a folder that has one file for each client."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, NamedTuple

from fedrounds.fl_components.data.cells import composed
from fedrounds.fl_components.data.client_ids import check_client_id
from fedrounds.fl_components.data.files import entries_of, is_file, is_folder, unreadable
from fedrounds.fl_components.data.table_files import ENDINGS, ending
from fedrounds.fl_components.errors import DataError, printable

_COMPRESSED: Final = (".gz", ".zip", ".bz2", ".xz", ".zst", ".7z", ".lz4", ".tar", ".tgz")


class ClientFiles(NamedTuple):
    """The path of each client's file, or folder of part files, by client id; and the names that were left alone."""

    paths: dict[str, Path]
    left_alone: tuple[str, ...]


def client_files(folder: Path, about: Path | None = None) -> ClientFiles:
    """Return each client's file in a folder. A name without its ending, in Unicode's composed form, is the client's id.

    `about` is no client's file. Hidden files (`.DS_Store`, `._north.csv`) are ignored, and files with another ending
    than .csv, .csv.gz or .parquet are left alone.

    Raises `DataError` when the folder has no such file, when something with such an ending cannot be a client's file,
    when its name cannot be a client's id, and when two files would be the same client.
    """
    if not is_folder(folder):
        raise DataError(f"{folder} is not a folder", hint="data.folder is where the clients' files are")
    entries = entries_of(folder)
    paths: dict[str, Path] = {}
    id_of: dict[str, str] = {}  # by the id without upper case
    left_alone = []
    for entry in entries:
        if entry.name.startswith((".", "~$")) or (about is not None and _is_same(entry, about)):
            continue
        if entry.name in ("_SUCCESS", "_delta_log"):
            raise DataError(
                f"{folder} holds the part files of a single table: it has {entry.name}",
                hint="data.folder has one file, or one folder of part files, for each client",
            )
        kind = ending(entry.name)
        if kind is None:
            _check_not_packed(entry)
            left_alone.append(printable(entry.name))
            continue
        _check_readable(entry)
        client_id = composed(entry.name[: -len(kind)])
        _check_name(entry, client_id)
        same = id_of.setdefault(client_id.casefold(), client_id)
        if same in paths:
            raise _same_client(paths[same], entry, same, client_id)
        paths[client_id] = entry
    if not paths:
        raise DataError(f"{folder} has no {' or '.join(ENDINGS[::2])} files", hint="put one file per client there")
    return ClientFiles(paths, tuple(left_alone))


def _is_same(one: Path, other: Path) -> bool:
    try:
        return os.path.realpath(one) == os.path.realpath(other)
    except (OSError, ValueError) as error:
        raise unreadable(other, error) from error


def _check_name(entry: Path, client_id: str) -> None:
    """Raise `DataError` for a file whose name cannot be a client's id."""
    if printable(entry.name) != entry.name:
        raise DataError(
            f"{entry.parent}: the file name {entry.name!a} is not UTF-8",
            hint="rename the file: its name without the ending is the client's id (`convmv` renames files from archives"
            " of older systems)",
        )
    check_client_id(client_id, f"{entry}: ")


def _check_readable(entry: Path) -> None:
    """Raise `DataError` for what has a client's name and is neither a file nor a folder."""
    if is_file(entry) or is_folder(entry):
        return
    if entry.is_symlink():
        raise DataError(
            f"{entry} is a link to {os.readlink(entry)}, which does not exist",
            hint="fetch the file that it stands for (git-annex, DVC), or remove the link",
        )
    raise DataError(f"{entry} is neither a file nor a folder", hint="put the client's file there")


def _check_not_packed(entry: Path) -> None:
    """Raise `DataError` for a table in an archive, which would otherwise be left alone like any other file."""
    name = entry.name.lower()
    packed = next((each for each in _COMPRESSED if name.endswith(each)), None)
    if packed is not None and name.removesuffix(packed).endswith((".csv", ".parquet")):
        raise DataError(
            f"{entry} is compressed in a form that is not read", hint="unpack it, or compress CSV with gzip (.csv.gz)"
        )


def _same_client(one: Path, other: Path, one_id: str, other_id: str) -> DataError:
    if one_id == other_id and one.name.isascii():
        names, why = f"{one} and {other.name}", f"would both be the client {one_id!r}"
    elif one_id == other_id:  # they may look alike
        names = f"{one.parent}: the files {one.name!a} and {other.name!a}"
        why = f"would both be the client {one_id!r}"
    else:
        names, why = f"{one} and {other.name}", "differ in upper and lower case only"
    return DataError(f"{names} {why}", hint="leave one of them out, or give it another name")
