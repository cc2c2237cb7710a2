"""How often each client took part, on both databases: counted with the round, once, and by its holder alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from sqlalchemy import insert, select, update
from sqlalchemy.exc import IntegrityError

from fedrounds.fl_components.errors import LeaseLost, StoreError
from fedrounds.fl_components.store import RoundRecord, RunRecord, Store
from fedrounds.fl_components.store.lease import Lease
from fedrounds.fl_components.store.schema import leases, participations

NewRun = Callable[..., RunRecord]


def commit(lease: Lease, round: int, participants: Sequence[int] = ()) -> RoundRecord:
    lease.seal(round, lease.reserve(round), b"sum")
    return commit_sealed(lease, round, participants)


def commit_sealed(lease: Lease, round: int, participants: Sequence[int]) -> RoundRecord:
    return lease.commit(
        round, state=b"state", params_digest=f"{round:064d}", result={"metrics": {}}, participants=participants
    )


def rows(store: Store) -> list[tuple[str, int, int, int]]:
    with store._database.snapshot() as connection:
        found = connection.execute(select(participations).order_by(participations.c.run_id, participations.c.client))
        return [(each.run_id, each.client, each.rounds, each.last_round) for each in found]


def test_each_committed_round_counts_its_participants(store: Store, new_run: NewRun) -> None:
    new_run()
    assert store.participations("r", [0, 7]) == [0, 0]
    with store.acquire("r") as lease:
        commit(lease, 1, [0, 2])
        commit(lease, 2, [2, 9])
        commit(lease, 3)
        assert store.participations("r", [9, 2, 0, 7]) == [1, 2, 1, 0]  # in the order of the question
    assert rows(store) == [("r", 0, 1, 1), ("r", 2, 2, 2), ("r", 9, 1, 2)]
    assert store.participations("r", []) == []


def test_a_round_that_is_committed_again_counts_once(
    open_store: Callable[..., Store], store: Store, new_run: NewRun
) -> None:
    new_run()
    with store.acquire("r") as lease:
        first = commit(lease, 1, [0, 1])
        assert commit_sealed(lease, 1, [0, 1]) == first
    with open_store().acquire("r") as lease:  # as after a crash that came just after the commit
        assert commit_sealed(lease, 1, [0, 1]) == first
    assert store.participations("r", [0, 1]) == [1, 1]


def test_runs_count_for_themselves(store: Store, new_run: NewRun) -> None:
    new_run("r")
    new_run("other")
    for run_id, participants in (("r", [1]), ("other", [1, 2])):
        with store.acquire(run_id) as lease:
            commit(lease, 1, participants)
    assert store.participations("r", [1, 2]) == [1, 0]
    assert store.participations("other", [1, 2]) == [1, 1]


def test_a_cohort_of_thousands_and_rows_beyond_four_bytes(store: Store, new_run: NewRun) -> None:
    new_run()
    cohort = [3 * 10**9 + 2 * row for row in range(2500)]
    with store.acquire("r") as lease:
        commit(lease, 1, cohort)
        commit(lease, 2, cohort[1::2])
    counts = store.participations("r", [row + odd for row in cohort for odd in (0, 1)])
    assert counts == [1, 0, 2, 0] * 1250


def test_a_commit_that_fails_counts_nothing(store: Store, new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    new_run()
    with store.acquire("r") as lease:
        commit(lease, 1, [5])
        with pytest.raises(StoreError, match="already committed with other parameters"):
            lease.commit(1, state=b"s", params_digest="f" * 64, result={}, participants=[5])
        with pytest.raises(StoreError, match="last committed one is 1"):
            commit_sealed(lease, 3, [5])

        def fail(*_: object) -> None:
            raise RuntimeError("in the middle of the transaction, after the counting")

        lease.seal(2, lease.reserve(2), b"sum")
        with monkeypatch.context() as patched:
            patched.setattr(lease, "_append", fail)
            with pytest.raises(RuntimeError, match="in the middle"):
                commit_sealed(lease, 2, [5, 6])
        assert store.participations("r", [5, 6]) == [1, 0]
        commit_sealed(lease, 2, [5, 6])
    assert store.participations("r", [5, 6]) == [2, 1]


def test_a_superseded_holder_counts_nothing(store: Store, new_run: NewRun) -> None:
    new_run()
    with store.acquire("r") as lease:
        lease.seal(1, lease.reserve(1), b"sum")
        with store._transaction() as connection:
            connection.execute(update(leases).values(fence=leases.c.fence + 1))
        with pytest.raises(LeaseLost):
            commit_sealed(lease, 1, [4])
    assert rows(store) == []


def test_a_client_s_row_needs_a_run(store: Store) -> None:
    with pytest.raises(IntegrityError), store._transaction() as connection:
        connection.execute(insert(participations).values(run_id="nobody", client=1, rounds=1, last_round=1))
