"""Compression in the walk of a round: what it may not be combined with, what it keeps, and what a round reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedrounds.deployments.results import run_data
from fedrounds.fl_components.admission import Admission, Clip, RoundAdmission
from fedrounds.fl_components.arrays import Float32, params_digest
from fedrounds.fl_components.client import RESIDUAL, decode_broadcast
from fedrounds.fl_components.compression import CodecContext
from fedrounds.fl_components.config import parse_config
from fedrounds.fl_components.errors import ConfigError, TooFewClients, WireError
from fedrounds.fl_components.server import stages
from fedrounds.fl_components.server.broadcast import encode_broadcast
from fedrounds.fl_components.server.encoding import expected_bytes
from fedrounds.fl_components.server.opening import open_run
from fedrounds.fl_components.server.run import Run
from fedrounds.fl_components.store import Store
from fedrounds.fl_components.values import UpdateBatch
from fedrounds.fl_components.wire import Download, decode_params, encode_params
from fedrounds.flows.round import walk
from tests.support import PRIVATE

from . import rounds
from .conftest import StartRun

FEEDBACK = {"kind": "top_k", "fraction": 0.05, "values": {"kind": "sign"}, "error_feedback": True}
MLP = {"kind": "mlp", "hidden": [64]}  # whose initial parameters are not zeros
DELTAS = {"values": {"kind": "uniform", "bits": 4}, "mode": "delta"}


NONE_REJECTED = RoundAdmission(Admission(), Clip(1.0))


def residuals(run: Run, client_ids: Sequence[str]) -> Float32:
    """What compression left out of these clients' updates so far, float32 [N, M]."""
    zeros_M = np.zeros(run.federation.update_layout.size, np.float32)
    return np.stack([state.get(RESIDUAL, zeros_M) for state in run.client_states(client_ids)])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"compression": FEEDBACK, "selection": {"cohort_size": 3}},
            "error_feedback is true .* draws some of 9 clients",
        ),
        ({"broadcast": DELTAS, "selection": {"cohort_size": 3}}, "mode is delta but not every client is there"),
        (
            {"broadcast": DELTAS, "simulation": {"availability": {"kind": "bernoulli", "probability": 0.9}}},
            "mode is delta but not every client is there",
        ),
        ({"compression": {"kind": "qsgd", "error_feedback": True}}, "loses nothing on average"),
        ({"compression": {"kind": "top_k", "values": {"kind": "sign", "error_feedback": True}}}, "the outermost rule"),
        ({"compression": {"kind": "top_k", "values": {"kind": "low_rank"}}}, "compression.values.kind"),
        ({"compression": {"kind": "eden", "bits": 5}}, "compression.bits"),
        (
            {
                "compression": {"kind": "top_k", "fraction": 0.1, "values": {"kind": "qsgd"}, "error_feedback": True},
                "model": MLP,
            },
            "compression.error_feedback is true but compression.kind top_k with compression.values.kind qsgd is not a",
        ),
        (
            {"broadcast": {"values": {"kind": "random_k", "fraction": 0.1}, "mode": "delta"}},
            "broadcast.mode is delta but broadcast.values.kind random_k is not a contraction",
        ),
        (
            {"broadcast": {"values": {"kind": "qsgd"}, "mode": "delta"}, "model": MLP},
            "broadcast.mode is delta but broadcast.values.kind qsgd is not a contraction: .* of 4810 numbers",
        ),
        ({"broadcast": {"values": {"kind": "top_k"}}}, "broadcast.mode is full but broadcast.values.kind top_k"),
        (
            {"broadcast": {"values": {"kind": "byte_budget", "update_bytes": 64}}},
            "broadcast.values.update_bytes is 64, and an update of 650 parameters takes",
        ),
        ({"compression": {"kind": "topk"}}, "top_k"),
    ],
)
def test_what_makes_no_sense_is_refused(start_run: StartRun, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        start_run(**changes)


def test_error_feedback_under_a_claim_about_clients_is_refused() -> None:
    everyone = {"selection": {"kind": "uniform"}, "compression": FEEDBACK}
    with pytest.raises(ConfigError, match="checkpoints would hold it; leave compression"):
        parse_config(PRIVATE | everyone)


def test_what_is_left_out_comes_with_the_next_update(start_run: StartRun) -> None:
    """What was received and what is kept add up to what was learnt, round by round."""
    run = start_run(compression=FEEDBACK)
    kept: dict[str, Any] = {}
    for round in (1, 2, 3):
        state = stages.load(run, round)
        plan = stages.authorise(run, stages.select(run, state, stages.broadcast(run, state)))
        trained = stages.train(run, plan, stages.broadcast(run, state), plan.waves[0])
        encoded = stages.compress(run, plan, trained)
        received_ND, refused = run.codec(plan).decode(plan, plan.cohort, encoded.frames, NONE_REJECTED)  # type: ignore[union-attr]
        assert not refused and len(encoded.client_states) == 9  # type: ignore[union-attr]
        for client_id, delta_D, received_D, state_of_client in zip(
            trained.client_ids,
            trained.updates_NM,
            received_ND,
            encoded.client_states,  # type: ignore[union-attr]
            strict=True,
        ):
            before_D, memory_D = kept.get(client_id, 0), state_of_client[RESIDUAL]
            np.testing.assert_allclose(received_D + memory_D, delta_D + before_D, atol=1e-6)
            kept[client_id] = memory_D
        walk(stages, run, round)
        residuals_ND = residuals(run, list(kept))
        assert all(np.array_equal(residual_D, kept[name]) for residual_D, name in zip(residuals_ND, kept, strict=True))


def test_an_update_that_is_refused_leaves_no_trace_in_what_its_client_keeps(start_run: StartRun) -> None:
    """What is not finite would else spoil all its later updates."""
    run = start_run(compression=FEEDBACK, admission={"max_update_norm": 100.0})
    walk(stages, run, 1)
    state = stages.load(run, 2)
    plan = stages.authorise(run, stages.select(run, state, stages.broadcast(run, state)))
    batch = stages.train(run, plan, stages.broadcast(run, state), plan.waves[0])
    assert isinstance(batch, UpdateBatch)
    before_ND = residuals(run, batch.client_ids)
    batch.updates_NM[0], batch.updates_NM[1] = np.nan, 1e6
    collected = stages.admit(run, plan, stages.compress(run, plan, batch), None)
    first, second, *_ = batch.client_ids
    reasons = {name: rejection.code for name, rejection in collected.statistics.rejected.items()}
    assert reasons == {first: "not_finite", second: "norm_too_large"}
    cohort = stages.aggregate(run, plan, state, collected)
    after = rounds.step(run, state, plan, cohort)
    assert np.array_equal(residuals(run, batch.client_ids), before_ND)  # they count once the round is committed
    stages.commit(run, plan, after, cohort, {})
    after_ND = residuals(run, batch.client_ids)
    assert np.array_equal(after_ND[:2], before_ND[:2])
    assert not np.array_equal(after_ND[2], before_ND[2])


@pytest.mark.ci
@pytest.mark.parametrize(
    "compression", [FEEDBACK, {"kind": "eden"}, {"kind": "qsgd"}, {"kind": "dead_zone", "error_feedback": True}]
)
def test_processes_that_compress_change_no_bit(start_run: StartRun, compression: dict[str, Any]) -> None:
    """Nor a metric: what is lost is added up in the same order."""
    found = []
    for processes in (1, 2):
        execution = {"processes": processes, "shard_size": 3}
        model = {"kind": "mlp", "hidden": [1200]}  # large enough for three pieces of the nine updates
        run = start_run(f"r{processes}", compression=compression, model=model, execution=execution)
        pieces: list[int] = []

        map_rows = run.map_rows

        def counting(function: Any, *args: Any, map_rows: Any = map_rows, seen: Any = pieces, **how: Any) -> Any:
            for result in map_rows(function, *args, **how):
                seen.append(len(result[0] if isinstance(result, tuple) else result))
                yield result

        run.executor.map_rows = counting  # type: ignore[method-assign]
        results = [walk(stages, run, round) for round in (1, 2)]
        assert pieces == ([9] * 4 if processes == 1 else [2, 2, 2, 2, 1] * 4)  # two rounds, there and back
        communication = [
            {name: value for name, value in result.metrics.items() if name.startswith("communication/")}
            for result in results
        ]
        assert len(communication[0]) >= 5
        residuals_ND = residuals(run, run.federation.population.client_ids)
        found.append((communication, run.state().params_digest, residuals_ND.tobytes()))
    assert found[0] == found[1]


NOBODY = {
    "training": {"learning_rate": 0.1, "epochs": 2},
    "simulation": {"stragglers": {"fraction": 1.0, "drop": True}},
}


@pytest.mark.parametrize("compression", [{}, {"kind": "top_k"}, FEEDBACK, {"kind": "eden"}], ids=str)
def test_a_round_of_which_nothing_is_left(start_run: StartRun, compression: dict[str, Any]) -> None:
    """All clients are stragglers, which are dropped: with any codec too few, or a round without a step."""
    fields = NOBODY | {"compression": {"kind": "none", **compression}}
    with pytest.raises(TooFewClients, match="0 of 9 updates could be used"):
        walk(stages, start_run("few", **fields), 1)
    run = start_run("none", **fields, selection={"kind": "uniform", "min_updates": 0})
    before = run.state().params_digest
    result = walk(stages, run, 1)
    assert result.metrics["clients/received"] == 0
    assert result.params_digest == before
    assert not residuals(run, run.federation.population.client_ids).any()


def test_a_private_round_of_which_nothing_is_left_is_noise(start_run: StartRun) -> None:
    private = {"privacy": PRIVATE["privacy"], "aggregation": PRIVATE["aggregation"]}
    poisson = {"kind": "poisson", "sampling_rate": 0.5}
    for name, compression in (("whole", {"kind": "none"}), ("coded", {"kind": "qsgd"})):
        run = start_run(name, **NOBODY | private, compression=compression, selection=poisson)
        before = run.state().params_digest
        assert walk(stages, run, 1).params_digest != before


def wards(num_clients: int) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    return {
        f"ward-{client:04d}": (draw.random((2, 8)), np.array([0, 1]), draw.random((1, 8)), np.array([1]))
        for client in range(num_clients)
    }


def test_a_checkpoint_does_not_grow_with_the_clients(start_run: StartRun, store: Store) -> None:
    sizes = []
    for num_clients in (10, 1000):
        path = f"{__name__}:wards"
        data = {"kind": "function", "path": path, "arguments": {"num_clients": num_clients}, "public": True}
        run = start_run(f"of-{num_clients}", compression=FEEDBACK, data=data)
        walk(stages, run, 1)
        assert len(store.client_states(run.run_id, run.federation.population.client_ids)) == num_clients
        sizes.append(len(store.state_blob(run.run_id)))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)


class Bounded(nn.Module):
    """Scales what it computes by the largest number of the batch: what else is in the batch matters."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, 16), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.one(x.flatten(1)))
        if hidden.max() > 0.6:
            hidden = hidden * (0.6 / hidden.max())
        scores: torch.Tensor = self.two(hidden)
        return scores


@pytest.mark.parametrize(
    "changes",
    [
        {"compression": FEEDBACK},
        {"training": {"learning_rate": 0.1, "steps": 3, "objective": {"kind": "scaffold"}}, "compression": FEEDBACK},
        pytest.param({"broadcast": DELTAS}, marks=pytest.mark.ci),
        pytest.param({"compression": {"kind": "eden"}}, marks=pytest.mark.ci),
        {"model": {"kind": "module", "path": f"{__name__}:Bounded"}},
    ],
)
def test_a_run_that_was_interrupted_comes_to_the_same_bits(home: Any, changes: dict[str, Any]) -> None:
    fields = {
        "name": "r",
        "rounds": 4,
        "data": {"kind": "digits", "partition": {"kind": "iid", "num_clients": 9}},
        "model": MLP,
        "training": {"learning_rate": 0.1, "batch_size": 16, "epochs": 1},
        "execution": {"processes": 1},
    }
    config = parse_config(fields | changes)
    with Store.open() as store:
        with open_run(store, "whole", config=config) as run:
            *_, whole = [walk(stages, run, round) for round in (1, 2, 3, 4)]
        for round in (1, 2, 3, 4):
            with open_run(store, "parts", config=config) as run:
                state = stages.load(run, round)
                plan = stages.authorise(run, stages.select(run, state, stages.broadcast(run, state)))
                batch = stages.compress(run, plan, stages.train(run, plan, stages.broadcast(run, state), plan.waves[0]))
                stages.aggregate(run, plan, state, stages.admit(run, plan, batch, None))  # sealed, then it ends
            with open_run(store, "parts") as run:
                part = walk(stages, run, round)
        assert part.params_digest == whole.params_digest


def test_everybody_begins_with_what_was_decoded(start_run: StartRun) -> None:
    run = start_run(broadcast={"values": {"kind": "uniform", "bits": 6}}, model=MLP)
    state = stages.load(run, 1)
    sent = stages.broadcast(run, state)
    assert not np.array_equal(sent.base_M, state.params_D)
    assert np.abs(sent.base_M - state.params_D).max() < 0.05
    assert stages.select(run, state, stages.broadcast(run, state)).base_digest != state.params_digest
    result = walk(stages, run, 1)
    assert result.metrics["communication/download_bytes"] == 9 * len(sent.frame) < 9 * len(state.params_D) * 6 / 8 * 1.2


def test_a_difference_is_of_use_only_to_those_who_hold_what_it_is_from(start_run: StartRun) -> None:
    run = start_run(broadcast=DELTAS, model=MLP)
    rule, context = run.config.broadcast, CodecContext([0], 0, run.federation.parameter_shapes)
    walk(stages, run, 1)
    state = run.state()
    sent, held_D = stages.broadcast(run, state), state.broadcast["base"]
    assert params_digest(decode_broadcast(rule, ("params",), sent.frame, held_D, context)) == sent.digest
    for other_D in (None, np.nextafter(held_D, np.float32(np.inf))):
        with pytest.raises(WireError, match=r"are a difference from [0-9a-f]{16}, which is not held"):
            decode_broadcast(rule, ("params",), sent.frame, other_D, context)
    whole = encode_broadcast(rule, ("params",), state.params_D, {}, context)
    assert decode_broadcast(rule, ("params",), whole.frame, held_D, context).tobytes() == state.params_D.tobytes()
    lying = encode_params(Download("0" * 16, None, ("params",), decode_params(whole.frame, len(held_D)).parts))
    with pytest.raises(WireError, match="should decode to 0000000000000000, and decode to"):
        decode_broadcast(rule, ("params",), lying, None, context)


def test_differences_travel_from_the_second_round_on(start_run: StartRun) -> None:
    """What clients hold follows the parameters: one round's error is in the next difference, and never adds up."""
    run = start_run(broadcast=DELTAS, model=MLP, rounds=8)
    down = []
    for round in range(1, 9):
        state = stages.load(run, round)
        if round > 1:
            difference_D = state.params_D - state.broadcast["base"]
            step = float(np.ptp(difference_D)) / 15  # of 4 bits, at most: buckets have smaller ones
            assert 0 < np.abs(stages.broadcast(run, state).base_M - state.params_D).max() <= step * (1 + 1e-5)
        down.append(walk(stages, run, round).metrics["communication/download_bytes"])
        assert np.array_equal(run.state().broadcast["base"], stages.broadcast(run, state).base_M)
    assert down[0] > 9 * 4 * run.federation.num_parameters > 5 * max(down[1:])


def test_what_a_round_reports(start_run: StartRun) -> None:
    network = {"upload_mbps": 1, "log_std": 0, "latency_s": 0.5}
    run = start_run(compression={"kind": "eden", "bits": 2}, simulation={"network": network})
    metrics = walk(stages, run, 1).metrics
    assert 0.05 < metrics["communication/error"] < 0.2
    sent = 9 * run.federation.num_parameters
    assert metrics["communication/bits_per_parameter"] == 8 * metrics["communication/upload_bytes"] / sent
    mean_bytes = metrics["communication/upload_bytes"] / 9
    assert mean_bytes <= metrics["communication/largest_update_bytes"] < 1.1 * mean_bytes
    upload_s = 8 * metrics["communication/upload_bytes"] / 9 / 1e6
    download_s = 8 * metrics["communication/download_bytes"] / 9 / 10e6
    assert metrics["communication/simulated_s"] == pytest.approx(1 + upload_s + download_s, rel=1e-3)


def test_a_round_takes_as_long_as_its_slowest_client(start_run: StartRun) -> None:
    run = start_run(simulation={"network": {"log_std": 1.0, "seconds_per_example": 0.01}})
    result, network = walk(stages, run, 1), run.config.simulation.network
    assert network is not None
    each_N = network.seconds(
        np.arange(9),
        seed=run.config.seed,
        examples_N=[
            run.config.training.num_samples_processed(run.federation.population.num_examples(row)) for row in range(9)
        ],
        upload_bytes_N=[round(result.metrics["communication/upload_bytes"] / 9)] * 9,
        download_bytes=round(result.metrics["communication/download_bytes"] / 9),
    )
    assert result.metrics["communication/simulated_s"] == pytest.approx(each_N.max(), rel=1e-3)
    assert each_N.max() > 1.5 * np.median(each_N)


@pytest.mark.ci
def test_the_simulated_time_to_an_accuracy_is_told(start_run: StartRun, store: Store) -> None:
    """In `train --json` and `show --json`: the seconds of the rounds up to the first that came to it."""
    quick = {"learning_rate": 0.5, "batch_size": 10, "epochs": 5}
    run = start_run(simulation={"network": {}}, rounds=6, model=MLP, training=quick)
    metrics = [walk(stages, run, round).metrics for round in range(1, 7)]
    told = run_data(store, store.run("r"))["communication"]
    seconds = [each["communication/simulated_s"] for each in metrics]
    assert told["simulated_s"] == pytest.approx(sum(seconds))
    accuracies = [each["eval/accuracy"] for each in metrics]
    levels = [level for level in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99) if level <= max(accuracies)]
    assert told["simulated_s_to_primary"].keys() == {str(level) for level in levels} != set()
    for level in levels:
        first = next(round for round, each in enumerate(accuracies, 1) if each >= level)
        assert told["simulated_s_to_primary"][str(level)] == pytest.approx(sum(seconds[:first]))


def test_what_a_run_would_send_is_told_before(start_run: StartRun) -> None:
    for number, changes in enumerate(
        ({}, {"compression": {"kind": "eden"}, "broadcast": {"values": {"kind": "sign"}}})
    ):
        run = start_run(f"r{number}", model=MLP, **changes)
        told = expected_bytes(run.federation)
        metrics = walk(stages, run, 1).metrics
        for way in ("upload_bytes", "download_bytes"):
            assert told[way] == pytest.approx(run.config.rounds * metrics[f"communication/{way}"], rel=0.05)


def test_a_claim_about_clients_clips_what_was_decoded(start_run: StartRun) -> None:
    """The sum of the contributions is at most as long as so many clipping norms, whatever compression made of them."""
    private = {name: PRIVATE[name] for name in ("privacy", "aggregation")}
    run = start_run(
        compression={"kind": "random_k", "fraction": 0.02},
        selection={"kind": "poisson", "sampling_rate": 1.0},
        **private,
    )
    state = stages.load(run, 1)
    plan = stages.authorise(run, stages.select(run, state, stages.broadcast(run, state)))
    batch = stages.train(run, plan, stages.broadcast(run, state), plan.waves[0])
    encoded = stages.compress(run, plan, batch)
    collected = stages.admit(run, plan, encoded, None)
    from fedrounds.fl_components.privacy.clipping import UNITS

    sum_D = collected.updates.tensors["sum"][:-1]
    assert np.array_equal(sum_D, np.round(sum_D)) and collected.statistics.received == 9
    decoded_ND, _ = run.codec(plan).decode(plan, plan.cohort, encoded.frames, NONE_REJECTED)  # type: ignore[union-attr]
    norms_N = np.linalg.norm(decoded_ND, axis=1)
    assert norms_N.max() > 0.5  # else nothing is clipped
    clipped_ND = decoded_ND * np.minimum(1, 0.5 / norms_N)[:, None]
    np.testing.assert_allclose(sum_D / UNITS * 0.5, clipped_ND.sum(0), atol=2e-3)
