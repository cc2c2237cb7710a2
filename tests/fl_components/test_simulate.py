"""The plain loops of simulate.py and the walk of the stages come to the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedrounds.fl_components.config import parse_config
from fedrounds.fl_components.errors import TooFewClients
from fedrounds.fl_components.server import stages
from fedrounds.fl_components.server.opening import open_run
from fedrounds.fl_components.simulate import simulate
from fedrounds.fl_components.store import Store
from fedrounds.flows.round import walk
from tests.support import parameters

HEART = {"data": {"kind": "heart_disease"}, "model": {"kind": "logistic_regression"}}
DIGITS = {
    "data": {"kind": "digits", "partition": {"kind": "iid", "num_clients": 12}},
    "model": {"kind": "mlp", "hidden": [8]},
}


WALKS: dict[str, dict[str, Any]] = {
    "all": HEART,
    "all-fedadam": HEART | {"server_optimizer": {"kind": "fedadam", "learning_rate": 0.05}},
    "cohort-uniform-waves": DIGITS
    | {
        "selection": {"cohort_size": 5},
        "aggregation": {"weights": "uniform"},
        "execution": {"shard_size": 2, "memory_mb": 1},
    },
    "cohort-fedadam-steps": DIGITS
    | {
        "selection": {"cohort_size": 7},
        "server_optimizer": {"kind": "fedadam"},
        "execution": {"shard_size": 1},
        "training": {"learning_rate": 0.1, "batch_size": 10, "steps": 3},
    },
    "rate-uniform": DIGITS
    | {"server_optimizer": {"kind": "fedavg", "learning_rate": 0.5}, "aggregation": {"weights": "uniform"}},
    "error feedback": DIGITS
    | {
        "compression": {"kind": "top_k", "fraction": 0.1, "values": {"kind": "sign"}, "error_feedback": True},
        "broadcast": {"values": {"kind": "uniform", "bits": 8}, "mode": "delta"},
    },
    "shared mask": DIGITS
    | {
        "selection": {"cohort_size": 5},
        "compression": {
            "kind": "random_k",
            "fraction": 0.5,
            "mask": "shared",
            "values": {"kind": "qsgd", "bits": 6},
        },
        "broadcast": {"values": {"kind": "uniform", "bits": 12}},
    },
    "fair": DIGITS
    | {
        "rounds": 6,
        "selection": {"kind": "fair", "cohort_size": 4},
        "simulation": {"availability": {"kind": "bernoulli", "probability": 0.6}},
        "server_optimizer": {"kind": "fedyogi"},
    },
    "poisson": DIGITS
    | {
        "rounds": 8,
        "selection": {"kind": "poisson", "sampling_rate": 0.12},
        "server_optimizer": {"kind": "fedavgm"},
    },
    "two channels": DIGITS
    | {
        "selection": {"cohort_size": 5},
        "training": {"learning_rate": 0.1, "batch_size": 16, "epochs": 1, "objective": {"kind": "scaffold"}},
        "compression": {"kind": "qsgd", "bits": 8},
        "broadcast": {"values": {"kind": "uniform", "bits": 12}},
        "server_optimizer": {"kind": "fedavg"},
    },
    "geometric median": DIGITS
    | {
        "aggregation": {
            "kind": "geometric_median",
            "prepare": [{"kind": "nearest_neighbor_mixing", "num_byzantine": 2}],
        },
        "execution": {"shard_size": 2, "memory_mb": 1},
    },
    "stragglers": DIGITS
    | {
        "rounds": 4,
        "training": {
            "learning_rate": 0.1,
            "epochs": 3,
            "objective": {"kind": "proximal", "mu": 0.1},
            "schedule": {"kind": "step", "every": 2},
        },
        "simulation": {"stragglers": {"fraction": 0.5, "drop": True}},
    },
}


def configured(changes: dict[str, Any]) -> Any:
    training = {"learning_rate": 0.1, "momentum": 0.5, "batch_size": 16, "epochs": 1}
    return parse_config({"name": "reference", "rounds": 3, "seed": 4, "training": training, **changes})


@pytest.mark.parametrize(
    "walked",
    parameters(WALKS, quick=("all", "error feedback", "two channels", "geometric median", "poisson", "stragglers")),
)
def test_the_walk_is_what_the_loops_say(home: Path, walked: str) -> None:
    config = configured(WALKS[walked])
    with Store.open() as store, open_run(store, "r", config=config) as run:
        for expected in simulate(config):
            plan = stages.select(
                run, stages.load(run, expected.round), stages.broadcast(run, stages.load(run, expected.round))
            )
            assert tuple(task.client_id for task in plan.cohort) == expected.cohort
            result = walk(stages, run, expected.round)
            np.testing.assert_allclose(run.state().params_D, expected.params_D, rtol=0, atol=1e-5)
            for name, value in expected.metrics.items():
                assert result.metrics[name] == pytest.approx(value, abs=2e-2 if "accuracy" in name else 1e-4)
            assert walk(stages, run, expected.round) == result  # a committed round is not worked on again
        assert run.refresh().committed_round == config.rounds
        initial_D = run.federation.initial_params_D
        assert np.abs(run.state().params_D - initial_D).max() > 0.01


def test_a_round_in_which_nobody_was_selected_is_a_round(home: Path) -> None:
    config = configured(DIGITS | {"rounds": 8, "selection": {"kind": "poisson", "sampling_rate": 0.12}})
    sizes = [len(step.cohort) for step in simulate(config)]
    assert 0 in sizes and max(sizes) > 1
    empty = sizes.index(0) + 1
    with Store.open() as store, open_run(store, "r", config=config) as run:
        for round in range(1, empty):
            walk(stages, run, round)
        before_D = run.state().params_D
        result = walk(stages, run, empty)
        assert run.state().params_D.tobytes() == before_D.tobytes()  # FedAvg has no momentum
        assert (result.metrics["clients/selected"], result.metrics["clients/received"]) == (0, 0)
        assert "train/loss" not in result.metrics


def dropped(fraction: float) -> dict[str, Any]:
    return DIGITS | {
        "training": {"learning_rate": 0.1, "epochs": 2},
        "simulation": {"stragglers": {"fraction": fraction, "drop": True}},
    }


def test_dropped_stragglers_were_selected_and_count_as_rejected(home: Path) -> None:
    """Also where each wave has one client: a wave may then hold no update at all."""
    config = configured(dropped(0.5) | {"execution": {"shard_size": 1}})
    with Store.open() as store, open_run(store, "r", config=config) as run:
        plan = stages.select(run, stages.load(run, 1), stages.broadcast(run, stages.load(run, 1)))
        slow = sum(task.work is not None for task in plan.cohort)
        assert 0 < slow < 12
        collected = None
        for row in range(12):
            updates = stages.train(run, plan, stages.broadcast(run, run.state()), slice(row, row + 1))
            collected = stages.admit(run, plan, stages.compress(run, plan, updates), collected)
        assert collected is not None
        statistics = collected.statistics
        assert (statistics.selected, statistics.received) == (12, 12 - slow)
        result = walk(stages, run, 1)
        assert result.rejected == {"straggler": slow}
        counts = {name: result.metrics[f"clients/{name}"] for name in ("selected", "received", "rejected")}
        assert counts == {"selected": 12, "received": 12 - slow, "rejected": slow}
        # Those that are dropped were asked as well.
        assert result.metrics["communication/download_bytes"] == statistics.download_bytes
        assert result.metrics["communication/upload_bytes"] == statistics.upload_bytes


def test_a_round_of_nothing_but_dropped_stragglers(home: Path) -> None:
    config = configured(dropped(1.0) | {"selection": {"min_updates": 0}})
    with Store.open() as store, open_run(store, "r", config=config) as run:
        before_D = run.state().params_D
        assert walk(stages, run, 1).rejected == {"straggler": 12}
        assert run.state().params_D.tobytes() == before_D.tobytes()
    config = configured(dropped(1.0))
    refused = pytest.raises(TooFewClients, match=r"0 of 12 updates could be used .*\(straggler: 12\)")
    with Store.open() as store, open_run(store, "s", config=config) as run, refused:
        walk(stages, run, 1)


def test_it_repeats_bit_for_bit() -> None:
    config = configured(HEART)
    first, again = (list(simulate(config)) for _ in range(2))
    assert [step.params_D.tobytes() for step in first] == [step.params_D.tobytes() for step in again]
    other = list(simulate(config.model_copy(update={"seed": 5})))
    assert other[-1].params_D.tobytes() != first[-1].params_D.tobytes()


@pytest.mark.parametrize(
    "training",
    [
        {"learning_rate": 0.1, "epochs": 1},
        {"learning_rate": 0.05, "epochs": 2, "momentum": 0.9, "objective": {"kind": "proximal", "mu": 0.01}},
    ],
    ids=["plain", "options"],
)
@pytest.mark.ci
def test_after_twenty_rounds_the_engine_is_where_the_loops_are(home: Path, training: dict[str, Any]) -> None:
    config = configured(DIGITS | {"rounds": 20, "training": {**training, "batch_size": 10}})
    *_, expected = simulate(config)
    with Store.open() as store, open_run(store, "r", config=config) as run:
        for round in range(1, 21):
            walk(stages, run, round)
        params_D = run.state().params_D
    np.testing.assert_allclose(params_D, expected.params_D, rtol=0, atol=1e-6)
    assert np.abs(params_D - run.federation.initial_params_D).max() > 0.1


@pytest.mark.ci
def test_clients_that_answer_for_their_examples_draw_from_the_seed_here() -> None:
    """The same each time, and not what they come to without noise."""
    privacy = {"kind": "example_level", "noise_multiplier": 1.0, "max_grad_norm": 1.0, "sampling_rate": 0.5}
    fields = {"name": "reference", "rounds": 1, **HEART, "training": {"learning_rate": 0.1, "epochs": 1}}
    private = parse_config(fields | {"training": fields["training"] | {"privacy": privacy}})
    first, second, plain = ([*simulate(config)][-1].params_D for config in (private, private, parse_config(fields)))
    np.testing.assert_array_equal(first, second)
    assert not np.allclose(first, plain)
