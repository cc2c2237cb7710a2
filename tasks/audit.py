"""The audit of a run's privacy mechanisms, and what MLflow keeps of it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

from fl_components.config import FederationConfig, parse_config
from fl_components.errors import ConfigError
from fl_components.privacy import CentralPrivacy
from fl_components.privacy.audit import AuditReport, accuses, audit
from fl_components.privacy.example_audit import ExampleAuditReport, audit_examples, step_of
from fl_components.privacy.example_audit import accuses as accuses_examples
from fl_components.server.hub import federation_of
from fl_components.store import RunRecord, Store, derived_key
from fl_components.training import one_thread
from tasks.tracking import server
from tasks.tracking.run_view import experiment_of

AUDIT_TAG: Final = "fedrounds.audit_of"

LONGER: Final = 10.0
"""Canary gradients than clipping allows, so that clipping is audited as well."""


@dataclass(frozen=True, slots=True)
class Audit:
    """What was found: about clients, about their examples, or both."""

    clients: AuditReport | None
    examples: ExampleAuditReport | None

    @property
    def accused(self) -> bool:
        about_clients = self.clients is not None and accuses(self.clients)
        return about_clients or (self.examples is not None and accuses_examples(self.examples))

    @property
    def verdict(self) -> str:
        return "; ".join(each.verdict for each in (self.clients, self.examples) if each is not None)

    def as_data(self) -> dict[str, Any]:
        """As plain values: about clients first, about examples in its place where nothing else was audited."""
        reports = [asdict(each) for each in (self.clients, self.examples) if each is not None]
        return reports[0] | {"examples": reports[1] if len(reports) > 1 else None}


def find_run(store: Store, run: str) -> RunRecord:
    """The run of that id, or the newest run of the experiment of that name that was charged. Raises `RunNotFound`."""
    newest = (each for each in store.runs(name=run) if each.spent or store.example_spending(each.run_id))
    return store.find_run(run) or next(newest, None) or store.run(run)


def audit_mechanism(store: Store, run: RunRecord, num_canaries: int) -> Audit:
    """Audit what each of the run's claims rests on, in a shadow of it: nobody takes part but canaries, which are made
    up, so that nothing is charged. Keys are fresh ones. Raises `ConfigError` for a run without a claim."""
    config = parse_config(run.config)
    if not config.claims:
        raise ConfigError(f"run {run.run_id} claims nothing: privacy.kind is none", hint="audit a run under a claim")
    federation = federation_of(store, run)
    sizes = [each.numel() for each in federation.module.parameters() if each.requires_grad]
    with one_thread():
        clients, about_examples = None, config.training.privacy.claims
        if isinstance(config.privacy, CentralPrivacy) and (federation.is_charged or not about_examples):
            rule = config.privacy.counting_for(federation.sampling.cohort_size)
            clients = audit(rule, sizes, _fresh_keys(), num_canaries=num_canaries)
        examples = _audit_examples(config, sum(sizes), num_canaries) if about_examples else None
    return Audit(clients, examples)


def _audit_examples(config: FederationConfig, num_parameters: int, num_canaries: int) -> ExampleAuditReport:
    """At the size of the run's model, or of a larger one where there would be no parameter for each canary."""
    rule = config.training.in_round(1, config.rounds).example_level
    assert rule is not None and rule.noise_multiplier is not None
    num_parameters, keys = max(num_parameters, num_canaries), _fresh_keys()
    release = step_of(rule, num_parameters, keys)
    return audit_examples(
        rule, rule.noise_multiplier, num_parameters, release, keys, num_canaries=num_canaries, length=LONGER
    )


def _fresh_keys() -> Callable[[str], bytes]:
    return partial(derived_key, secrets.token_bytes(32))


def show_audit(store: Store, run: RunRecord, found: Audit) -> str:
    """Keep an audit in MLflow, as a run of the audited run's experiment; returns its id."""
    with server.quiet():
        uri = server.tracking_uri(store.home)
        client = server.connect(uri)
        experiment_id = experiment_of(client, run.name, server.artifact_location(uri, store.home))
        tags = {AUDIT_TAG: run.run_id, "verdict": found.verdict, "accused": str(found.accused).lower()}
        shown = client.create_run(experiment_id, run_name=f"audit of {run.run_id}", tags=tags).info.run_id
        for name, value in _metrics(found).items():
            client.log_metric(shown, f"audit/{name}", value, timestamp=round(time.time() * 1000))
        client.log_dict(shown, found.as_data(), "audit.json")
        client.set_terminated(shown)
    return str(shown)


def _metrics(found: Audit) -> dict[str, float]:
    metrics: dict[str, float] = {}
    if found.clients is not None:
        low, high = found.clients.epsilon_interval
        metrics = {
            "claimed_epsilon": found.clients.claimed_epsilon,
            "epsilon_low": low,
            "epsilon_high": high,
            "epsilon_lower_bound": found.clients.epsilon_lower_bound,
            "mean_cosine": found.clients.mean_cosine,
        }
    if found.examples is not None:
        metrics |= {
            "example/claimed_epsilon": found.examples.claimed_epsilon,
            "example/epsilon_lower_bound": found.examples.epsilon_lower_bound,
            "example/p_value": found.examples.p_value,
        }
    return metrics
