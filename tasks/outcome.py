"""Outcome: how the work on a run or a sweep ended in this process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prefect.exceptions import TerminationSignal

from fedrounds.fl_components.errors import BudgetExhausted, FedroundsError, RunCancelled, TooFewClients, one_line
from fedrounds.fl_components.run_state import RunState


@dataclass(frozen=True, slots=True)
class Outcome:
    """The error that ended the work; None where all of it is done.

    >>> Outcome(None).state.value, Outcome(BudgetExhausted("the next round would cost too much")).state.value
    ('Completed', 'BudgetExhausted')
    """

    error: BaseException | None

    @property
    def is_success(self) -> bool:
        """Whether all of the work is done."""
        return self.error is None

    @property
    def state(self) -> RunState:
        """The state in which the run or the sweep is left."""
        match self.error:
            case None:
                return RunState.COMPLETED
            case RunCancelled() | KeyboardInterrupt() | TerminationSignal():
                return RunState.CANCELLED
            case TooFewClients():
                return RunState.TOO_FEW_CLIENTS
            case BudgetExhausted():
                return RunState.BUDGET_EXHAUSTED
            case _:
                return RunState.FAILED

    def error_data(self, run_id: str) -> dict[str, Any] | None:
        """Return the error as a run's row has it: its code, message and hint; None where there is none."""
        if self.error is None:
            return None
        if isinstance(self.error, FedroundsError):
            return self.error.as_data()
        if self.state is RunState.CANCELLED:
            return RunCancelled(f"run {run_id} was stopped").as_data()
        return {"code": "bug", "message": one_line(self.error), "hint": None}

    def check(self) -> None:
        """Raise the error that ended the work, if one did."""
        if self.error is not None:
            raise self.error
