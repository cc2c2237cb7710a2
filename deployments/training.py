"""Run the training flows in this process: connect to Prefect, open a session, and raise what ended it."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fedrounds.fl_components.errors import ConfigError
from fedrounds.fl_components.store import (
    check_run_id,
    check_sweep_id,
)

if TYPE_CHECKING:
    from fedrounds.deployments.stack.connection import Connection
    from fedrounds.tasks.progress import Progress
    from fedrounds.tasks.session import Session
    from fedrounds.tasks.sweep import SweepSession
from fedrounds.deployments.results import run_data, sweep_data

T = TypeVar("T")


OnProgress = Callable[["Progress"], None]


def run_training(
    config: str | dict[str, Any] | None,
    overrides: list[str],
    run_id: str | None,
    on_progress: OnProgress | None,
    profile: Path | None,
    fresh_collection: bool = False,
    accept_changed_data: bool = False,
) -> dict[str, Any]:
    if profile is not None:
        from fedrounds.fl_components.server.profile import check_writable

        check_writable(profile)
    if run_id is not None:
        check_run_id(run_id)
    _check_configuration(config, overrides)
    with _connected(on_progress) as connection:
        from fedrounds.flows.training import federated_training
        from fedrounds.tasks.progress import nobody_listens
        from fedrounds.tasks.session import new_run_id, session

        run_id = run_id or new_run_id()
        listener = on_progress or nobody_listens
        opened = session(
            run_id,
            config,
            overrides,
            listener,
            fresh_collection=fresh_collection,
            accept_changed_data=accept_changed_data,
        )
        with opened as running, _profiled(running, profile, listener):
            _run_flow(
                lambda: federated_training(
                    config=config,
                    overrides=overrides,
                    run_id=run_id,
                    fresh_collection=fresh_collection,
                    accept_changed_data=accept_changed_data,
                    return_state=True,
                ),
                running,
                running.run.cancelled,
                connection,
                tag=f"run:{run_id}",
            )
            return run_data(running.run.store, running.run.refresh())


@contextmanager
def _profiled(running: Session, file: Path | None, listener: OnProgress) -> Iterator[None]:
    """Write the trace of what happens inside to `file`, also when the run fails."""
    if file is None:
        yield
        return
    from fedrounds.fl_components.server.profile import Profile
    from fedrounds.tasks.progress import Progress

    running.run.profile = profile = Profile()
    try:
        yield
    finally:
        profile.write(file)
        # Not to Prefect's log, which has ended with the flow.
        listener(Progress("message", f"the profile is in {file}: https://ui.perfetto.dev opens it", running.run_id))


def run_sweep(
    config: str | dict[str, Any] | None,
    over: list[str] | dict[str, Any],
    overrides: list[str],
    sweep_id: str | None,
    on_progress: OnProgress | None,
) -> dict[str, Any]:
    if sweep_id is not None:
        check_sweep_id(sweep_id)
    if config is not None:
        from fedrounds.tasks.sweep import plan

        plan(sweep_id or "new", config, over, overrides)  # before a server is started for what makes no sense
    with _connected(on_progress) as connection:
        from fedrounds.flows.sweep import federated_sweep
        from fedrounds.tasks.progress import nobody_listens
        from fedrounds.tasks.session import new_run_id
        from fedrounds.tasks.sweep import sweep_session

        sweep_id = sweep_id or new_run_id()
        with sweep_session(sweep_id, config, over, overrides, on_progress or nobody_listens) as sweep:
            parameters = {"config": config, "over": over, "overrides": overrides, "sweep_id": sweep_id}
            _run_flow(
                lambda: federated_sweep(**parameters, return_state=True),
                sweep,
                sweep.cancelled,
                connection,
                tag=f"sweep:{sweep_id}",
            )
            return sweep_data(sweep.store, sweep.record, sweep.shown)


def _check_configuration(config: str | dict[str, Any] | None, overrides: list[str]) -> None:
    """Raise `ConfigError` for a configuration that makes no sense, before a server is started for it."""
    if config is not None:
        from fedrounds.fl_components.config import load_config

        load_config(config, overrides)


def _check_enclosing_flow() -> None:
    """Raise `ConfigError` inside a flow run of another Prefect server than the one that the training would use."""
    context = sys.modules.get("prefect.context")
    if context is None or context.FlowRunContext.get() is None:
        return
    from prefect.settings import PREFECT_API_URL

    from fedrounds.deployments.stack.connection import configured_api_url

    server = configured_api_url()
    if server is None or server != (PREFECT_API_URL.value() or "").rstrip("/"):
        raise ConfigError(
            "this is called inside a Prefect flow run of another server than the training's",
            hint="set PREFECT_API_URL to that server for both, or call it outside of the flow",
        )


@contextmanager
def _connected(on_progress: OnProgress | None) -> Iterator[Connection]:
    """A Prefect server, which boots while what a training needs is imported."""
    from fedrounds.deployments.stack.connection import ConfiguredServer, connect
    from fedrounds.tasks.tracking.server import check_tracking_uri

    check_tracking_uri()
    _check_enclosing_flow()
    with connect(say=lambda text: _tell(on_progress, text)) as connection:
        _tell(on_progress, "loading PyTorch, Prefect and the data")
        import fedrounds.flows.training  # noqa: F401

        if isinstance(connection, ConfiguredServer):  # one that is away is told before anything is written
            connection.wait()
        yield connection


def _run_flow(
    flow: Callable[[], Any],
    held: Session | SweepSession,
    cancelled: threading.Event,
    connection: Connection,
    *,
    tag: str,
) -> None:
    """Run a flow on what this process holds. Raises what ended it."""
    from prefect import tags

    from fedrounds.deployments.stack.connection import client_settings
    from fedrounds.flows.prefect_runs import translate_prefect_error
    from fedrounds.tasks.outcome import Outcome

    connection.wait()
    with client_settings(connection), tags(tag), _first_interrupt_stops(cancelled) as interrupted:
        try:
            state = flow()
            if held.outcome.is_success and not state.is_completed():
                state.result()  # raises what Prefect's engine met
        except Exception as error:  # Prefect's own: what ended the training is in held.outcome
            if held.outcome.is_success:
                held.outcome = Outcome(translate_prefect_error(error, tag.partition(":")[2]))
    if interrupted.is_set() and not held.outcome.is_success:
        raise KeyboardInterrupt
    held.outcome.check()


@contextmanager
def _first_interrupt_stops(cancelled: threading.Event) -> Iterator[threading.Event]:
    """The first Ctrl-C asks the run to stop before its next stage; the second interrupts at once."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield interrupted
        return

    def stop(*_: object) -> None:
        interrupted.set()
        cancelled.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _tell(on_progress: OnProgress | None, text: str) -> None:
    if on_progress is not None:
        from fedrounds.tasks.progress import Progress

        on_progress(Progress("message", text))


def run_outside_loop(work: Callable[[], T]) -> T:
    """Prefect's synchronous calls turn into coroutines inside a running event loop, so the work gets its own thread."""
    if not _loop_is_running():
        return work()
    with ThreadPoolExecutor(1, thread_name_prefix="fedrounds") as executor:
        future = executor.submit(work)
        try:
            return future.result()
        except KeyboardInterrupt:
            from fedrounds.tasks.session import cancel_open_sessions

            cancel_open_sessions()  # each stops before its next stage, and the executor waits for that
            raise


def _loop_is_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
