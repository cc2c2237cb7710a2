"""The states of a run, as the store keeps them and as people see them."""

from __future__ import annotations

from enum import StrEnum


class RunState(StrEnum):
    """A run is `PENDING` before its first attempt and `RUNNING` during one; then it is in a final state.

    `INTERRUPTED` is never stored: it is how a run is shown whose process died. Of a `DELETED` run only the row is kept:
    its charges count for ever, and its descendants name it.

    >>> RunState.COMPLETED.is_finished, RunState.CANCELLED.is_finished, RunState.CANCELLED.is_final
    (True, False, True)
    """

    PENDING = "Pending"
    RUNNING = "Running"
    INTERRUPTED = "Interrupted"
    COMPLETED = "Completed"
    BUDGET_EXHAUSTED = "BudgetExhausted"
    TOO_FEW_CLIENTS = "TooFewClients"
    CANCELLED = "Cancelled"
    FAILED = "Failed"
    DELETED = "Deleted"

    @property
    def is_final(self) -> bool:
        """Whether an attempt ends in this state."""
        return self in FINAL_STATES

    @property
    def is_finished(self) -> bool:
        """Whether it is a final state that leaves nothing to resume."""
        return self in FINISHED_STATES


FINISHED_STATES = (RunState.COMPLETED, RunState.BUDGET_EXHAUSTED)
FINAL_STATES = (*FINISHED_STATES, RunState.TOO_FEW_CLIENTS, RunState.CANCELLED, RunState.FAILED)
