"""Who may work on a run: real processes that live, die, stop and wake up."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import update

from fedrounds.fl_components.errors import LeaseHeld, LeaseLost, StoreError
from fedrounds.fl_components.run_state import RunState
from fedrounds.fl_components.store import RoundRecord, RunRecord, Store
from fedrounds.fl_components.store.lease import Holder
from fedrounds.fl_components.store.schema import database_clock, leases

NewRun = Callable[..., RunRecord]
DoRound = Callable[..., RoundRecord]


def wait_for(condition: Callable[[], object], deadline_s: float = 20) -> None:
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come about"
        time.sleep(0.01)


def stop(holder: Any, database_url: str) -> None:
    """Stop the holder, but not in the middle of a heartbeat: SQLite's lock would stay with it."""

    def is_stopped_between_transactions() -> bool:
        holder.signal(signal.SIGSTOP)
        wait_for(lambda: psutil.Process(holder.pid).status() == psutil.STATUS_STOPPED)
        if not database_url.startswith("sqlite"):
            return True
        with closing(sqlite3.connect(database_url.removeprefix("sqlite:///"), timeout=0)) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                holder.signal(signal.SIGCONT)
                return False
            return True

    wait_for(is_stopped_between_transactions)


def change_lease(store: Store, **values: Any) -> None:
    with store._transaction() as connection:
        connection.execute(update(leases).values(**values))


def forbid_waiting(sentence: str) -> None:
    raise AssertionError(f"waited: {sentence}")


def test_each_holder_has_a_higher_fence(store: Store, new_run: NewRun) -> None:
    new_run()
    fences = []
    for _ in range(3):
        with store.acquire("r", say=forbid_waiting) as lease:
            fences.append(lease.fence)
            assert not lease.lost
    assert fences == [1, 2, 3]
    with pytest.raises(LeaseLost, match="released"):
        lease.begin_attempt()


def test_a_run_held_by_a_live_process_is_refused(store: Store, new_run: NewRun) -> None:
    new_run()
    new_run("other")
    with store.acquire("r"), store.acquire("other"):  # another run is no matter
        with pytest.raises(LeaseHeld) as caught:
            store.acquire("r", say=forbid_waiting)
        assert str(os.getpid()) in caught.value.message
        assert caught.value.hint


def test_a_live_holder_in_another_process_is_refused_and_a_killed_one_superseded_at_once(
    store: Store, new_run: NewRun, start_holder: Callable[..., Any], do_round: DoRound
) -> None:
    new_run()
    holder = start_holder()
    with pytest.raises(LeaseHeld, match=f"process {holder.pid} on host"):
        store.acquire("r", say=forbid_waiting)
    assert holder.ask("lease.reserve(1)") == "1"
    holder.kill()
    with store.acquire("r", say=forbid_waiting) as lease:
        assert lease.fence == 2
        do_round(lease, 1)
    assert len(store.ledger.collections("r")) == 1


def test_a_killed_holder_whose_parent_has_not_noticed_is_dead(
    store: Store, new_run: NewRun, start_holder: Callable[..., Any]
) -> None:
    new_run()
    holder = start_holder()
    holder.kill(reap=False)  # a zombie, until its parent asks for its exit status
    wait_for(lambda: psutil.Process(holder.pid).status() == psutil.STATUS_ZOMBIE)
    with store.acquire("r", say=forbid_waiting) as lease:
        assert lease.fence == 2


def test_a_pid_that_was_given_to_another_process_is_not_the_holder(store: Store, new_run: NewRun) -> None:
    new_run()
    lease = store.acquire("r")
    change_lease(store, process_started_s=1.0)  # the holder was another process with this pid
    with store.acquire("r", say=forbid_waiting) as newer:
        assert newer.fence == lease.fence + 1
    lease.release()


def test_a_holder_elsewhere_is_waited_for_until_its_lease_lapses(
    store: Store, new_run: NewRun, start_holder: Callable[..., Any]
) -> None:
    new_run()
    dead = start_holder()
    dead.kill()
    said: list[str] = []

    def say(sentence: str) -> None:
        said.append(sentence)
        change_lease(store, lapse_s=0.3)

    here = asdict(Holder.this_process())
    for elsewhere in ({"host": "far"}, {"boot_id": "another"}, {"pid_namespace": "pid:[1]"}):
        change_lease(store, heartbeat_at=database_clock(), lapse_s=30.0, **(here | {"pid": dead.pid} | elsewhere))
        with store.acquire("r", say=say):
            pass
        assert re.search(r"last heard of \d+ s ago; waiting \d+ s", said[-1])
    assert len(said) == 3


def test_a_holder_elsewhere_that_is_heard_of_is_refused(
    open_store: Callable[..., Store], store: Store, new_run: NewRun
) -> None:
    new_run()
    with open_store(heartbeat_s=0.2, lapse_s=20).acquire("r"):
        change_lease(store, host="far")
        said: list[str] = []
        with pytest.raises(LeaseHeld, match="host far"):
            store.acquire("r", say=said.append)
        assert len(said) == 1
        assert "on host far" in said[0]


def test_a_stopped_holder_is_superseded_after_the_lapse_and_can_do_nothing_when_it_wakes(
    home: Path,
    database_url: str,
    store: Store,
    new_run: NewRun,
    start_holder: Callable[..., Any],
    do_round: DoRound,
) -> None:
    new_run()
    holder = start_holder(heartbeat_s=0.1, lapse_s=1.0)
    assert holder.ask("lease.reserve(1)") == "1"
    assert holder.ask("lease.seal(1, 1, b'sum')") == "None"
    stop(holder, database_url)
    with store.acquire("r") as lease:
        assert lease.fence == 2
        do_round(lease, 1)
        holder.signal(signal.SIGCONT)
        for call in [
            "lease.reserve(2)",
            "lease.seal(2, 1, b'late')",
            "lease.commit(1, state=b'late', params_digest='f', result={})",
            "lease.commit(2, state=b'late', params_digest='f', result={})",
            "lease.finish(RunState.COMPLETED)",
            "lease.begin_attempt()",
            "lease.note(tracked_round=7)",
            "lease.collect_garbage()",
        ]:
            assert holder.ask(call) == "LeaseLost", call
        assert holder.ask("lease.lost") == "True"
        assert holder.ask("lease.release()") == "None"
        do_round(lease, 2)  # releasing a lost lease does not release its successor's
        assert not lease.lost
    assert store.run("r").committed_round == 2
    assert [charge.state for charge in store.ledger.collections("r")] == ["spent", "spent"]
    assert {path.parent.name for path in (home / "blobs" / "r").rglob("*") if path.is_file()} == {"000000", "000002"}


def test_a_stopped_holder_that_wakes_in_time_keeps_its_lease(
    database_url: str, store: Store, new_run: NewRun, start_holder: Callable[..., Any]
) -> None:
    new_run()
    holder = start_holder(heartbeat_s=0.2, lapse_s=20)
    stop(holder, database_url)
    with pytest.raises(LeaseHeld):
        store.acquire("r", say=lambda _: holder.signal(signal.SIGCONT))
    assert holder.ask("lease.begin_attempt()") == "1"


def test_a_superseded_lease_changes_nothing(home: Path, store: Store, new_run: NewRun) -> None:
    new_run()
    with store.acquire("r") as lease:
        lease.reserve(1)
        change_lease(store, fence=leases.c.fence + 1)

        def everything() -> Any:
            blobs = {path: path.read_bytes() for path in (home / "blobs").rglob("*") if path.is_file()}
            return store.run("r"), store.ledger.collections("r"), store.rounds("r"), list(store.journal()), blobs

        before = everything()
        calls: list[Callable[[], object]] = [
            lambda: lease.reserve(1),
            lambda: lease.seal(1, 1, b"late"),
            lambda: lease.commit(1, state=b"late", params_digest="f", result={}),
            lambda: lease.finish(RunState.COMPLETED),
            lambda: lease.begin_attempt(),
            lambda: lease.note(tracked_round=7),
            lambda: lease.collect_garbage(),
        ]
        for call in calls:
            with pytest.raises(LeaseLost, match="taken run r over"):
                call()
            assert everything() == before
        assert lease.lost


@pytest.mark.parametrize("step", ["seal", "commit"])
def test_a_holder_superseded_between_blob_and_row_leaves_only_garbage(
    store: Store, new_run: NewRun, do_round: DoRound, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    new_run()
    late = store.acquire("r")
    late.reserve(1)
    if step == "commit":
        late.seal(1, 1, b"sum 1")
    write = store._blobs.write

    def stop_after_writing(run_id: str, fence: int, data: bytes) -> str:
        key = write(run_id, fence, data)
        monkeypatch.undo()
        change_lease(store, lapse_s=0.0)  # it was silent for too long
        with store.acquire("r") as newer:
            do_round(newer, 1)
            assert newer.collect_garbage() == 1  # what the late one has just written
        return key

    monkeypatch.setattr(store._blobs, "write", stop_after_writing)
    with pytest.raises(LeaseLost):
        if step == "seal":
            late.seal(1, 1, b"late")
        else:
            late.commit(1, state=b"late", params_digest="f", result={})
    assert store.state_blob("r") == b"state 1"
    late.release()


@pytest.mark.parametrize("step", ["seal", "commit"])
def test_a_holder_superseded_while_it_writes_a_blob_learns_that_it_is_superseded(
    store: Store, new_run: NewRun, do_round: DoRound, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    new_run()
    late = store.acquire("r")
    late.reserve(1)
    if step == "commit":
        late.seal(1, 1, b"sum 1")
    replace = os.replace

    def stop_before_renaming(temporary: Path, path: Path) -> None:
        monkeypatch.undo()
        change_lease(store, lapse_s=0.0)  # it was silent for too long
        with store.acquire("r") as newer:
            do_round(newer, 1)
            assert newer.collect_garbage() == 1
        replace(temporary, path)

    monkeypatch.setattr(os, "replace", stop_before_renaming)
    with pytest.raises(LeaseLost, match="taken run r over"):
        if step == "seal":
            late.seal(1, 1, b"late")
        else:
            late.commit(1, state=b"late", params_digest="f", result={})
    late.release()


def test_the_heartbeat_keeps_the_lease_and_notices_its_loss(
    open_store: Callable[..., Store], store: Store, new_run: NewRun
) -> None:
    new_run()

    def heartbeat_at() -> float:
        with store._database.snapshot() as connection:
            return float(connection.execute(leases.select()).one().heartbeat_at)

    lease = open_store(heartbeat_s=0.05, lapse_s=20).acquire("r")
    first = heartbeat_at()
    wait_for(lambda: heartbeat_at() > first)
    change_lease(store, fence=leases.c.fence + 1)
    wait_for(lambda: lease.lost)
    lease.release()


@pytest.mark.parametrize("fault", [StoreError("the disk is full"), RuntimeError("can't start new thread")])
def test_the_heart_goes_on_after_a_fault(
    open_store: Callable[..., Store], new_run: NewRun, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    new_run()
    store = open_store(heartbeat_s=0.05, lapse_s=20)
    lease = store.acquire("r")
    beats: list[bool] = []
    transaction = store._transaction

    def faulty() -> Any:
        beats.append(len(beats) % 2 == 0)
        if beats[-1]:
            raise fault
        return transaction()

    monkeypatch.setattr(store, "_transaction", faulty)
    wait_for(lambda: len(beats) >= 4)
    monkeypatch.undo()
    assert not lease.lost
    lease.begin_attempt()
    lease.release()


def test_a_lease_ends_with_its_block_whatever_happens_in_it(store: Store, new_run: NewRun) -> None:
    new_run()
    with pytest.raises(KeyError), store.acquire("r"):
        raise KeyError("a bug")
    with store.acquire("r", say=forbid_waiting):
        pass
    assert not [thread for thread in threading.enumerate() if thread.name == "lease r"]


def test_a_lapse_needs_several_heartbeats(open_store: Callable[..., Store]) -> None:
    with pytest.raises(ValueError, match="heartbeat_s"):
        open_store(heartbeat_s=5, lapse_s=6)
