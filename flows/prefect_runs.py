"""What the flows ask of Prefect about runs: names, stale runs of dead attempts, cancellation."""

from __future__ import annotations

import contextvars
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast
from uuid import UUID

import httpx
from prefect import Flow, Task
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import State, StateType
from prefect.context import FlowRunContext, SettingsContext, TagsContext, get_settings_context
from prefect.exceptions import CancelledRun, CrashedRun, ObjectNotFound, UnfinishedRun
from prefect.flow_engine import run_flow
from prefect.logging.handlers import APILogHandler
from prefect.states import Cancelled, Completed, Crashed, Failed, Running

from fedrounds.fl_components.errors import (
    BudgetExhausted,
    FedroundsError,
    RunCancelled,
    RunFailed,
    Unreachable,
)
from fedrounds.tasks.outcome import Outcome
from fedrounds.tasks.progress import Listener, Progress
from fedrounds.tasks.tracking.results import primary_key

METRICS_LOGGED = {
    "privacy/epsilon": ".4g",
    "privacy/epsilon_simulated": ".4g",
    "privacy/example/epsilon": ".4g",
}
UNFINISHED = [StateType.RUNNING, StateType.PENDING, StateType.SCHEDULED, StateType.CANCELLING, StateType.PAUSED]
POLL_S = 2.0
PAGE = 100  # of what Prefect's API returns at a time


def translate_prefect_error(error: BaseException, run_id: str) -> BaseException:
    """What Prefect's client raises when its server fails or is gone, as one of our errors; any other as it is."""
    hint = f"see to that server (its log, its disk), then go on with: fedrounds resume {run_id}"
    if isinstance(error, httpx.HTTPStatusError):
        request, response = error.request, error.response
        return RunFailed(
            f"the Prefect server at {request.url.host}:{request.url.port} failed: it answered "
            f"{response.status_code} ({response.reason_phrase}) to {request.method} {request.url.path}",
            hint=hint,
        )
    if isinstance(error, httpx.TransportError):
        return Unreachable(f"the Prefect server does not answer any more: {error or type(error).__name__}", hint=hint)
    if isinstance(error, CrashedRun | CancelledRun | UnfinishedRun):
        return RunFailed(f"a flow run was ended in Prefect, not by the training: {error}", hint=hint)
    return error


def without_heartbeat() -> SettingsContext:
    """Settings for a child flow: leaving a synchronous flow that sends heartbeats waits a second for their thread."""
    context = get_settings_context()
    flows = context.settings.flows.model_copy(update={"heartbeat_frequency": None})
    return SettingsContext(profile=context.profile, settings=context.settings.model_copy(update={"flows": flows}))


def run_tag(run_id: str) -> str:
    """The tag of all that Prefect has of a run."""
    return f"run:{run_id}"


def sweep_tag(sweep_id: str) -> str:
    """The tag of a sweep's own flow runs; those of its cells have the tags of their runs."""
    return f"sweep:{sweep_id}"


def current_flow_run_id() -> UUID:
    """The id of the flow run whose body this is called in."""
    context = FlowRunContext.get()
    assert context is not None and context.flow_run is not None  # a flow's body always runs in one
    return context.flow_run.id


class Children:
    """The child runs of one flow under a flow run.

    To call the flow would do the same with two requests and a new client more for each child. It would also look for a
    child of an earlier attempt to go on with: here it is the store that knows what is done.
    """

    def __init__(self, client: SyncPrefectClient, parent: UUID, flow: Flow[..., Any], tags: list[str]) -> None:
        self.client, self.parent, self.flow, self.tags = client, parent, flow, tags
        self._placeholder: Task[..., Any] = Task(fn=flow.fn, name=flow.name)  # what a parent shows of a child

    def run(self, name: str, key: str, **parameters: Any) -> State[Any]:
        """Run the flow to its end, as the child `name`. No two children of the parent have the same `key`.

        The tags are those of the flow run; its task runs are found by it and have none, as Prefect would look up a
        concurrency limit for each.
        """
        task_run = self.client.create_task_run(self._placeholder, self.parent, dynamic_key=key, name=name)
        flow_run = self.client.create_flow_run(
            self.flow, name=name, parameters=parameters, tags=self.tags, parent_task_run_id=task_run.id
        )
        with TagsContext(current_tags=set()):
            state: Any = run_flow(self.flow, flow_run, parameters, return_type="state")
        return cast("State[Any]", state)


def crash_stale_runs(client: SyncPrefectClient, tag: str, current: UUID) -> int:
    """Force what dead attempts left unfinished to Crashed: flow runs with `tag` and their tasks, but for `current`, its
    children and their tasks, which Prefect may write late. Returns how many there were.

    A killed process cannot say that it is dead, and Prefect shows its runs as running for ever.
    """
    state: State[Any] = Crashed(message="The process died; a later attempt goes on with this run.")
    tagged = FlowRunFilterTags(all_=[tag])
    task_runs = client.read_task_runs(
        flow_run_filter=FlowRunFilter(tags=tagged),
        task_run_filter=TaskRunFilter(state=TaskRunFilterState(type=TaskRunFilterStateType(any_=UNFINISHED))),
    )
    flow_runs = client.read_flow_runs(
        flow_run_filter=FlowRunFilter(
            tags=tagged,
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=UNFINISHED)),
        )
    )
    unfinished = {flow_run.id for flow_run in flow_runs} | {each.flow_run_id for each in task_runs if each.flow_run_id}
    own = {current}
    if unfinished:
        children = FlowRunFilter(
            id=FlowRunFilterId(any_=list(unfinished)), parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[current])
        )
        own |= {child.id for child in client.read_flow_runs(flow_run_filter=children)}
    stale_tasks = [task_run.id for task_run in task_runs if task_run.flow_run_id not in own]
    stale_flows = [flow_run.id for flow_run in flow_runs if flow_run.id not in own]
    for task_run_id in stale_tasks:
        client.set_task_run_state(task_run_id, state, force=True)
    for flow_run_id in stale_flows:
        client.set_flow_run_state(flow_run_id, state, force=True)
    return len(stale_tasks) + len(stale_flows)


def delete_flow_runs(client: SyncPrefectClient, tag: str) -> int:
    """Delete what Prefect shows of a run: all flow runs with its tag, their task runs, logs and artifacts.

    Returns how many flow runs there were.
    """
    deleted = 0
    while page := client.read_flow_runs(flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=[tag])), limit=PAGE):
        of_page = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[each.id for each in page]))
        while artifacts := client.read_artifacts(artifact_filter=of_page, limit=PAGE):
            for artifact in artifacts:
                _delete(client.delete_artifact, artifact.id)
        for flow_run in page:
            _delete(client.delete_flow_run, flow_run.id)
            deleted += 1
    return deleted


def _delete(delete: Callable[[UUID], object], id: UUID) -> None:
    with suppress(ObjectNotFound):  # another client was first
        delete(id)


def settle_cancelled(client: SyncPrefectClient, state: State[Any]) -> None:
    """Bring a round that was cancelled in the UI to its end; Prefect leaves that to whoever runs it."""
    flow_run_id = state.state_details.flow_run_id
    if state.type == StateType.CANCELLING and flow_run_id is not None:
        client.set_flow_run_state(flow_run_id, Cancelled(), force=True)


def final_state(client: SyncPrefectClient, flow_run_id: UUID, outcome: Outcome, done: str) -> State[Any]:
    """Return the Prefect state that a flow ends in: Completed with the message `done`, or that of the error.

    Raises the error that ended the work where it is not a `FedroundsError`: it is a bug, or a signal.
    """
    error, name = outcome.error, outcome.state.value
    if error is None:
        allow_completed(client, flow_run_id)
        return Completed(message=done)
    if isinstance(error, RunCancelled):
        return Cancelled(message=error.message)
    if isinstance(error, BudgetExhausted):  # a normal end: what was paid for is there
        allow_completed(client, flow_run_id)
        return Completed(name=name, message=error.message)
    if isinstance(error, FedroundsError):
        return Failed(name=name, message=error.message)
    raise error


def allow_completed(client: SyncPrefectClient, flow_run_id: UUID) -> None:
    """Take back a cancellation that came after the last round: Prefect does not go from Cancelling to Completed."""
    state = client.read_flow_run(flow_run_id).state
    if state is not None and state.type == StateType.CANCELLING:
        client.set_flow_run_state(flow_run_id, Running(), force=True)


def flow_run_log(flow_run_id: UUID) -> Listener:
    """A listener that writes to the log on the flow run's page. Prefect's own loggers are too talkative for that."""
    logger = logging.getLogger("fedrounds")
    if not logger.handlers:
        logger.addHandler(APILogHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False

    def listen(news: Progress) -> None:
        if news.kind == "message":
            logger.info(news.text, extra={"flow_run_id": str(flow_run_id)})
        elif news.kind == "round":
            logged = {"train/loss": ".4f", "eval/loss": ".4f", primary_key(news.primary): ".4f", **METRICS_LOGGED}
            shown = ", ".join(
                f"{name} {news.metrics[name]:{form}}" for name, form in logged.items() if name in news.metrics
            )
            text = f"round {news.round} of {news.rounds}: {shown}"
            logger.info(text, extra={"flow_run_id": str(flow_run_id)})

    return listen


@contextmanager
def cancellation_watched(flow_run_id: UUID, cancelled: threading.Event) -> Iterator[None]:
    """Set `cancelled` when the flow run is asked to stop in the UI: one of a command line is not told of it."""
    finished = threading.Event()

    def watch() -> None:
        while not finished.is_set():
            try:
                with get_client(sync_client=True) as client:
                    while not finished.wait(POLL_S):
                        state = client.read_flow_run(flow_run_id).state
                        if state is not None and state.type in (StateType.CANCELLING, StateType.CANCELLED):
                            cancelled.set()
                            return
            except Exception:  # the API may be away for a while: ask again
                finished.wait(POLL_S)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(watch,), name="cancellation", daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
