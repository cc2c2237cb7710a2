"""Aggregators that need every update, in whole rounds."""

from __future__ import annotations

import tracemalloc
from typing import Any, Literal

import numpy as np
import pytest

from fedrounds.fl_components.aggregation import AggregationResult, Aggregator, GeometricMedian, Updates
from fedrounds.fl_components.arrays import Tensors
from fedrounds.fl_components.config import parse_config
from fedrounds.fl_components.errors import ConfigError, TooFewClients
from fedrounds.fl_components.server import stages
from fedrounds.fl_components.server.opening import open_run
from fedrounds.fl_components.store import Lease, Store
from fedrounds.flows.round import walk

from .conftest import FIELDS, StartRun
from .rounds import begin, collect, step

pytestmark = pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # of a rule that is in no union

MIXED = {
    "kind": "geometric_median",
    "prepare": [{"kind": "nearest_neighbor_mixing", "num_byzantine": 2}],
}


class Remembering(Aggregator):
    """The mean of all updates but the longest, and the aggregate of the round before, half and half."""

    kind: Literal["remembering"] = "remembering"

    @property
    def min_updates(self) -> int:
        return 2

    def init(self, num_coordinates: int) -> Tensors:
        return {"last": np.zeros(num_coordinates)}

    def aggregate(self, updates: Updates, state: Tensors) -> AggregationResult:
        longest = int(np.linalg.norm(updates.updates_NM, axis=1).argmax())
        mean_M = np.delete(updates.updates_NM, longest, axis=0).mean(0, dtype=np.float64)
        aggregate_M = (mean_M + state["last"]) / 2
        excluded = {updates.client_ids[longest]: "its update is the longest"}
        return AggregationResult(aggregate_M, {"last": aggregate_M}, {"norm": 1.5}, excluded)


def remembering(store: Store, run_id: str = "r") -> Any:
    config = parse_config(FIELDS).model_copy(update={"aggregation": Remembering()})
    return open_run(store, run_id, config=config)


def test_state_metrics_and_exclusions_are_kept(store: Store) -> None:
    with remembering(store) as run:
        for round in (1, 2):
            before = run.state()
            result = walk(stages, run, round)
            after = run.state()
            step_D = after.params_D - before.params_D
            np.testing.assert_allclose(step_D, after.aggregator["last"], atol=1e-6)
            assert not np.array_equal(after.aggregator["last"], before.aggregator["last"])
            assert (result.rejected, result.metrics["aggregation/norm"]) == ({"excluded": 1}, 1.5)
            assert result.metrics["clients/received"] == 9


def test_a_resume_finishes_from_the_sealed_aggregate(store: Store) -> None:
    with remembering(store, "whole") as run:
        expected = [walk(stages, run, round).params_digest for round in (1, 2)]
    with remembering(store, "parts") as run:
        walk(stages, run, 1)
        state, plan = begin(run, 2)
        cohort = stages.aggregate(run, plan, state, collect(run, state, plan))
        sealed = run.sealed(2)
        assert sealed is not None and sealed.to_bytes() == cohort.to_bytes()
        assert step(run, state, plan, sealed).params_digest == expected[1]
        assert walk(stages, run, 2).params_digest == expected[1]


def test_fewer_updates_than_the_aggregator_needs_end_the_round(store: Store) -> None:
    with remembering(store) as run:
        state, plan = begin(run)
        collected = collect(run, state, plan, [task.client_id for task in plan.cohort[1:]])
        with pytest.raises(TooFewClients, match=r"1 of 9 updates could be used and the aggregator needs 2"):
            stages.aggregate(run, plan, state, collected)


def test_a_poisoned_minority_hardly_moves_the_geometric_median(start_run: StartRun) -> None:
    moved = {}
    for name, aggregation in (("mean", {"kind": "mean", "weights": "uniform"}), ("robust", MIXED)):
        run = start_run(name, aggregation=aggregation, compression={"kind": "qsgd", "bits": 8})
        state, plan = begin(run)
        batch: Any = stages.train(run, plan, stages.broadcast(run, state), plan.waves[0])
        honest_D = batch.updates_NM.mean(0)
        batch.updates_NM[:2] = -20 * honest_D
        collected = stages.admit(run, plan, stages.compress(run, plan, batch), None)
        after = step(run, state, plan, stages.aggregate(run, plan, state, collected))
        moved[name] = float((after.params_D - state.params_D) @ honest_D / (honest_D @ honest_D))
    assert moved["mean"] < -3 and moved["robust"] > 0.6


@pytest.mark.parametrize("aggregation", [{"kind": "geometric_median"}, MIXED])
def test_no_noise_covers_it(aggregation: dict[str, Any]) -> None:
    private = {
        "privacy": {
            "kind": "central",
            "noise_multiplier": 1.0,
            "delta": 1e-3,
            "clipping": {"kind": "fixed", "norm": 1.0},
        },
        "population": "wards",
    }
    with pytest.raises(ConfigError, match=r"geometric_median.*how far one client moves"):
        parse_config(FIELDS | private | {"aggregation": aggregation})


def test_a_cohort_that_is_too_small_for_the_chain_is_refused(start_run: StartRun) -> None:
    chain = {"kind": "mean", "prepare": [{"kind": "nearest_neighbor_mixing", "num_byzantine": 5}]}
    with pytest.raises(ConfigError, match="mean after nearest_neighbor_mixing needs 11 updates, but a round selects"):
        start_run(aggregation=chain)


def hundred_wards() -> dict[str, Any]:
    draw = np.random.default_rng(0)
    return {
        f"ward-{row:03d}": (
            draw.random((1, 784), np.float32),
            [row % 10],
            draw.random((1, 784), np.float32),
            [row % 10],
        )
        for row in range(100)
    }


@pytest.mark.ci
def test_the_memory_limit_holds_for_a_hundred_updates_of_a_perceptron(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """80 MB of updates under a limit of 40 MB, and a seal that holds the aggregate alone."""
    fields = {
        "name": "wards",
        "rounds": 1,
        "data": {"kind": "function", "path": f"{__name__}:hundred_wards", "public": True},
        "model": {"kind": "mlp", "hidden": [200, 200]},
        "training": {"learning_rate": 0.1, "steps": 1},
        "aggregation": {"kind": "geometric_median"},
        "execution": {"memory_mb": 40, "processes": 1},
        "evaluation": {"per_client": False},
    }
    sealed, seal = [], Lease.seal
    monkeypatch.setattr(
        Lease, "seal", lambda lease, n, c, data, states: (sealed.append(data), seal(lease, n, c, data, states))[1]
    )
    with open_run(store, "r", config=parse_config(fields)) as run:
        assert isinstance(run.config.aggregation, GeometricMedian) and run.federation.num_parameters == 199_210
        state, plan = begin(run)
        assert len(plan.waves) > 5
        stages.train(run, plan, stages.broadcast(run, state), plan.waves[0])  # PyTorch imports sympy at the first step
        tracemalloc.start()
        try:
            cohort = stages.aggregate(run, plan, state, collect(run, state, plan))
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert cohort.statistics.received == 100
    assert peak_bytes < 1.2 * 40e6
    assert len(sealed[0]) < 2e6
