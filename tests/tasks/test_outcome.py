"""How work ended: one value for the store, Prefect and the command line."""

from __future__ import annotations

import pytest
from prefect.exceptions import TerminationSignal

from fedrounds.fl_components.errors import BudgetExhausted, RunCancelled, RunFailed, TooFewClients
from fedrounds.fl_components.run_state import RunState
from fedrounds.tasks.outcome import Outcome


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        (RunCancelled("asked to stop"), RunState.CANCELLED, "cancelled"),
        (KeyboardInterrupt(), RunState.CANCELLED, "cancelled"),
        (TerminationSignal(signal=15), RunState.CANCELLED, "cancelled"),
        (TooFewClients("2 of 3"), RunState.TOO_FEW_CLIENTS, "too_few_clients"),
        (BudgetExhausted("no more"), RunState.BUDGET_EXHAUSTED, "budget_exhausted"),
        (RunFailed("the disk is full"), RunState.FAILED, "run_failed"),
        (ZeroDivisionError("division by zero"), RunState.FAILED, "bug"),
    ],
)
def test_every_error_has_a_state_and_a_code(error: BaseException, state: RunState, code: str) -> None:
    outcome = Outcome(error)
    data = outcome.error_data("r")
    assert not outcome.is_success and outcome.state is state and state.is_final
    assert data is not None and data["code"] == code and data["message"]
    with pytest.raises(type(error)):
        outcome.check()


def test_work_that_is_done() -> None:
    outcome = Outcome(None)
    outcome.check()
    assert (outcome.is_success, outcome.state, outcome.error_data("r")) == (True, RunState.COMPLETED, None)
