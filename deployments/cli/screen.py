"""What leaves the program: words for people, or with `--json` exactly one object on stdout."""

from __future__ import annotations

import codecs
import io
import json
import math
import os
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from rich.console import Console, RenderableType
from rich.text import Text

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class CommandResult:
    """What a command found: `data` for programs and `view` for people (a str is printed as it is)."""

    data: Any
    view: RenderableType


def show_left_out_as_a_line() -> None:
    """The warning about another package's rule is for people: without Python's file name and line of code."""
    in_full = warnings.formatwarning

    def formatted(message: Warning | str, category: type[Warning], *where: Any, **line: Any) -> str:
        from fedrounds.fl_components.errors import (
            PluginSkipped,  # not before the command has looked at what shadows our packages
        )

        plain = issubclass(category, PluginSkipped)
        return f"Warning: {message}\n" if plain else in_full(message, category, *where, **line)

    warnings.formatwarning = formatted


def use_utf8() -> None:
    """Start this program anew in Python's UTF-8 mode, where the locale would read file names and files as ASCII, say.

    The streams keep the encoding that the terminal has.
    """
    if sys.flags.utf8_mode or sys.getfilesystemencoding() == "utf-8" or "utf8" in sys._xoptions:
        return
    streams = getattr(sys.stdout, "encoding", None) or "ascii"
    variables = {"PYTHONUTF8": "1", "PYTHONIOENCODING": os.environ.get("PYTHONIOENCODING") or streams}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | variables)


def make_streams_writable() -> None:
    """Let everything be printed: to a stream that is not UTF-8, and to one that is closed (`>&-`).

    A closed descriptor is opened again, on nothing. Else the next file to be opened, a database say, would take its
    number and get what is meant for people.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if name == "stdin" else "w", encoding="utf-8", closefd=False))  # noqa: SIM115
    codecs.register_error("nearest", _nearest)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="nearest")


_NEAREST = str.maketrans("█▉▊▋▌▍▎▏░│└─┌┐┘╭╮╰╯├┤•–—…‘’“”×≤≥±", "######||.|+-+++++++++*--.''\"\"x<>~")  # noqa: RUF001


def _nearest(error: UnicodeError) -> tuple[str, int]:
    """What a stream's encoding lacks: the nearest sign for our bars and frames, else a question mark."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end].translate(_NEAREST)
    return "".join(sign if sign.isascii() else "?" for sign in missing), error.end


class PipeConsole(Console):
    """A console whose reader may go away: `fedrounds train c.yaml | head` must not end the training."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        discard_output(self.file)


def discard_output(stream: IO[str]) -> None:
    """Redirect a stream that cannot be written to the null device, with what its buffer still holds.

    Otherwise Python fails to flush it as the process ends, and exits with 120.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class CliOutput:
    """Owns stdout and stderr for one command.

    Without `--json` results go to stdout and errors to stderr. With it, whatever anything prints (progress, a user's
    data function, MLflow, a child process) goes to stderr, and on exit one object goes to stdout:
    `{"schema": 1, "status": "ok", "data": ...}` or
    `{"schema": 1, "status": "error", "error": {"code", "message", "hint"}}`.
    """

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        # Words are shown as they are: a name with brackets is not markup.
        self.console = PipeConsole(
            file=sys.stderr if as_json else sys.stdout, markup=False, emoji=False, highlight=False
        )
        self.errors = PipeConsole(file=sys.stderr, markup=False, emoji=False, highlight=False)
        self.resumable: str | None = None  # the id of the run under way
        self._reply: dict[str, Any] | None = None
        self._redirects = ExitStack()

    def __enter__(self) -> CliOutput:
        if self.as_json:
            sys.stdout.flush()
            # Both levels: Python's name for what prints here, the descriptor for child processes and C libraries.
            stdout_fd = os.dup(1)
            self._redirects.callback(os.close, stdout_fd)
            self._redirects.callback(os.dup2, stdout_fd, 1)
            os.dup2(2, 1)
            self._redirects.enter_context(redirect_stdout(sys.stderr))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._redirects.close()
        if self._reply is None:
            return
        try:
            print(json.dumps(_finite(self._reply), allow_nan=False), flush=True)
        except OSError as problem:
            discard_output(sys.stdout)
            if not isinstance(problem, BrokenPipeError):  # else the reader has what it wanted
                self.fail("store", f"the output cannot be written: {problem.strerror}", None, exit_code=1)
                raise SystemExit(1) from problem

    def answer(self, answer: CommandResult) -> None:
        """Give a command's result."""
        if self.as_json:
            self._reply = {"schema": SCHEMA, "status": "ok", "data": answer.data}
        else:
            self.show(answer.view)

    def show(self, view: RenderableType) -> None:
        """Print for people. Tables keep to the width; lines of text, such as a long link, stay whole.

        Raises `StoreError` when the output cannot be written (its disk is full).
        """
        try:
            self.console.print(view, soft_wrap=True)
        except OSError as error:
            from fedrounds.fl_components.errors import StoreError

            discard_output(self.console.file)
            raise StoreError(f"the output cannot be written: {error.strerror}") from error

    def fail(self, code: str, message: str, hint: str | None, *, exit_code: int, label: str = "Error") -> int:
        """Say what went wrong and what would mend it; returns `exit_code`."""
        words = Text.assemble((f"{label}: ", "bold red"), message)
        if hint:
            words.append("\n" + "Hint: ".ljust(len(label) + 2), style="bold")
            words.append(hint)
        self.errors.print(words, soft_wrap=True)
        if self.as_json:
            error = {"code": code, "message": message, "hint": hint}
            self._reply = {"schema": SCHEMA, "status": "error", "error": error}
        return exit_code

    def resume_hint(self) -> str | None:
        """How to resume the current run; None when none has begun."""
        return f"resume it with: fedrounds resume {self.resumable}" if self.resumable else None

    def bug(self, error: Exception) -> int:
        """An exception that nobody foresaw: the traceback goes to a file, its place to the reader."""
        from fedrounds.fl_components.errors import one_line
        from fedrounds.fl_components.redaction import redact

        path = _write_traceback(redact("".join(traceback.format_exception(error))))
        return self.fail(
            "bug",
            f"this is a bug in fedrounds: {one_line(error)}",
            f"please report it together with {path}, which has the traceback",
            exit_code=70,
        )


def _write_traceback(text: str) -> Path:
    name = f"bug-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}.log"
    try:
        from fedrounds.fl_components.store.home import home

        folder = home() / "logs"
        folder.mkdir(mode=0o700, exist_ok=True)
        path = folder / name
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except Exception:  # the home folder may be what is broken: a bug must be reported all the same
        path = Path(tempfile.mkdtemp(prefix="fedrounds-")) / name
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path


def _finite(value: Any) -> Any:
    """`value` with null for every NaN and infinity, which JSON does not have.

    >>> _finite({"loss": float("nan"), "rounds": [1, 2.5]})
    {'loss': None, 'rounds': [1, 2.5]}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
