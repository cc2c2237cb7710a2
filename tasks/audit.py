"""The audit of a run's privacy mechanism, and what MLflow keeps of it."""

from __future__ import annotations

import secrets
import time
from dataclasses import asdict
from functools import partial

from fl_components.config import parse_config
from fl_components.errors import ConfigError
from fl_components.privacy import CentralPrivacy
from fl_components.privacy.audit import AuditReport, accuses, audit
from fl_components.server.hub import federation_of
from fl_components.store import RunRecord, Store, derived_key
from fl_components.training import one_thread
from tasks.tracking import server
from tasks.tracking.run_view import experiment_of

AUDIT_TAG = "fedrounds.audit_of"


def find_run(store: Store, run: str) -> RunRecord:
    """The run of that id, or the newest run of the experiment of that name that was charged. Raises `RunNotFound`."""
    newest = (each for each in store.runs(name=run) if each.spent)
    return store.find_run(run) or next(newest, None) or store.run(run)


def audit_mechanism(store: Store, run: RunRecord, num_canaries: int) -> AuditReport:
    """Audit one release of the run's mechanism at the size of its model, in a shadow of it: no client but canaries,
    whose updates are random, so that nothing is charged. Keys are fresh ones. Raises `ConfigError` for a run without a
    claim."""
    config = parse_config(run.config)
    if not isinstance(config.privacy, CentralPrivacy):
        raise ConfigError(f"run {run.run_id} claims nothing: privacy.kind is none", hint="audit a run under a claim")
    federation = federation_of(store, run)
    sizes = [each.numel() for each in federation.module.parameters() if each.requires_grad]
    rule = config.privacy.counting_for(federation.sampling.cohort_size)
    with one_thread():
        return audit(rule, sizes, partial(derived_key, secrets.token_bytes(32)), num_canaries=num_canaries)


def show_audit(store: Store, run: RunRecord, report: AuditReport) -> str:
    """Keep a report in MLflow, as a run of the audited run's experiment; returns its id."""
    with server.quiet():
        uri = server.tracking_uri(store.home)
        client = server.connect(uri)
        experiment_id = experiment_of(client, run.name, server.artifact_location(uri, store.home))
        tags = {AUDIT_TAG: run.run_id, "verdict": report.verdict, "accused": str(accuses(report)).lower()}
        shown = client.create_run(experiment_id, run_name=f"audit of {run.run_id}", tags=tags).info.run_id
        values = {
            "claimed_epsilon": report.claimed_epsilon,
            "epsilon_low": report.epsilon_interval[0],
            "epsilon_high": report.epsilon_interval[1],
            "epsilon_lower_bound": report.epsilon_lower_bound,
            "mean_cosine": report.mean_cosine,
        }
        for name, value in values.items():
            client.log_metric(shown, f"audit/{name}", value, timestamp=round(time.time() * 1000))
        client.log_dict(shown, asdict(report), "audit.json")
        client.set_terminated(shown)
    return str(shown)
