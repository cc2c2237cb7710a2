"""The audit of a run's privacy mechanism as a Prefect flow, which fails where the claim is violated."""

from __future__ import annotations

from typing import Any

from prefect import State, flow, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed

from fedrounds.fl_components.store import Store
from fedrounds.tasks.audit import audit_mechanism, auditable_run, show_audit


@flow(name="privacy-audit", flow_run_name="audit of {run}", persist_result=False, validate_parameters=False)
def privacy_audit(run: str, num_canaries: int = 1000) -> State[Any]:
    """Measure how much noise the mechanisms of a run really add.

    Args:
        run: the id of a run under a privacy claim, or the name of an experiment: its newest run.
        num_canaries: how many are drawn; about half of them join. More see more.
    """
    with Store.open() as store:
        audited = auditable_run(store, run, num_canaries)
        decorate: Any = task(cache_policy=NO_CACHE, persist_result=False)
        audit = decorate(audit_mechanism)(store, audited, num_canaries)
        shown = decorate(show_audit)(store, audited, audit)
    found = {
        "run_id": audited.run_id,
        "claim_violated": audit.claim_violated,
        "mlflow_run_id": shown,
        **audit.as_data(),
    }
    if audit.claim_violated:
        return Failed(name="ClaimViolated", message=audit.verdict, data=found)
    return Completed(message=audit.verdict, data=found)
