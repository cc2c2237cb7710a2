"""The audit of a run's privacy mechanism as a Prefect flow: one that accuses it fails, so that a schedule tells."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from prefect import State, flow, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed

from fl_components.privacy.audit import accuses
from fl_components.store import Store
from tasks.audit import audit_mechanism, find_run, show_audit


@flow(name="privacy-audit", flow_run_name="audit of {run}", persist_result=False, validate_parameters=False)
def privacy_audit(run: str, num_canaries: int = 1000) -> State[Any]:
    """Measure how much noise the mechanism of a run really adds.

    Args:
        run: the id of a run under a privacy claim, or the name of an experiment: its newest run.
        num_canaries: how many are drawn; about half of them join. More see more.
    """
    with Store.open() as store:
        audited = find_run(store, run)
        decorate: Any = task(cache_policy=NO_CACHE, persist_result=False)
        report = decorate(audit_mechanism)(store, audited, num_canaries)
        shown = decorate(show_audit)(store, audited, report)
    found = {"run_id": audited.run_id, "accused": accuses(report), "mlflow_run_id": shown, **asdict(report)}
    if accuses(report):
        return Failed(name="Accused", message=report.verdict, data=found)
    return Completed(message=report.verdict, data=found)
