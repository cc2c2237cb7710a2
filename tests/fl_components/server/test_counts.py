"""Under a claim that hides the cohort, whatever can be counted of a round follows from public values."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedrounds.fl_components.account import Account
from fedrounds.fl_components.config import parse_config
from fedrounds.fl_components.executors import LocalExecution
from fedrounds.fl_components.rejections import Rejection, RejectionCode
from fedrounds.fl_components.server import run as run_module
from fedrounds.fl_components.server import stages
from fedrounds.fl_components.server.opening import open_run
from fedrounds.fl_components.server.run import Run
from fedrounds.fl_components.store import Lease, Store
from fedrounds.fl_components.values import CohortStatistics, SealedCohort, Weighted
from fedrounds.flows.round import walk
from tests.fl_components.server.wards import FIELDS, TERMS, WARDS

NUM_CLIENTS, FEATURES = 20, 5000


def small_wards() -> dict[str, tuple[Any, ...]]:
    found = {}
    for ward in range(NUM_CLIENTS):
        x = np.random.default_rng(ward).standard_normal((6 + ward % 3, FEATURES)).astype(np.float32)
        y = (x[:, 0] > 0).astype(np.int64)
        found[f"ward-{ward}"] = (x[2:], y[2:], x[:2], y[:2])
    return found


SEVERAL_WAVES = FIELDS | {
    "rounds": 6,
    "data": {"kind": "function", "path": f"{__name__}:small_wards", "num_classes": 2},
    "selection": {"kind": "poisson", "sampling_rate": 0.3},
    "compression": {"kind": "qsgd"},
    "execution": {"memory_mb": 1, "processes": 1},  # four clients at a time
}


def counts(run: Run, round: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """All that a view could count of a round."""
    seen: list[str] = []
    said: list[str] = []
    sizes: list[int] = []
    seal = type(run.lease).seal
    run.on_stage, run.notify = seen.append, said.append
    with monkeypatch.context() as patched:

        def measured(lease: Lease, n: int, c: int, data: bytes, states: Any) -> None:
            sizes.append(len(data))
            seal(lease, n, c, data, states)

        patched.setattr(Lease, "seal", measured)
        rows = run.store.journal_head().rows
        walk(stages, run, round)
    record = run.store.round("r", round)
    assert record is not None
    shown = tuple(sorted(record.result["metrics"]))
    return Counter(seen).most_common(), seen, said, sizes, run.store.journal_head().rows - rows, shown


def test_what_can_be_counted_of_a_round_is_the_same_for_each_cohort(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.ledger.set_budget(Account("wards"), replace(TERMS, epsilon=1000.0), reason="a test", by="ada")
    with open_run(store, "r", config=parse_config(SEVERAL_WAVES)) as run:
        found = [counts(run, round, monkeypatch) for round in range(1, 7)]
    cohorts = {row.withheld["metrics"]["clients/selected"] for row in store.rounds("r")}
    assert len(cohorts) > 1
    assert all(each == found[0] for each in found)
    assert dict(found[0][0])["train"] == dict(found[0][0])["compress"] == dict(found[0][0])["admit"] == 5  # four of 20


def test_a_cohort_that_is_not_withheld_has_as_many_waves_as_it_needs(store: Store) -> None:
    plain = SEVERAL_WAVES | {"privacy": {"kind": "none"}, "population": "plain"}
    with open_run(store, "r", config=parse_config(plain)) as run:
        plan = stages.select(run, run.state(), stages.broadcast(run, run.state()))
        assert 0 < len(plan.waves) <= len(plan.cohort)
        assert all(wave.stop > wave.start for wave in plan.waves)


@given(st.integers(0, 400), st.integers(1, 400), st.integers(1, 60), st.booleans())
def test_equal_waves(num_clients: int, largest: int, most: int, additive: bool) -> None:
    """Their number does not depend on the cohort; together they are the cohort; none of a possible one is too large."""
    rule = LocalExecution(memory_mb=1)
    num_parameters = int(1e6) // (20 * most)
    waves = rule.equal_waves(num_clients, largest, num_parameters, additive=additive)
    assert len(waves) == len(rule.equal_waves(0, largest, num_parameters, additive=additive))
    assert [row for wave in waves for row in range(wave.start, wave.stop)] == list(range(num_clients))
    if num_clients <= largest and not additive:
        assert max(wave.stop - wave.start for wave in waves) <= int(1e6) // (20 * num_parameters)


@pytest.mark.parametrize(("rate", "num_clients", "most"), [(0.05, 100, 37), (0.5, 9, 9), (1.0, 9, 9)])
def test_the_largest_cohort_follows_from_public_values(store: Store, rate: float, num_clients: int, most: int) -> None:
    changes = {
        "selection": {"kind": "poisson", "sampling_rate": rate},
        "data": {"kind": "digits", "partition": {"kind": "iid", "num_clients": num_clients}},
    }
    with open_run(store, "r", config=parse_config(FIELDS | changes)) as run:
        assert run.federation.largest_cohort == most


@pytest.mark.parametrize("beyond", [-40, -8, 0, 8, 40])
def test_a_seal_is_as_long_whatever_it_holds(store: Store, monkeypatch: pytest.MonkeyPatch, beyond: int) -> None:
    """Of a sum whose length is about a multiple of anything that it might be padded to; and of refused clients with
    the longest names and reasons."""
    store.ledger.set_budget(Account("wards"), replace(TERMS, epsilon=1000.0), reason="a test", by="ada")
    lengths = set[int]()
    with open_run(store, "r", config=parse_config(FIELDS | {"data": WARDS})) as run:
        state = stages.load(run, 1)
        plan = stages.authorise(run, stages.select(run, state, stages.broadcast(run, state)))
        tensors = {"sum": np.zeros((run_module.SEAL_BYTES + beyond) // 8)}
        monkeypatch.setattr(Lease, "seal", lambda _, round, collection, data, states: lengths.add(len(data)))
        rejection = Rejection(RejectionCode.UNDECODABLE, "\u20ac" * 300)
        long = {"\U00020000" * 99 + str(row): rejection for row in range(9)}
        for collected in (
            SealedCohort(tensors),
            SealedCohort(
                tensors,
                CohortStatistics(
                    selected=9, received=9, train_loss=Weighted(1 / 3, 2 / 3), upload_bytes=2**40, slowest_s=1 / 7
                ),
            ),
            SealedCohort(
                tensors, CohortStatistics(received=9, rejected=long, seconds=dict.fromkeys("abcdefghi", 1 / 3))
            ),
        ):
            run.seal(plan, collected)
    assert len(lengths) == 1
