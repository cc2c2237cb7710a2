"""Everything that fedrounds raises on purpose.

    FedroundsError                     exit code
    ├── ConfigError                    2   the configuration makes no sense; says which field and the mend
    ├── DataError                      2   a data file or a user's data function is not usable
    ├── ModelError                     2   the model cannot be trained, or does not fit the data
    ├── RunConflict                    2   this run id belongs to another configuration
    ├── RunNotFound                    2   no such run in this store
    ├── Unreachable                    3   a server that is needed does not answer
    ├── NotInstalled                   3   a server command on a base install
    ├── StoreError                     1   the durable state cannot be read or written
    │   ├── BudgetNotSet               2   a population that no administrator has given a budget
    │   ├── CorruptBlob                1   a blob's content does not match its name
    │   ├── JournalBroken              1   the journal's chain does not verify
    │   ├── LeaseHeld                  1   another process is working on this run
    │   └── LeaseLost                  1   another process has taken this run over
    ├── RunFailed                      1   the run stopped; a resume may succeed
    │   └── Diverged                   1   the server's new state is not finite: no resume can succeed
    ├── RunCancelled                   1   stopped on request; can be resumed
    ├── WireError                      1   bytes that are no frame (docs/wire-format.md), or that hold something else
    ├── UpdateRejected                 1   one client's update, with the reason; the round goes on without it
    ├── TooFewClients                  4   fewer usable updates than `selection.min_updates`
    └── BudgetExhausted                5   the round would cost more than its population has left

Every error carries `code` (a stable word for programs), `hint` (what would mend it, or None) and `exit_code`.
"""

from __future__ import annotations

import re
from typing import ClassVar

from fedrounds.fl_components.redaction import redact
from fedrounds.fl_components.rejections import Rejection


class FedroundsError(Exception):
    """An error with one sentence for people, a `code` for programs and, where there is one, a remedy.

    Passwords are taken out of both texts, and both can be written as UTF-8.

    >>> error = ConfigError("training.learning_rate is 0: nothing would be learnt", hint="give a rate above 0")
    >>> (error.code, error.exit_code, error.hint)
    ('configuration', 2, 'give a rate above 0')
    """

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.message = printable(redact(message))
        self.hint = None if hint is None else printable(redact(hint))
        super().__init__(self.message)

    def as_data(self) -> dict[str, str | None]:
        """Return the error as a run's row and `--json` have it: its code, message and hint."""
        return {"code": self.code, "message": self.message, "hint": self.hint}


class ConfigError(FedroundsError):
    code, exit_code = "configuration", 2


class DataError(FedroundsError):
    code, exit_code = "data", 2


class ModelError(FedroundsError):
    code, exit_code = "model", 2


class RunConflict(FedroundsError):
    code, exit_code = "run_conflict", 2


class RunNotFound(FedroundsError):
    code, exit_code = "run_not_found", 2


class Unreachable(FedroundsError):
    code, exit_code = "unreachable", 3


class NotInstalled(FedroundsError):
    code, exit_code = "not_installed", 3


class StoreError(FedroundsError):
    code = "store"


class BudgetNotSet(StoreError):
    code, exit_code = "budget_not_set", 2


class CorruptBlob(StoreError):
    code = "corrupt_blob"


class JournalBroken(StoreError):
    code = "journal_broken"


class LeaseHeld(StoreError):
    code = "lease_held"


class LeaseLost(StoreError):
    code = "lease_lost"


class RunFailed(FedroundsError):
    code = "run_failed"


class Diverged(RunFailed):
    code = "diverged"


class RunCancelled(FedroundsError):
    code = "cancelled"


class WireError(FedroundsError):
    code = "wire"


class UpdateRejected(FedroundsError):
    code = "update_rejected"

    def __init__(self, rejection: Rejection) -> None:
        super().__init__(str(rejection))
        self.rejection = Rejection(rejection.code, printable(redact(rejection.detail)))

    def __reduce__(self) -> tuple[type[UpdateRejected], tuple[Rejection]]:
        return type(self), (self.rejection,)  # for pickle: the other errors are made from a sentence


class TooFewClients(FedroundsError):
    code, exit_code = "too_few_clients", 4


class BudgetExhausted(FedroundsError):
    code, exit_code = "budget_exhausted", 5


class PluginSkipped(UserWarning):
    """A rule of another package cannot be used."""


def printable(text: str) -> str:
    """Return text with an escape in place of what is not Unicode, such as the bytes of a file name that is not UTF-8.

    >>> print(printable("K\\udcf6ln.csv"))
    K\\udcf6ln.csv
    """
    return text.encode(errors="backslashreplace").decode()


def one_line(error: BaseException) -> str:
    """An error of somebody else's code, for a sentence of ours.

    >>> one_line(ValueError("no such\\n  column"))
    'ValueError: no such column'
    """
    try:
        text = str(error)
    except Exception:  # the error has a __str__ of its own that fails
        text = ""
    words = _LONG_WORD.sub(_shortened, printable(redact(" ".join(text.split()))))
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


_LONG_WORD = re.compile(r"\S{2001,}")


def _shortened(word: re.Match[str]) -> str:
    """The beginning of a long word, such as the bytes of a file in hexadecimal digits, and its length."""
    return f"{word[0][:100]}... ({len(word[0])} characters)"
