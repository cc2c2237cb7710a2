"""Runs that dead attempts left in Prefect are crashed; those of the current attempt are not, however late they come."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

from prefect import Flow, Task
from prefect.client.orchestration import SyncPrefectClient
from prefect.states import Running

from fedrounds.deployments.stack.connection import connect
from fedrounds.flows.prefect_runs import crash_stale_runs

TAG = "run:r"


def nothing() -> None:
    pass


def attempt(client: SyncPrefectClient) -> tuple[UUID, UUID, UUID]:
    """A training with one round, in which a task is running: the ids of the three."""
    flow, task = Flow(nothing, name="nothing"), Task(fn=nothing, name="commit")
    parent = client.create_flow_run(flow, tags=[TAG], state=Running())
    placeholder = client.create_task_run(task, parent.id, dynamic_key="round", state=Running())
    child = client.create_flow_run(flow, tags=[TAG], parent_task_run_id=placeholder.id, state=Running())
    return parent.id, child.id, client.create_task_run(task, child.id, dynamic_key="0", state=Running()).id


def test_only_what_other_attempts_left_is_crashed(shared_home: Path) -> None:
    with connect(shared_home) as connection, SyncPrefectClient(connection.wait()) as client:
        dead, current = attempt(client), attempt(client)
        assert crash_stale_runs(client, TAG, current[0]) == 4  # of the dead one also what stands for its round
        for ids, expected in ((dead, "CRASHED"), (current, "RUNNING")):
            parent, child, task = ids
            states = [
                client.read_flow_run(parent).state,
                client.read_flow_run(child).state,
                client.read_task_run(task).state,
            ]
            assert [state.type.value for state in states if state is not None] == [expected] * 3
        assert crash_stale_runs(client, TAG, current[0]) == 0
