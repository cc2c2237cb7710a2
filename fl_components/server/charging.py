"""What a run's rounds are charged, and whether its accounts can pay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from fedrounds.fl_components.errors import BudgetExhausted
from fedrounds.fl_components.privacy.releases import Release, public
from fedrounds.fl_components.reports import privacy_report
from fedrounds.fl_components.server.run import Run
from fedrounds.fl_components.store import Charges

T = TypeVar("T")


def charges_of_round(run: Run, cohort: Sequence[int]) -> list[Charges]:
    """Return what a round with the clients of these indices costs under each claim.

    All clients are charged where it must not be shown who was selected: what each has spent is shown. Clients that
    have no budget yet get one here.
    """
    indices = range(run.federation.population.size) if run.federation.hides_participation else cohort
    requests = [claim.charges(indices) for claim in run.claims]
    accounts = {account for request in requests for account in request.events if account.client is not None}
    run.store.ledger.register(accounts)
    return requests


def check_budget(run: Run) -> None:
    """Raise `BudgetExhausted` when the next round would be refused, so that no view shows it as one that failed.

    The reservation itself decides.
    """
    round = run.refresh().committed_round + 1
    if not run.claims or run.store.ledger.is_reserved(run.run_id, round):  # by an attempt that ended
        return
    cohort: list[int] = []
    if any(claim.is_paid_by_clients for claim in run.claims):
        cohort = run.federation.select(round, run.participations, run.source(round)).tolist()
    charge_payers(run, charges_of_round(run, cohort), lambda charges: run.store.ledger.check(run.run_id, charges))


def charge_payers(run: Run, charges: Sequence[Charges], act: Callable[[Sequence[Charges]], T]) -> T:
    """Return what `act` returns for the charges of a round.

    Where too few of the cohort can pay, but enough other clients can, `act` gets charges of no client.

    Raises:
      BudgetExhausted: too few clients can pay.
    """
    try:
        return act(charges)
    except BudgetExhausted:
        can_skip = [claim.can_skip_round(run.store) for claim in run.claims]
        if not any(can_skip):
            raise
        pairs = zip(charges, can_skip, strict=True)
        return act([replace(charge, events={}, least=0) if is_skipped else charge for charge, is_skipped in pairs])


def epsilons(run: Run) -> dict[str, Release]:
    """Return what the run has spent with the current round, and what its accounts have left."""
    record = run.refresh()
    report = privacy_report(run.store, record, run.config, rounds=record.committed_round + 1)
    return {name: public(value) for name, value in report.metrics.items()}
