"""Open a run: create it or take hold of it, once everything is loaded and checked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from fedrounds.fl_components.arrays import Float32
from fedrounds.fl_components.config import FederationConfig, config_digest, is_moved, parse_config
from fedrounds.fl_components.errors import ConfigError, Diverged, ModelError, RunConflict, RunNotFound
from fedrounds.fl_components.run_state import RunState
from fedrounds.fl_components.server.assembly import assemble
from fedrounds.fl_components.server.claim import check_population, delta_warnings, join_population
from fedrounds.fl_components.server.federation import Federation
from fedrounds.fl_components.server.history import forget_keys, open_secret
from fedrounds.fl_components.server.restricted_log import withheld_error
from fedrounds.fl_components.server.row_digests import changed_clients, data_facts, digest_key
from fedrounds.fl_components.server.run import Listener, Run, ignore
from fedrounds.fl_components.store import (
    RunRecord,
    RunSecret,
    Store,
    can_never_continue,
    check_run_id,
    home,
    place_of_secrets,
)
from fedrounds.fl_components.training import engine_environment
from fedrounds.fl_components.values import ServerState

Start = Callable[[Federation], tuple[Float32 | None, str | None]]
"""Returns the parameters that a new run starts from (None: the initial ones) and the ancestor they are of."""

MAX_NAMED: Final = 5
"""Clients that an error names."""


def start_fresh_or_latest(store: Store) -> Start:
    """Return what resolves `model.start_from` by the store alone: `fresh`, and `latest` of this experiment."""

    def start(federation: Federation) -> tuple[Float32 | None, str | None]:
        config = federation.config
        ancestor = store.latest_model(config.name) if config.model.start_from == "latest" else None
        if ancestor is None:
            return None, None
        if ancestor.engine["constants_digest"] != federation.facts["constants_digest"]:
            raise ConfigError(
                f"model.start_from is 'latest', but run {ancestor.run_id} trained with other frozen parameters or "
                "buffers than this model has: its trained parameters would not fit them",
                hint="use the seed and the model of that run, or start_from: fresh",
            )
        state = ServerState.from_bytes(store.state_blob(ancestor.run_id))
        return state.params_D, f"run:{ancestor.run_id}"

    return start


def open_run(
    store: Store,
    run_id: str,
    *,
    config: FederationConfig | None = None,
    federation: Federation | None = None,
    source_folder: str = "",
    sweep_id: str | None = None,
    start: Start | None = None,
    notify: Listener = ignore,
    fresh_collection: bool = False,
    accept_changed_data: bool = False,
) -> Run:
    """Take hold of a run, creating it when it does not exist yet and `config` or `federation` is given.

    Everything is loaded and checked before anything is written.

    Args:
      federation: what `config` comes to, where it is assembled already: of clients that are not simulated, for one.
      fresh_collection: of a run under a privacy claim, whatever may have been released of the current round counts as
        spent; the round is collected again at a further charge, with noise from a new secret.
      accept_changed_data: a run without a claim may continue with other rows than it began with.

    Raises:
      ConfigError, DataError, ModelError: the configuration, its data and its model do not fit together.
      RunConflict: the run exists with another configuration, or began with other data.
      RunNotFound: there is no such run, and no configuration.
      LeaseHeld: another process holds the run.
      StoreError: the run's secret is missing, or its history was cut.
    """
    check_run_id(run_id)
    record = store.find_run(run_id)
    if record is not None:
        check_can_continue(record)
    if federation is None:
        federation = _load(store, run_id, record, config, source_folder)
    else:
        config = federation.config
    has_rounds = record is None or record.committed_round < record.rounds  # else only its views are repaired
    data = check_population(store, federation) if has_rounds else None
    if config is not None:
        fields, digest = json.loads(config.model_dump_json()), config_digest(config)
        if record is None:
            record = _create_run(store, run_id, federation, digest, source_folder, sweep_id, start)
        elif is_moved(record.config, fields, record.source_folder, source_folder):
            digest = record.config_digest
        record = store.check_same(record, fields, digest, sweep_id)
    assert record is not None
    _check_model(record, federation)
    changed_facts: dict[str, str] = {}
    if has_rounds:
        changed_facts = _check_data(store, record, federation, accept_changed_data)
        join_population(store, federation, run_id, data, notify)
    _warn_of_another_engine(record, notify)
    lease = store.acquire(run_id, say=notify)
    try:
        run = Run(store, lease, federation, store.run(run_id), notify=notify, fresh_collection=fresh_collection)
        if changed_facts:
            lease.accept_data(changed_facts)
            notify(f"run {run_id} continues with other rows than it began with, as requested")
        if federation.config.claims and has_rounds:
            open_secret(run)
        elif not fresh_collection:
            forget_keys(run)
        else:
            why = "has no round to go" if federation.config.claims else "makes no privacy claim"
            raise ConfigError(
                f"--fresh-collection is given, and run {run_id} {why}: there is nothing to pay for",
                hint=f"`fedrounds resume {run_id}` without it",
            )
        lease.collect_garbage()
        run.refresh()
        return run
    except BaseException:
        lease.release()  # its heartbeat would hold the run for as long as this process lives
        raise


def _load(
    store: Store, run_id: str, record: RunRecord | None, config: FederationConfig | None, source_folder: str
) -> Federation:
    """Return the federation of a given configuration, else of the run's own."""
    if config is not None:
        return assemble_run(store, run_id, config, source_folder)
    if record is None:
        raise RunNotFound(f"there is no run {run_id!r} in this store", hint="`fedrounds runs` lists them")
    return federation_of(store, record)


def _create_run(
    store: Store,
    run_id: str,
    federation: Federation,
    digest: str,
    source_folder: str,
    sweep_id: str | None,
    start: Start | None,
) -> RunRecord:
    """Return the new run. Under a claim its secret is durable before the run is."""
    config = federation.config
    params_D, ancestor = (start or start_fresh_or_latest(store))(federation)
    state = federation.initial_state(params_D)
    secret = RunSecret.create(store.secrets_folder, run_id, store.identity()) if config.claims else None
    run = None
    try:
        run = store.create_run(
            run_id=run_id,
            name=config.name,
            population=config.population,
            rounds=config.rounds,
            config=json.loads(config.model_dump_json()),
            config_digest=digest,
            initial_state=state.to_bytes(),
            params_digest=state.params_digest,
            ancestor=ancestor,
            engine=engine_environment()
            | federation.facts
            | _facts_of_data(store, federation)
            | {"delta_warnings": delta_warnings(federation)},
            source_folder=source_folder,
            sweep_id=sweep_id,
            secret_id=secret.id if secret is not None else None,
            secret_home=place_of_secrets(store.home) if secret is not None else None,
        )
        return run
    finally:
        if secret is not None and (run is None or run.secret_id != secret.id):  # another process was first
            secret.destroy()


def federation_of(store: Store, run: RunRecord) -> Federation:
    """Return the federation of an existing run, loaded again. Raises what `assemble` raises."""
    return assemble_run(store, run.run_id, parse_config(run.config), run.source_folder)


def assemble_run(store: Store, run_id: str, config: FederationConfig, source_folder: str) -> Federation:
    """Return what `assemble` returns.

    Under a claim about private data its errors say only that loading failed: the restricted log of the run has the
    text.
    """
    return _assemble(store.home, run_id, config, source_folder)


def assemble_without_run(config: FederationConfig, source_folder: str) -> Federation:
    """Return the same where there is no run: the restricted log is that of the experiment's name."""
    return _assemble(home(), config.name, config, source_folder)


def _assemble(folder: Path, whose: str, config: FederationConfig, source_folder: str) -> Federation:
    try:
        return assemble(config, source_folder or None)
    except (ConfigError, ModelError):  # of what is public: a model is checked with synthetic rows
        raise
    except Exception as error:
        if not config.claims or config.data.is_public:
            raise
        raise withheld_error(folder, whose, "loading the clients' data", error) from None


def check_can_continue(run: RunRecord) -> None:
    """Raise `RunNotFound` for a run that was deleted, and the error of a run that no resume can continue."""
    if run.state == RunState.DELETED:
        raise RunNotFound(f"run {run.run_id!r} was deleted", hint="begin another run")
    if can_never_continue(run.state, run.error):
        assert run.error is not None
        raise Diverged(f"run {run.run_id} can never continue: {run.error['message']}", hint=run.error["hint"])


def _check_model(run: RunRecord, federation: Federation) -> None:
    """Raise `RunConflict` when the model, or the number of clients, is not the one that the run began with."""
    for name, value in federation.facts.items():
        if run.engine[name] != value:
            what = name.removeprefix("num_").replace("_", " ")
            raise RunConflict(
                f"run {run.run_id!r} began with {what} {_short(run.engine[name])}, now {_short(value)}: "
                "its data or its model has changed",
                hint="put the data and the code back as they were, or begin another run",
            )


def _check_data(store: Store, run: RunRecord, federation: Federation, accepts: bool) -> dict[str, str]:
    """Return the facts of other rows than the run began with, where a run without a claim `accepts` them; else {}.

    Raises:
      RunConflict: the rows are not those that the run began with.
    """
    facts = _facts_of_data(store, federation)
    if run.engine.get("data_digest") == facts.get("data_digest"):
        return {}
    if accepts and not federation.config.claims:
        return facts
    hint = "put the data back as they were, or begin another run"
    if federation.config.claims:
        hint += "; under a privacy claim a run cannot continue with other rows"
    else:
        hint += f"; or `fedrounds resume {run.run_id} --accept-changed-data` continues with the rows as they are now"
    raise RunConflict(f"run {run.run_id!r} began with other rows: {_which_changed(run, federation, facts)}", hint=hint)


def _facts_of_data(store: Store, federation: Federation) -> dict[str, str]:
    """Return what a run remembers of its rows; of clients that are not simulated, nothing."""
    return {} if federation.clients is None else data_facts(federation.clients.data, digest_key(store))


def _which_changed(run: RunRecord, federation: Federation, facts: Mapping[str, str]) -> str:
    if federation.withholds or federation.clients is None:
        return "which clients' have changed is withheld"
    changed = changed_clients(federation.clients.data, run.engine, facts)
    if not changed:
        return "their values, their order or the clients' names have changed"
    named = ", ".join(map(repr, changed[:MAX_NAMED])) + (
        f" and {len(changed) - MAX_NAMED} more" * (len(changed) > MAX_NAMED)
    )
    return f"those of {len(changed)} client{'s' * (len(changed) > 1)} have changed: {named}"


def _short(value: int | str) -> str:
    return str(value)[:12]


def _warn_of_another_engine(run: RunRecord, notify: Listener) -> None:
    changed = {name: value for name, value in engine_environment().items() if run.engine.get(name) != value}
    if changed:
        facts = "; ".join(f"{name} was {run.engine.get(name)!r}, is {value!r}" for name, value in changed.items())
        notify(f"this machine differs from the one that began the run: {facts}; the last bits of the model may differ")
