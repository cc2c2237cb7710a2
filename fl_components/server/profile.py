"""Where the time of a run goes, as a trace that a viewer opens: https://ui.perfetto.dev, or chrome://tracing.

The format is the Trace Event Format (its "complete" events): https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fedrounds.fl_components.errors import ConfigError


class Profile:
    """Spans of time, each on the track of a process. Times are seconds since the epoch.

    >>> profile = Profile()
    >>> profile.add("train", "round 1", 10.0, 12.5)
    >>> profile.trace()["traceEvents"][-1]["dur"]
    2500000.0
    """

    def __init__(self) -> None:
        self._spans: list[tuple[str, str, float, float, int]] = []

    def add(self, name: str, category: str, began: float, ended: float, process: int | None = None) -> None:
        """A span of this process, or of another one by its id."""
        self._spans.append((name, category, began, ended, process or os.getpid()))

    def trace(self) -> dict[str, Any]:
        """The trace as plain data."""
        processes = sorted(
            {process for *_, process in self._spans}, key=lambda process: (process != os.getpid(), process)
        )
        names = [
            {
                "ph": "M",
                "name": "process_name",
                "pid": process,
                "args": {"name": "the run" if process == os.getpid() else f"training process {number}"},
            }
            for number, process in enumerate(processes, start=0 if os.getpid() in processes else 1)
        ]
        spans = [
            {
                "ph": "X",
                "name": name,
                "cat": category,
                "pid": process,
                "tid": process,
                "ts": began * 1e6,
                "dur": (ended - began) * 1e6,
            }
            for name, category, began, ended, process in self._spans
        ]
        return {"traceEvents": [*names, *spans], "displayTimeUnit": "ms"}

    def write(self, file: Path) -> None:
        """Write the trace to `file`. Raises `ConfigError` when that cannot be written."""
        try:
            file.write_text(json.dumps(self.trace()))
        except OSError as error:
            raise unwritable(file, error) from error


def check_writable(file: Path) -> None:
    """Raise `ConfigError` when no trace can be written to `file`: better before a long training than after."""
    existed = file.exists()
    try:
        with open(file, "a"):
            pass
        if not existed:
            file.unlink()
    except OSError as error:
        raise unwritable(file, error) from error


def unwritable(file: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"the profile cannot be written to {file}: {error.strerror or error}", hint="name a file in a folder of yours"
    )
