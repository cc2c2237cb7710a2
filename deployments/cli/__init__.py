"""`fedrounds`, the command line. `main` is the console script."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (without the program's name) and return its exit code.

    0 done, 1 the run failed, 2 usage or configuration, 3 unreachable or not allowed, 4 too few clients, 5 budget
    exhausted, 70 a bug, 130 stopped by Ctrl-C.
    """
    from fedrounds.deployments.cli.screen import CliOutput, make_streams_writable, show_left_out_as_a_line, use_utf8

    if argv is None:
        use_utf8()
    make_streams_writable()
    os.umask(0o077)  # what MLflow and Prefect write into the home is for this account alone, as our own files are
    show_left_out_as_a_line()
    tokens = list(sys.argv[1:] if argv is None else argv)
    with CliOutput(as_json="--json" in tokens) as screen:
        from fedrounds.deployments.cli.app import run

        return run([token for token in tokens if token != "--json"], screen)
