"""Where the files of public data sets are looked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fl_components.errors import DataError


def find_folder(name: str, files: Sequence[str], folder: str | None = None) -> Path:
    """The folder that holds the files of the public data set `name`, each perhaps with `.gz` after its name.

    It is `folder`, where the configuration names one; otherwise the first that has them all of $FEDROUNDS_DATA/NAME,
    HOME/data/NAME (HOME: the home folder of fedrounds), data/NAME and ../shared/data/NAME in the working folder.
    Raises `DataError` that lists the files and says where to put them.
    """
    places = _places(name) if folder is None else [Path(folder).expanduser()]
    for place in places:
        missing = [file for file in files if find_file(place, file) is None]
        if not missing:
            return place
        if len(missing) < len(files):
            raise DataError(
                f"{place} has some files of {name} and not {' and not '.join(missing)}",
                hint=f"put {'it' if len(missing) == 1 else 'them'} there, as is or with .gz after the name",
            )
    listed = f"{', '.join(files[:-1])} and {files[-1]}"
    elsewhere = "" if folder is not None else ", or say as data.folder where they are"
    raise DataError(
        f"the files of {name} are not in {' or '.join(str(place) for place in places)}",
        hint=f"put {listed} into {places[0]}, as they are or with .gz after the name{elsewhere}",
    )


def find_file(folder: Path, name: str) -> Path | None:
    """The file of that name in the folder, or the one with `.gz` after it."""
    return next((file for file in (folder / name, folder / f"{name}.gz") if file.is_file()), None)


def _places(name: str) -> list[Path]:
    from fl_components.store.home import home  # loads the store

    configured = os.environ.get("FEDROUNDS_DATA")
    places = [Path(configured).expanduser().absolute() / name] if configured else []
    working = Path.cwd()
    return [*places, home() / "data" / name, working / "data" / name, working.parent / "shared" / "data" / name]
