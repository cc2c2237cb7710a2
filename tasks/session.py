"""The run that this process works on: opened once, found by its id by the flows and tasks that share the process."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedrounds.fl_components.arrays import Float32
from fedrounds.fl_components.config import load_config, source_folder
from fedrounds.fl_components.errors import ConfigError
from fedrounds.fl_components.redaction import redact
from fedrounds.fl_components.server.federation import Federation
from fedrounds.fl_components.server.opening import Start, federation_of, open_run, start_fresh_or_latest
from fedrounds.fl_components.server.run import Run
from fedrounds.fl_components.store import RunRecord, Store, SweepRecord
from fedrounds.fl_components.values import ServerState
from fedrounds.tasks.outcome import Outcome
from fedrounds.tasks.progress import Listener, Progress, nobody_listens
from fedrounds.tasks.tracking.model import LoggableModel, load_start_parameters
from fedrounds.tasks.tracking.server import check_tracking_uri
from fedrounds.tasks.tracking.tracker import Tracker

if TYPE_CHECKING:
    from fedrounds.tasks.views import RunArtifact

ConfigSource = str | Mapping[str, Any] | None

_logger = logging.getLogger(__name__)
_open: dict[str, Session] = {}


class Session:
    """A run that this process works on, with its listeners and views.

    The training flow sets `tracker` (MLflow), `artifact` (Prefect) and, when it ends, `outcome`.
    """

    artifact: RunArtifact | None = None
    tracker: Tracker | None = None

    def __init__(self, run: Run, listener: Listener) -> None:
        self.run = run
        self.listeners = [listener]
        self.outcome = Outcome(None)
        run.on_stage = lambda stage: self.tell("stage", stage=stage)
        run.notify = self.say

    @property
    def run_id(self) -> str:
        return self.run.run_id

    def tell(self, kind: Any, text: str = "", **fields: Any) -> None:
        """Pass a piece of news on, with the run's id and number of rounds."""
        config = self.run.config
        news = Progress(
            kind,
            redact(text),
            run_id=self.run_id,
            rounds=config.rounds,
            primary=config.evaluation.primary or "",
            **fields,
        )
        for listener in self.listeners:
            try:
                listener(news)
            except Exception:  # who watches a run does not end it
                _logger.exception("a listener failed")

    def loggable_model(self) -> LoggableModel:
        """The model with its last committed parameters, as MLflow registers it."""
        return _loggable(self.run.federation, self.run.state())

    def say(self, text: str) -> None:
        self.tell("message", text)


def loggable_model(store: Store, run: RunRecord) -> LoggableModel:
    """The same for a run that this process does not hold: its data and model are loaded anew."""
    return _loggable(federation_of(store, run), ServerState.from_bytes(store.state_blob(run.run_id)))


def _loggable(federation: Federation, state: ServerState) -> LoggableModel:
    module = federation.trained_module(state.params_D)  # a copy: MLflow exports it in a thread of its own
    x_train = federation.simulated.data.x_train
    example = np.zeros((2, *x_train.shape[1:]), x_train.dtype)  # real rows would be seen by all who see the model
    return LoggableModel(module=module, example=example, name=federation.config.name)


def new_run_id() -> str:
    """A fresh id of eight hex digits."""
    return uuid.uuid4().hex[:8]


def run_id_of_flow_run(flow_run_id: uuid.UUID | str) -> str:
    """The id of the run that a deployment's flow run works on: the same whenever that flow run is retried.

    >>> run_id_of_flow_run("0193f7a2-7c1e-7d52-9b1c-5a1d3c2b4e6f")
    '5a1d3c2b4e6f'
    """
    return str(flow_run_id).replace("-", "")[-12:]


def running_session(run_id: str) -> Session:
    """The session of a run that this process holds. Raises KeyError when it holds none of that id."""
    return _open[run_id]


def cancel_open_sessions() -> None:
    """Ask every run that this process holds to stop before its next stage."""
    for held in list(_open.values()):
        held.run.cancelled.set()


@contextmanager
def session(
    run_id: str,
    config: ConfigSource = None,
    overrides: Sequence[str] = (),
    listener: Listener = nobody_listens,
    *,
    sweep: SweepRecord | None = None,
    fresh_collection: bool = False,
    accept_changed_data: bool = False,
) -> Iterator[Session]:
    """The session of `run_id`: the one that is already open in this process, else a new one, closed on the way out.

    `config` is a path, a tree of plain values, or None for a run that exists; `sweep` is what the run is a cell of.
    `fresh_collection` and `accept_changed_data` are those of `open_run`. Raises what `open_run` raises.
    """
    if run_id in _open:
        yield _open[run_id]
        return
    check_tracking_uri()
    resolved = load_config(config, overrides) if config is not None else None
    if resolved is None and overrides:
        raise ConfigError("overrides are given but no configuration", hint="name the configuration file as well")
    folder = sweep.source_folder if sweep is not None else str(source_folder(config))
    with Store.open() as store:
        if resolved is None:
            _check_is_there(store.find_run(run_id))
        run = open_run(
            store,
            run_id,
            config=resolved,
            source_folder=folder,
            sweep_id=sweep.sweep_id if sweep is not None else None,
            start=_start(store),
            notify=lambda text: listener(Progress("message", text, run_id=run_id)),
            fresh_collection=fresh_collection,
            accept_changed_data=accept_changed_data,
        )
        with run:
            _open[run_id] = Session(run, listener)
            try:
                yield _open[run_id]
            finally:
                del _open[run_id]


def _check_is_there(run: RunRecord | None) -> None:
    """Raise `ConfigError` when the folder that a run was started from is gone."""
    if run is not None and run.source_folder and not Path(run.source_folder).is_dir():
        raise ConfigError(
            f"run {run.run_id} was started from {run.source_folder}, which is not there",
            hint="if the project was moved, name its configuration where it is now: "
            f"fedrounds train CONFIG --run-id {run.run_id}",
        )


def _start(store: Store) -> Start:
    """Resolves `model.start_from` in full: `models:/...` is read from MLflow's registry."""

    def start(federation: Federation) -> tuple[Float32 | None, str | None]:
        start_from = federation.config.model.start_from
        if not start_from.startswith("models:/"):
            return start_fresh_or_latest(store)(federation)
        return load_start_parameters(start_from, constants=str(federation.facts["constants_digest"]))

    return start
