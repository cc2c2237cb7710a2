"""The background writer of one run's view, and the repair of runs whose writer is gone."""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fedrounds.fl_components.errors import DataError, FedroundsError, LeaseHeld, LeaseLost, ModelError, one_line
from fedrounds.fl_components.store import Lease, RunRecord, Store
from fedrounds.tasks.tracking import server
from fedrounds.tasks.tracking.model import LoggableModel, NotRegistered, export, find_registered, register
from fedrounds.tasks.tracking.run_view import DeletedInMlflow, RunView

if TYPE_CHECKING:
    from mlflow import MlflowClient

_logger = logging.getLogger(__name__)

_FIRST_DELAY_S: Final = 0.5
_LONGEST_DELAY_S: Final = 30.0
_REST_S: Final = 1.0  # quick rounds are logged together: that takes hardly more from their training than one alone
_FAILURES_TOLD: Final = 2  # a single one is not worth a sentence


@dataclass(frozen=True, slots=True)
class TrackingReport:
    """What MLflow still lacks of a run, and why.

    Args:
        pending_rounds: how many committed rounds are not shown.
        model_pending: whether its model is still to be registered.
        error: why, in a sentence; None when the view is complete.
        superseded: another process has taken the run over, and writes the rest.
    """

    pending_rounds: int
    model_pending: bool
    error: str | None
    superseded: bool = False

    @property
    def lacking(self) -> str:
        """In words, what MLflow lacks first of all.

        >>> TrackingReport(3, True, "MLflow does not answer").lacking
        '3 rounds'
        >>> TrackingReport(0, True, "MLflow does not answer").lacking
        'the model and the end'
        """
        if self.pending_rounds:
            return f"{self.pending_rounds} round{'' if self.pending_rounds == 1 else 's'}"
        if self.error is None:
            return "nothing"
        return "the model and the end" if self.model_pending else "the end"


class Tracker:
    """Writes one run to MLflow in a thread of its own. MLflow being down, slow or wrong never fails or delays a round.

    Rounds that follow each other within a second are logged together.

    `start` it when the lease is held and the rest of the program is imported, `wake` it when a round was committed,
    and `close` it after `lease.finish`, while the lease is still held:

        tracker = Tracker(store, lease, model=model, prefect_flow_run={"id": ..., "url": ...}, say=print)
        tracker.start()
        ...
        tracker.poke()
        ...
        lease.finish(RunState.COMPLETED)
        report = tracker.close(timeout_s=20)

    Args:
        store, lease: the run's. The tracker alone writes the run's view, as the lease is one process's.
        tracking_uri: which MLflow; by default `tracking_uri(store.home)`.
        model: makes what is registered when the run is Completed; None registers nothing. Called in the tracker's
            thread, after the training.
        prefect_flow_run: {"id", "url"} of this attempt; noted in the store, and linked to from MLflow.
        say: gets sentences for people, from the tracker's thread. Trouble is told once, and its end once.
    """

    def __init__(
        self,
        store: Store,
        lease: Lease,
        *,
        tracking_uri: str | None = None,
        model: Callable[[], LoggableModel] | None,
        prefect_flow_run: dict[str, Any] | None,
        say: Callable[[str], None],
    ) -> None:
        self._store, self._lease = store, lease
        self._uri = tracking_uri or server.tracking_uri(store.home)
        self._model, self._prefect_flow_run, self._listener = model, prefect_flow_run, say
        self._view: RunView | None = None
        self._trouble: str | None = None
        self._superseded = False
        self._failures = 0
        self._at_work = server.is_local(self._uri)  # in this process, not waiting for a server
        self._timeout_s = self._deadline = 0.0
        self._wake, self._closing, self._abandoned = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"tracker {lease.run_id}", daemon=True)

    def start(self) -> None:
        """Begin. Raises what noting the Prefect flow run in the store raises, and nothing of MLflow's."""
        if self._prefect_flow_run is not None:
            self._lease.note(prefect_flow_run=self._prefect_flow_run)
        self._thread.start()

    def wake(self) -> None:
        """A round was committed."""
        self._wake.set()

    def close(self, timeout_s: float) -> TrackingReport:
        """Write what is left, register the model of a Completed run, end the MLflow run.

        Waits as long as the work takes, but at most `timeout_s` for an MLflow that does not answer: `catch_up` writes
        the rest another time. A run that has not finished stays open in MLflow.
        """
        self._timeout_s, self._deadline = timeout_s, time.monotonic() + timeout_s
        self._closing.set()
        self._wake.set()
        while self._thread.is_alive():
            self._thread.join(timeout=0.05)
            if (self._trouble is not None or not self._at_work) and self._is_late():
                self._abandoned.set()
                break
        error = self._trouble
        if error is None and self._thread.is_alive():
            error = _problem(self._uri, TimeoutError("timed out"))
        return _report(self._store, self._lease.run_id, self._model, error, superseded=self._superseded)

    def _work(self) -> None:
        delay_s = _FIRST_DELAY_S
        with server.quiet():
            while not self._abandoned.is_set():
                self._wake.clear()
                closing = self._closing.is_set()  # read before the rounds, so that none before `close` is missed
                try:
                    written = self._write(closing)
                except LeaseLost as error:
                    self._trouble, self._superseded = error.message, True
                    return
                except Exception as error:
                    self._troubled(error)
                    if closing and (_will_stay(error) or self._is_late()):
                        return
                    # Closing cuts the wait of the training short, and then tries often.
                    (self._abandoned if closing else self._closing).wait(_FIRST_DELAY_S if closing else delay_s)
                    delay_s = min(delay_s * 2, _LONGEST_DELAY_S)
                else:
                    self._recovered(written)
                    if closing:
                        return
                    delay_s = _FIRST_DELAY_S
                    self._closing.wait(_REST_S)
                    self._wake.wait()

    def _write(self, closing: bool) -> int:
        if self._view is None:
            with self._working():
                server.prepare()
            self._view = RunView(server.connect(self._uri), self._uri, self._store, self._lease)
        written = self._view.log_rounds()
        if closing:
            _finish(self._view, self._model, self._say, self._working)
        return written

    @contextmanager
    def _working(self) -> Iterator[None]:
        """In this process, not waiting for MLflow, which afterwards gets the whole time again to answer."""
        before, self._at_work = self._at_work, True
        try:
            yield
        finally:
            if self._trouble is None:  # else each new attempt would be given more time
                self._deadline = max(self._deadline, time.monotonic() + self._timeout_s)
            self._at_work = before

    def _is_late(self) -> bool:
        return time.monotonic() > self._deadline

    def _say(self, text: str) -> None:
        try:
            self._listener(text)
        except Exception:  # who listens does not end the tracker
            _logger.exception("what the tracker of run %s said was not heard: %s", self._lease.run_id, text)

    def _troubled(self, error: Exception) -> None:
        self._trouble = _problem(self._uri, error)
        self._failures += 1
        if self._failures == _FAILURES_TOLD:
            self._say(f"{self._trouble}; the training goes on, and what is missing is written as soon as it can be")

    def _recovered(self, written: int) -> None:
        if self._failures >= _FAILURES_TOLD:
            self._say(f"MLflow is back; {written} rounds were written late" if written else "MLflow is back")
        self._trouble, self._failures = None, 0


def catch_up(
    store: Store,
    *,
    tracking_uri: str | None = None,
    model: Callable[[RunRecord], LoggableModel | None] | None = None,
    repair: Callable[[RunRecord], object] = lambda run: None,
    say: Callable[[str], None],
) -> dict[str, TrackingReport]:
    """Write what the store's finished runs still lack in MLflow; one report for each run that lacked something.

    MLflow was down when they ended, or their process was killed: rounds are missing, or the run is still open there.
    `model` makes what is registered for a Completed run; without it the run is closed with no model. `repair` is called
    for each run that is worked on, first of all and while its lease is held. A run that another process holds is left
    to it, and one that the user deleted in MLflow is left alone. Tries each run once, and none after MLflow did not
    answer. Exporting a model while another is trained in this process is not safe: call it before or after a training.
    """
    uri = tracking_uri or server.tracking_uri(store.home)
    finished = [run for run in reversed(store.runs()) if run.state.is_final]
    reports: dict[str, TrackingReport] = {}
    if not finished:
        return reports
    with server.quiet():
        try:
            client = server.connect(uri)
            still_open = _open_in_mlflow(client, {run.name for run in finished})
        except Exception as error:
            problem = _problem(uri, error)
            return {run.run_id: _report(store, run.run_id, model, problem) for run in finished if _lacks_rounds(run)}
        for run in finished:
            if not _lacks_rounds(run) and run.mlflow_run_id not in still_open:
                continue
            try:
                with store.acquire(run.run_id, say=_leave_it) as lease:
                    with _failure_of(f"what Prefect shows of run {run.run_id} cannot be put right"):
                        repair(run)
                    view = RunView(client, uri, store, lease)
                    view.log_rounds()
                    _finish(view, None if model is None else partial(model, run), say, nullcontext)
            except (LeaseHeld, LeaseLost, DeletedInMlflow):
                continue
            except Exception as error:
                reports[run.run_id] = _report(store, run.run_id, model, _problem(uri, error))
                if not isinstance(error, FedroundsError) and not server.is_refusal(error):
                    break
            else:
                reports[run.run_id] = _report(store, run.run_id, model, None)
    return reports


def _finish(
    view: RunView,
    model: Callable[[], LoggableModel | None] | None,
    say: Callable[[str], None],
    working: Callable[[], AbstractContextManager[None]],
) -> None:
    """The end of a run that has finished: its model is registered if it is Completed, its MLflow run closed."""
    run = view.store.run(view.lease.run_id)
    if not run.state.is_final:
        return
    if run.state.is_finished and run.model_uri is None and model is not None:
        try:
            model_uri = _register(view, run, model, working)
        except NotRegistered as error:
            say(f"the model of run {run.run_id} was not registered: {error}")
            view.tag("registered_model", f"none: {error}")
        else:
            if model_uri is not None:
                view.lease.note(model_uri=model_uri)
                view.tag("registered_model", model_uri)
    view.state_privacy()
    view.close()


def _register(
    view: RunView,
    run: RunRecord,
    model: Callable[[], LoggableModel | None],
    working: Callable[[], AbstractContextManager[None]],
) -> str | None:
    with working(), _failure_of(f"the model of run {run.run_id} cannot be built"):
        try:
            made = model()
        except (DataError, ModelError) as error:
            raise NotRegistered(f"it cannot be built: {error.message}") from error
    if made is None:
        return None
    registered = find_registered(view.client, run, view.mlflow_run_id, made.name)
    if registered is not None:
        return registered
    with tempfile.TemporaryDirectory(prefix="fedrounds-model-") as temporary:
        folder = Path(temporary) / "model"
        with working():
            export(made, folder)
        return register(view, run, made, folder)


def _open_in_mlflow(client: MlflowClient, names: set[str]) -> set[str]:
    """The ids of the MLflow runs in these experiments that nobody has ended."""
    experiments = [client.get_experiment_by_name(name) for name in sorted(names)]
    ids = [each.experiment_id for each in experiments if each is not None and each.lifecycle_stage == "active"]
    if not ids:
        return set()
    found: set[str] = set()
    token: str | None = None
    while True:
        page = client.search_runs(ids, filter_string="attributes.status = 'RUNNING'", page_token=token)
        found.update(each.info.run_id for each in page)
        token = page.token
        if not token:
            return found


def _lacks_rounds(run: RunRecord) -> bool:
    return run.mlflow_run_id is None or run.tracked_round < run.committed_round


def _leave_it(waiting: str) -> None:
    """Instead of waiting for a lease to lapse, as `Store.acquire` would."""
    raise LeaseHeld(waiting)


def _problem(uri: str, error: Exception) -> str:
    where = f"MLflow at {server.public_uri(uri)}"
    if isinstance(error, FedroundsError):
        return error.message
    if _will_stay(error):
        return f"{where} refuses what is logged: {server.reason(error)}"
    return f"{where} {'cannot be used' if server.is_local(uri) else 'does not answer'} ({server.reason(error)})"


def _will_stay(error: Exception) -> bool:
    """Whether only a person can mend it: trying again will not."""
    return isinstance(error, DeletedInMlflow) or server.is_refusal(error)


@contextmanager
def _failure_of(what: str) -> Iterator[None]:
    """Somebody else's code: its errors are not MLflow's."""
    try:
        yield
    except (FedroundsError, NotRegistered):
        raise
    except Exception as error:
        raise FedroundsError(f"{what}: {one_line(error)}") from error


def _report(
    store: Store, run_id: str, model: Callable[..., Any] | None, error: str | None, *, superseded: bool = False
) -> TrackingReport:
    run = store.run(run_id)
    finished = run.state.is_finished
    model_pending = error is not None and model is not None and finished and run.model_uri is None
    return TrackingReport(run.committed_round - run.tracked_round, model_pending, error, superseded)
