"""What the store remembers, on both databases."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedrounds.fl_components.account import Account
from fedrounds.fl_components.errors import ConfigError, CorruptBlob, RunConflict, RunNotFound, StoreError
from fedrounds.fl_components.run_state import RunState
from fedrounds.fl_components.store import BudgetTerms, Charges, CollectionRecord, RoundRecord, RunRecord, Seal, Store

NewRun = Callable[..., RunRecord]
DoRound = Callable[..., RoundRecord]


def files(home: Path) -> set[str]:
    return {str(path.relative_to(home / "blobs")) for path in (home / "blobs").rglob("*") if path.is_file()}


# --- runs ---


TERMS = BudgetTerms(None, 1e-5, unit="client", neighbouring="add_or_remove", accountant="RDP", demonstration=False)


def charges(event: dict[str, Any] = {"event": "gaussian"}, population: str = "p") -> list[Charges]:  # noqa: B006
    """What a round costs a population."""
    return [Charges({Account(population): event}, lambda *_: None)]


def test_a_new_run_is_remembered_as_it_was_given(store: Store, new_run: NewRun) -> None:
    made = new_run()
    assert made == store.run("r") == store.find_run("r")
    assert (made.state, made.committed_round, made.attempt, made.error) == ("Pending", 0, 0, None)
    assert made.config == {"seed": 0, "training": {"learning_rate": 0.1, "steps": [1, 2]}}
    assert (made.engine, made.source_folder, made.ancestor) == ({"torch": "2.13.0"}, "/source", None)
    assert (made.mlflow_run_id, made.tracked_round, made.model_uri, made.prefect_flow_runs) == (None, 0, None, [])
    assert store.state_blob("r") == store.read_blob(made.initial_state_key) == b"initial"
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.state = "Completed"  # type: ignore[misc]


def test_creating_a_run_again_changes_nothing(store: Store, new_run: NewRun) -> None:
    made = new_run()
    assert new_run(initial_state=b"another", params_digest="1" * 64) == made
    assert store.state_blob("r") == b"initial"
    assert store.verify_journal().rows == 1


def test_another_configuration_is_a_conflict_that_names_the_fields(new_run: NewRun) -> None:
    new_run()
    other = {"seed": 0, "training": {"learning_rate": 0.2, "steps": (1, 2)}, "privacy": {"kind": "none"}}
    with pytest.raises(RunConflict) as caught:
        new_run(config=other, config_digest="d" * 64)
    assert "training.learning_rate (0.1, now 0.2)" in caught.value.message
    assert 'privacy.kind (not set, now "none")' in caught.value.message
    assert "seed" not in caught.value.message
    assert "steps" not in caught.value.message  # a tuple is a list in JSON
    with pytest.raises(RunConflict, match="no field differs"):
        new_run(config_digest="d" * 64)


def test_a_run_id_that_is_no_file_name_is_refused(new_run: NewRun) -> None:
    for run_id in ("", "a/b", "..", ".hidden", "a b", "x" * 129):
        with pytest.raises(ConfigError, match="run id"):
            new_run(run_id)


def test_processes_that_create_one_run_at_once_make_one(open_store: Callable[..., Store], new_run: NewRun) -> None:
    stores = [open_store() for _ in range(4)]
    barrier = threading.Barrier(len(stores))
    made: list[RunRecord] = []

    def create(store: Store) -> None:
        barrier.wait()
        made.append(new_run("same", store))

    threads = [threading.Thread(target=create, args=[store]) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [stores[0].run("same")] * 4
    assert stores[0].verify_journal().rows == 1


def test_runs_are_listed_newest_first(store: Store, new_run: NewRun) -> None:
    for run_id, name in [("b", "digits"), ("a", "digits"), ("c", "heart")]:
        new_run(run_id, name=name)
    assert [run.run_id for run in store.runs()] == ["c", "a", "b"]
    assert [run.run_id for run in store.runs(name="digits")] == ["a", "b"]
    assert [run.run_id for run in store.runs(limit=1)] == ["c"]


def test_what_is_not_there(store: Store) -> None:
    assert store.find_run("x") is None
    assert store.latest_unfinished() is None
    assert store.latest_model("digits") is None
    assert store.rounds("x") == []
    assert store.round("x", 1) is None
    assert store.ledger.charges(Account("p")) == []
    assert store.sealed("x", 1) is None
    for missing in (store.run, store.state_blob, store.acquire):
        with pytest.raises(RunNotFound, match="'x'"):
            missing("x")


def test_the_latest_unfinished_run_is_the_one_worked_on_last(store: Store, new_run: NewRun) -> None:
    for run_id in ("a", "b", "c"):
        new_run(run_id)
    for run_id, state in [("c", "Completed"), ("b", "Failed"), ("a", "Cancelled")]:
        with store.acquire(run_id) as lease:
            lease.begin_attempt()
            lease.finish(RunState(state))
    latest = store.latest_unfinished()
    assert latest is not None
    assert latest.run_id == "a"
    with store.acquire("b") as lease:
        lease.begin_attempt()
    latest = store.latest_unfinished()
    assert latest is not None
    assert latest.run_id == "b"


@pytest.mark.parametrize("code", ["too_few_clients", "run_failed"])
def test_a_run_that_would_fail_again_is_passed_over(store: Store, new_run: NewRun, code: str) -> None:
    for run_id, told in [("a", "data"), ("b", code)]:
        new_run(run_id)
        with store.acquire(run_id) as lease:
            lease.begin_attempt()
            lease.finish(RunState.FAILED, error={"code": told, "message": "no", "hint": None})
    latest = store.latest_unfinished()
    assert latest is not None
    assert latest.run_id == "a"


def test_a_run_is_held_while_its_process_lives(store: Store, new_run: NewRun, start_holder: Callable[..., Any]) -> None:
    new_run("a")
    assert not store.is_held("a")
    with store.acquire("a"):
        assert store.is_held("a")
    assert not store.is_held("a")
    holder = start_holder("a")
    assert store.is_held("a")
    holder.kill()
    assert not store.is_held("a")


def test_a_completed_run_is_unfinished_until_its_lease_is_given_back(store: Store, new_run: NewRun) -> None:
    """Killed after the last round, it has views to repair."""
    new_run("a")
    with store.acquire("a") as lease:
        lease.begin_attempt()
        lease.finish(RunState.COMPLETED)
        latest = store.latest_unfinished()
        assert latest is not None
        assert latest.run_id == "a"
    assert store.latest_unfinished() is None


def test_the_latest_model_is_that_of_the_completed_run_of_the_name_trained_last(
    store: Store, new_run: NewRun, do_round: DoRound
) -> None:
    for run_id, name in [("a", "digits"), ("b", "digits"), ("c", "heart"), ("d", "digits"), ("e", "digits")]:
        new_run(run_id, name=name)
    for run_id, state in [("b", "Completed"), ("a", "Completed"), ("c", "Completed"), ("d", "Failed")]:
        with store.acquire(run_id) as lease:
            do_round(lease, 1)
            lease.finish(RunState(state))
    with store.acquire("b") as lease:  # repairing what its views show makes no newer model
        lease.begin_attempt()
        lease.finish(RunState.COMPLETED)
    latest = store.latest_model("digits")
    assert latest is not None
    assert latest.run_id == "a"


# --- a round ---


def test_a_round_step_by_step(store: Store, new_run: NewRun) -> None:
    new_run()
    with store.acquire("r") as lease:
        assert lease.reserve(1) == 1
        (reserved,) = store.ledger.collections("r")
        assert reserved == CollectionRecord("r", 1, 1, "reserved", reserved.reserved_at, None)
        assert store.sealed("r", 1) is None

        lease.seal(1, 1, b"sum")
        assert store.sealed("r", 1) == Seal(1, b"sum")
        assert store.run("r").committed_round == 0

        result = {"metrics": {"train/loss": 0.1 + 0.2}, "rejected": {"norm": 2}, "seconds": {"train": 1e-9}}
        record = lease.commit(1, state=b"state 1", params_digest="1" * 64, result=result)
        assert record == store.round("r", 1)
        assert record.result == result
        assert store.rounds("r") == [record]
        assert store.rounds("r", after=1) == []
        run = store.run("r")
        assert (run.committed_round, run.params_digest) == (1, "1" * 64)
        assert store.state_blob("r") == b"state 1"
        assert store.sealed("r", 1) is None
        (spent,) = store.ledger.collections(run_id="r")
        assert (spent.state, spent.settled_at) == ("spent", record.committed_at)


def test_each_step_again_changes_nothing(store: Store, new_run: NewRun, do_round: DoRound) -> None:
    new_run()
    with store.acquire("r") as lease:
        assert [lease.reserve(1), lease.reserve(1)] == [1, 1]
        lease.seal(1, 1, b"sum")
        lease.seal(1, 1, b"another sum")
        assert store.sealed("r", 1) == Seal(1, b"sum")
        first = do_round(lease, 1)
        again = lease.commit(1, state=b"another", params_digest=first.params_digest, result={})
        assert again == first
        assert store.state_blob("r") == b"state 1"
        assert [charge.state for charge in store.ledger.collections("r")] == ["spent"]
        assert store.verify_journal().rows == 4  # created, reserved, sealed, committed


def test_steps_out_of_order_are_refused(store: Store, new_run: NewRun, do_round: DoRound) -> None:
    new_run()
    store.ledger.set_budget(Account("p"), TERMS, reason="x", by="ada")
    with store.acquire("r") as lease:
        with pytest.raises(StoreError, match="last committed one is 0"):
            lease.reserve(2)
        with pytest.raises(StoreError, match="nothing is reserved"):
            lease.seal(1, 1, b"sum")
        with pytest.raises(StoreError, match="nothing is reserved"):
            lease.commit(1, state=b"s", params_digest="1", result={})
        lease.reserve(1)
        with pytest.raises(StoreError, match="for collection 2"):
            lease.seal(1, 2, b"sum")
        with pytest.raises(StoreError, match="another privacy event"):
            lease.reserve(1, charges({"event": "gaussian"}))
        do_round(lease, 1)
        with pytest.raises(StoreError, match="last committed one is 1"):
            lease.reserve(1)
        with pytest.raises(StoreError, match="other parameters"):
            lease.commit(1, state=b"s", params_digest="f" * 64, result={})
        with pytest.raises(ValueError, match="JSON"):
            lease.reserve(2, charges({"noise_multiplier": float("nan")}))
    assert store.run("r").committed_round == 1
    assert store.verify_journal().rows == 5


def test_charges_of_all_runs_of_an_account_come_in_order(store: Store, new_run: NewRun) -> None:
    for population in ("p", "q"):
        store.ledger.set_budget(Account(population), TERMS, reason="x", by="ada")
    for run_id, population in (("b", "p"), ("a", "p"), ("other", "q")):
        new_run(run_id, population=population)
    for run_id, round in [("b", 1), ("a", 1), ("other", 1), ("b", 2)]:
        with store.acquire(run_id) as lease:
            lease.seal(round, lease.reserve(round, charges(population=store.run(run_id).population)), b"sum")
            lease.commit(round, state=b"s", params_digest=str(round), result={})
    assert [(c.run_id, c.round) for c in store.ledger.charges(Account("p"))] == [("b", 1), ("a", 1), ("b", 2)]
    assert [(c.run_id, c.round) for c in store.ledger.collections("b")] == [("b", 1), ("b", 2)]
    assert len(store.ledger.charges()) == 4


# --- the run's state ---


def test_attempts_and_final_states(store: Store, new_run: NewRun) -> None:
    created = new_run()
    error = {"code": "too_few_clients", "message": "1 of 3", "hint": None}
    with store.acquire("r") as lease:
        assert lease.begin_attempt() == 1
        assert (store.run("r").state, store.run("r").attempt) == ("Running", 1)
        lease.finish(RunState.TOO_FEW_CLIENTS, error)
        lease.finish(RunState.TOO_FEW_CLIENTS, error)
        failed = store.run("r")
        assert (failed.state, failed.error) == ("TooFewClients", error)
        assert failed.updated_at >= created.updated_at
        assert lease.begin_attempt() == 2
        assert (store.run("r").state, store.run("r").error) == ("Running", None)
        with pytest.raises(ValueError, match="Running is not a final state"):
            lease.finish(RunState.RUNNING)
        lease.finish(RunState.COMPLETED)
    kinds = [row.kind for row in store.journal("r")]
    assert kinds == ["run.created", "attempt.begun", "run.finished", "attempt.begun", "run.finished"]


def test_notes_move_what_they_name_and_nothing_else(store: Store, new_run: NewRun) -> None:
    before = new_run()
    one, two = {"id": "1", "url": "http://one"}, {"id": "2", "url": "http://two"}
    with store.acquire("r") as lease:
        lease.note()
        lease.note(mlflow_run_id="m", prefect_flow_run=one)
        lease.note(tracked_round=3, prefect_flow_run=one)
        lease.note(model_uri="models:/digits/1", prefect_flow_run=two)
    expected = dataclasses.replace(
        before, mlflow_run_id="m", tracked_round=3, model_uri="models:/digits/1", prefect_flow_runs=[one, two]
    )
    assert store.run("r") == expected
    assert store.verify_journal().rows == 1


# --- blobs ---


def test_the_initial_and_the_last_two_states_are_kept(
    home: Path, store: Store, new_run: NewRun, do_round: DoRound
) -> None:
    initial = new_run().initial_state_key
    with store.acquire("r") as lease:
        for round in range(1, 6):
            record = do_round(lease, round)
            kept = {r.state_key for r in store.rounds("r") if r.state_key}
            assert kept == {r.state_key for r in store.rounds("r", after=max(0, round - 2))}
            assert files(home) == kept | {initial}
            assert record.state_key in kept
        assert lease.collect_garbage() == 0
        assert [store.read_blob(r.state_key) for r in store.rounds("r", after=3) if r.state_key] == [
            b"state 4",
            b"state 5",
        ]


def test_equal_states_share_a_blob_that_is_kept_while_one_needs_it(
    store: Store, new_run: NewRun, do_round: DoRound
) -> None:
    new_run()
    with store.acquire("r") as lease:
        for round, state in enumerate([b"same", b"other", b"same", b"other", b"sum 6"], start=1):
            do_round(lease, round, state)
            assert store.state_blob("r") == state
        lease.reserve(6)
        lease.seal(6, 1, b"sum 6")  # the content of round 5's state, under the same fence: one blob
        lease.commit(6, state=b"last", params_digest="6", result={})
        assert store.read_blob(str(store.rounds("r", after=4)[0].state_key)) == b"sum 6"


def test_garbage_is_what_no_row_refers_to(home: Path, store: Store, new_run: NewRun, do_round: DoRound) -> None:
    new_run()
    new_run("other")
    with store.acquire("r") as lease:
        for round in (1, 2, 3):
            do_round(lease, round)
        lease.reserve(4)
        lease.seal(4, 1, b"open seal")
        (home / "blobs" / "r" / ".DS_Store").write_bytes(b"not a blob")
        used = files(home)
        store._blobs.write("r", lease.fence, b"committed by nobody")
        store._blobs.write("r", 0, b"an initial state that lost a race")
        (home / "blobs" / "r" / f"{lease.fence:06d}" / ".half-written.0123").write_bytes(b"hal")
        store._blobs.write("r", lease.fence + 1, b"of a later holder, whose row is yet to come")
        assert lease.collect_garbage() == 3
        assert lease.collect_garbage() == 0
        later = files(home) - used
        assert {key.split("/")[1] for key in later} == {f"{lease.fence + 1:06d}"}
        assert used <= files(home)
        assert store.sealed("r", 4) == Seal(1, b"open seal")


def test_a_damaged_or_missing_blob_is_named(home: Path, store: Store, new_run: NewRun) -> None:
    key = new_run().initial_state_key
    (home / "blobs" / key).write_bytes(b"initiaL")
    with pytest.raises(CorruptBlob, match=f"{key}.*damaged"):
        store.state_blob("r")
    (home / "blobs" / key).unlink()
    with pytest.raises(CorruptBlob, match=f"{key}.*missing"):
        store.state_blob("r")
    with store.acquire("r") as lease:
        lease.reserve(1)
        lease.seal(1, 1, b"sum")
        for path in (home / "blobs" / "r" / f"{lease.fence:06d}").iterdir():
            path.unlink()
        with pytest.raises(CorruptBlob, match="missing"):
            store.sealed("r", 1)


@pytest.mark.ci
def test_a_reader_keeps_up_with_a_run_that_prunes(
    open_store: Callable[..., Store], store: Store, new_run: NewRun, do_round: DoRound
) -> None:
    new_run()
    reader = open_store()
    done = threading.Event()
    seen: list[bytes] = []
    faults: list[Exception] = []

    def read() -> None:
        try:
            while not done.is_set():
                seen.append(reader.state_blob("r"))
        except Exception as error:
            faults.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    with store.acquire("r") as lease:
        for round in range(1, 31):
            do_round(lease, round)
    done.set()
    thread.join()
    assert faults == []
    assert seen
    assert set(seen) <= {b"initial", *(f"state {round}".encode() for round in range(1, 31))}


def test_one_lease_serves_several_threads(store: Store, new_run: NewRun, do_round: DoRound) -> None:
    new_run()
    faults: list[Exception] = []

    def track(thread: int) -> None:
        try:
            for n in range(10):
                lease.note(prefect_flow_run={"id": f"{thread}-{n}", "url": ""})
                lease.collect_garbage()
        except Exception as error:
            faults.append(error)

    with store.acquire("r") as lease:
        threads = [threading.Thread(target=track, args=[n]) for n in range(2)]
        for thread in threads:
            thread.start()
        for round in range(1, 11):
            do_round(lease, round)
        for thread in threads:
            thread.join()
    assert faults == []
    assert len(store.run("r").prefect_flow_runs) == 20
    assert store.state_blob("r") == b"state 10"
    store.verify_journal()


def test_blobs_in_an_object_store(open_store: Callable[..., Store], new_run: NewRun, do_round: DoRound) -> None:
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    class Bucket(MemoryFileSystem):  # type: ignore[misc]
        """The memory of this process behind a name of its own: the store refuses memory://."""

        protocol = "bucket"

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return str(super()._strip_protocol(str(path).removeprefix("bucket://")))

    fsspec.register_implementation("bucket", Bucket, clobber=True)
    store = open_store(blobs_url="bucket://bucket/blobs")
    memory = fsspec.filesystem("memory")
    try:
        new_run(in_store=store)
        with store.acquire("r") as lease:
            for round in (1, 2, 3):
                do_round(lease, round)
            store._blobs.write("r", lease.fence, b"garbage")
            assert lease.collect_garbage() == 1
            assert store.state_blob("r") == b"state 3"
            assert len(memory.find("/bucket/blobs")) == 3
            memory.rm("/bucket/blobs", recursive=True)
            with pytest.raises(CorruptBlob, match="missing"):
                store.state_blob("r")
    finally:
        if memory.exists("/bucket"):
            memory.rm("/bucket", recursive=True)


def test_blobs_at_an_unknown_place_are_a_store_error(open_store: Callable[..., Store], new_run: NewRun) -> None:
    store = open_store(blobs_url="nonsense://bucket")
    with pytest.raises(StoreError, match="nonsense") as caught:
        new_run(in_store=store)
    assert "FEDROUNDS_BLOBS_URL" in (caught.value.hint or "")
