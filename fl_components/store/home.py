"""The home folder: where everything that must outlive a process is kept."""

from __future__ import annotations

import os
from pathlib import Path

from fl_components.errors import StoreError

UNUSABLE = "%?"
"""What a path in the URL of a database would be read for something else."""


def home(path: Path | None = None) -> Path:
    """The home folder: `path`, or $FEDROUNDS_HOME, or ~/.fedrounds; made (0700) when it is not there.

    It is never the working folder, because a new folder must not be a new privacy budget.
    Raises `StoreError` when it cannot be made or written to.
    """
    configured = path if path is not None else os.environ.get("FEDROUNDS_HOME") or "~/.fedrounds"
    try:
        folder = Path(configured).expanduser().absolute()
        _check_path(folder)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise StoreError(
            f"the home folder {configured} cannot be made: {reason}",
            hint="set FEDROUNDS_HOME to a folder that this account may write to",
        ) from error
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise StoreError(
            f"the home folder {folder} cannot be written to",
            hint="give this account the right to write there, or set FEDROUNDS_HOME to another folder",
        )
    return folder


def _check_path(folder: Path) -> None:
    if unusable := sorted({sign for sign in str(folder) if sign in UNUSABLE or not sign.isprintable()}):
        raise StoreError(
            f"the home folder {str(folder)!r} has {', '.join(map(repr, unusable))} in its path, which the addresses of "
            "Prefect's and MLflow's databases cannot hold",
            hint="set FEDROUNDS_HOME to a folder without it",
        )
