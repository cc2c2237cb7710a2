"""The home folder: where everything that must outlive a process is kept."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from fedrounds.fl_components.errors import ConfigError, StoreError
from fedrounds.fl_components.store.durable_files import make_folder

UNUSABLE = "%?"
"""What a path in the URL of a database would be read for something else."""


def home(path: Path | None = None) -> Path:
    """Return the home folder: `path`, or $FEDROUNDS_HOME, or ~/.fedrounds. It is created (0700) where it is missing.

    It never depends on the working folder, because a new folder must not be a new privacy budget.

    Raises `ConfigError` when $FEDROUNDS_HOME is a relative path, and `StoreError` when the folder cannot be created or
    written to, or when other accounts may enter it: it holds what privacy claims withhold.
    """
    configured = path if path is not None else os.environ.get("FEDROUNDS_HOME") or "~/.fedrounds"
    try:
        folder = Path(configured).expanduser()
        if path is None and not folder.is_absolute():
            raise ConfigError(
                f"FEDROUNDS_HOME is the relative path {str(configured)!r}, which is another home, with other privacy "
                "budgets, in each working folder",
                hint=f"set FEDROUNDS_HOME={folder.absolute()}",
            )
        folder = folder.absolute()
        _check_path(folder)
        make_folder(folder, 0o700)
        mode = folder.stat().st_mode & 0o777
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise StoreError(
            f"the home folder {configured} cannot be made: {reason}",
            hint="set FEDROUNDS_HOME to a folder that this account may write to",
        ) from error
    if mode & 0o077:
        raise StoreError(
            f"the home folder {folder} has the mode {mode:04o}: other accounts may enter it, and it holds what privacy "
            "claims withhold",
            hint=f"chmod 700 {shlex.quote(str(folder))}; or, where that is not yours to change (a mounted volume), set "
            f"FEDROUNDS_HOME={shlex.quote(str(folder / 'fedrounds'))}, which is then created with the right mode",
        )
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
