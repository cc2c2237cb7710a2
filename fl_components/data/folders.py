"""Where the files of public data sets are looked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fedrounds.fl_components.data.files import expanded, is_file
from fedrounds.fl_components.data.published import PUBLISHED
from fedrounds.fl_components.errors import DataError


def find_folder(name: str, files: Sequence[str], folder: str | None = None) -> Path:
    """The folder that holds the files of the public data set `name`, each perhaps with `.gz` after its name.

    It is `folder`, where the configuration names one; otherwise the first that has them all of $FEDROUNDS_DATA/NAME,
    HOME/data/NAME (HOME: the home folder of fedrounds), data/NAME and ../shared/data/NAME in the working folder.
    Raises `DataError` that lists the files and says where to put them.
    """
    searched = places(name) if folder is None else [expanded(folder, "data.folder")]
    for place in searched:
        missing = [file for file in files if find_file(place, file) is None]
        if not missing:
            return place
        if len(missing) < len(files):
            raise DataError(
                f"{place} has some files of {name} and not {' and not '.join(missing)}",
                hint=f"put {'it' if len(missing) == 1 else 'them'} there, as is or with .gz after the name",
            )
    listed = files[0] if len(files) == 1 else f"{', '.join(files[:-1])} and {files[-1]}"
    by_hand = f"put {listed} into {searched[0]}, as they are or with .gz after the name"
    published = PUBLISHED.get(name)
    if published is not None and published.url is not None:
        otherwise = f"`fedrounds data get {name}`"
        by_hand += f", or leave data.folder out and run {otherwise}" if folder else f", or let {otherwise} do so"
    if folder is None:
        by_hand += "; the variable FEDROUNDS_DATA or the field data.folder names another folder"
    raise DataError(f"the files of {name} are not in {' or '.join(map(str, searched))}", hint=by_hand)


def find_file(folder: Path, name: str) -> Path | None:
    """The file of that name in the folder, or the one with `.gz` after it.

    Raises `DataError` for a folder that is not accessible.
    """
    return next((file for file in (folder / name, folder / f"{name}.gz") if is_file(file)), None)


def places(name: str) -> list[Path]:
    """The folders where the files of the public data set `name` are looked for, in this order."""
    from fedrounds.fl_components.store.home import home  # loads the store

    configured = os.environ.get("FEDROUNDS_DATA")
    first = [expanded(configured, "FEDROUNDS_DATA").absolute() / name] if configured else []
    working = Path.cwd()
    return [*first, home() / "data" / name, working / "data" / name, working.parent / "shared" / "data" / name]
