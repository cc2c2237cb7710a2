"""The audit of a run's privacy mechanisms, and what MLflow keeps of it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedrounds.fl_components.arrays import Float32
from fedrounds.fl_components.config import parse_config
from fedrounds.fl_components.errors import ConfigError, RunNotFound
from fedrounds.fl_components.privacy.audit import MIN_CANARIES, AuditReport, audit_releases, violates_claim
from fedrounds.fl_components.privacy.central_audit import audit_central
from fedrounds.fl_components.randomness import hkdf
from fedrounds.fl_components.run_state import RunState
from fedrounds.fl_components.server.federation import Federation
from fedrounds.fl_components.server.opening import federation_of
from fedrounds.fl_components.store import RunRecord, Store
from fedrounds.fl_components.training import CanaryClient, one_thread
from fedrounds.tasks.tracking import server
from fedrounds.tasks.tracking.run_view import experiment_of

AUDIT_TAG: Final = "fedrounds.audit_of"

PUBLIC_ROWS: Final = 300
"""At most, beside the canaries of each step: enough that what a step makes of an example in the place of another shows
in many of them."""


@dataclass(frozen=True, slots=True)
class Audit:
    """The reports about clients, about their examples, or both."""

    clients: AuditReport | None
    examples: AuditReport | None

    @property
    def claim_violated(self) -> bool:
        return any(violates_claim(each) for each in (self.clients, self.examples) if each is not None)

    @property
    def verdict(self) -> str:
        return "; ".join(each.verdict for each in (self.clients, self.examples) if each is not None)

    def as_data(self) -> dict[str, Any]:
        """As plain values: about clients first, about examples in its place where nothing else was audited."""
        reports = [asdict(each) for each in (self.clients, self.examples) if each is not None]
        return reports[0] | {"examples": reports[1] if len(reports) > 1 else None}


def auditable_run(store: Store, run: str, num_canaries: int) -> RunRecord:
    """The run of that id, or the newest run of the experiment of that name that was charged.

    Raises `RunNotFound`; `ConfigError` for a run without a claim, an experiment none of whose runs was charged, and too
    few canaries.
    """
    if num_canaries < MIN_CANARIES:
        raise ConfigError(
            f"{num_canaries} canaries are too few for an audit", hint=f"draw at least {MIN_CANARIES} canaries"
        )
    of_experiment = store.runs(name=run)
    charged = (each for each in of_experiment if store.ledger.spent(each.run_id))
    found = store.find_run(run) or next(charged, None)
    if found is None and of_experiment:
        raise ConfigError(
            f"no run of experiment {run!r} was charged for a privacy claim", hint="audit a run under a claim"
        )
    found = found or store.run(run)
    if found.state == RunState.DELETED:
        raise RunNotFound(f"run {run!r} was deleted", hint="`fedrounds runs` lists those that can be audited")
    config = parse_config(found.config)
    if not config.claims:
        raise ConfigError(f"run {found.run_id} claims nothing: privacy.kind is none", hint="audit a run under a claim")
    if config.central is None and config.training.example_level is None:
        raise ConfigError(
            f"run {found.run_id} makes the claim {config.claims_made[0].kind}, for which there is no audit",
            hint="audit a run under the claim central or example_level",
        )
    return found


def audit_mechanism(store: Store, run: RunRecord, num_canaries: int) -> Audit:
    """Audit what each claim of the `auditable_run` rests on, in a shadow of it: nobody takes part but canaries and
    public rows, so that nothing is charged. Keys are fresh ones."""
    config = parse_config(run.config)
    federation = federation_of(store, run)
    sizes = [each.numel() for each in federation.module.parameters() if each.requires_grad]
    with one_thread():
        clients, about_examples = None, config.training.example_level is not None
        central = config.central
        if central is not None and (central.is_charged or not about_examples):
            rule = central.resolve_count_noise(federation.sampling.cohort_size)
            clients = audit_central(rule, sizes, _fresh_keys(), num_canaries=num_canaries)
        examples = _audit_examples(federation, num_canaries) if about_examples else None
    return Audit(clients, examples)


def _audit_examples(federation: Federation, num_canaries: int) -> AuditReport:
    config, keys = federation.config, _fresh_keys()
    rule = config.training.resolve(1, config.rounds)
    private = rule.example_level
    assert private is not None and private.noise_multiplier is not None
    shadow = CanaryClient(federation.module, federation.public_rows(min(PUBLIC_ROWS, num_canaries)), rule, num_canaries)

    def release(joined_M: NDArray[np.bool_], number: int) -> Float32:
        return shadow.step(joined_M, keys(f"step {number}"))[-num_canaries:]

    return audit_releases(
        release,
        keys,
        noise_multiplier=private.noise_multiplier,
        delta=private.delta,
        num_parameters=shadow.num_parameters,
        num_canaries=num_canaries,
    )


def _fresh_keys() -> Callable[[str], bytes]:
    return partial(hkdf, secrets.token_bytes(32))


def show_audit(store: Store, run: RunRecord, found: Audit) -> str:
    """Keep an audit in MLflow, as a run of the audited run's experiment; returns its id."""
    with server.quiet():
        uri = server.tracking_uri(store.home)
        client = server.connect(uri)
        experiment_id = experiment_of(client, run.name, server.artifact_location(uri, store.home))
        tags = {AUDIT_TAG: run.run_id, "verdict": found.verdict, "claim_violated": str(found.claim_violated).lower()}
        shown = client.create_run(experiment_id, run_name=f"audit of {run.run_id}", tags=tags).info.run_id
        for name, value in _metrics(found).items():
            client.log_metric(shown, f"audit/{name}", value, timestamp=round(time.time() * 1000))
        client.log_dict(shown, found.as_data(), "audit.json")
        client.set_terminated(shown)
    return str(shown)


def _metrics(found: Audit) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for prefix, report in (("", found.clients), ("example/", found.examples)):
        if report is not None:
            names = ("claimed_epsilon", "epsilon_lower_bound", "p_value", "mean_cosine")
            values = {name: getattr(report, name) for name in names}
            values["epsilon_low"], values["epsilon_high"] = report.epsilon_interval or (None, None)
            metrics |= {prefix + name: value for name, value in values.items() if value is not None}
    return metrics
