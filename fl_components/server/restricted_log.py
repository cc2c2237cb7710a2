"""What a privacy claim about private data keeps from all views, in a place that administrators alone may read."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

from fedrounds.fl_components.errors import FedroundsError, RunFailed, one_line


def withhold(home: Path, run_id: str, text: str) -> str:
    """Write a line into the file of what a run withholds. Says where it is, or that it could not be written."""
    file = home / "withheld" / f"{run_id}.log"
    try:
        file.parent.mkdir(mode=0o700, exist_ok=True)
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w") as out:
            out.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {text}\n")
    except OSError as error:
        return f"it could not be written to {file}: {error.strerror}"
    return f"an administrator reads {file}"


def withheld_error(home: Path, run_id: str, what: str, error: Exception) -> FedroundsError:
    """An error of the same kind, which says no more than what failed."""
    told = error.message if isinstance(error, FedroundsError) else one_line(error)
    kind = type(error) if isinstance(error, FedroundsError) else RunFailed
    where = withhold(home, run_id, f"{what}: {told}")
    return kind(f"{what} failed; why is withheld under the privacy claim", hint=where)
