"""The reference semantics: federated training in plain loops, without a store, stages or frames.

What the flows compute is what this computes; a test holds them equal. Read it to see what a run means.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fedrounds.fl_components.arrays import Float32
from fedrounds.fl_components.compression import CodecContext
from fedrounds.fl_components.config import FederationConfig
from fedrounds.fl_components.randomness import derive_key
from fedrounds.fl_components.server.federation import assemble
from fedrounds.fl_components.training import one_thread


@dataclass(frozen=True, slots=True)
class SimulatedRound:
    """One round: who took part, the parameters after it (float32 [D]), and their test metrics."""

    round: int
    cohort: tuple[str, ...]
    params_D: Float32
    metrics: dict[str, float]


def simulate(config: FederationConfig, source_folder: str | None = None) -> Iterator[SimulatedRound]:
    """The rounds of `config`, one after the other, from fresh parameters.

    >>> from fedrounds.fl_components.config import parse_config
    >>> config = parse_config({
    ...     "name": "heart", "rounds": 3, "data": {"kind": "heart_disease"},
    ...     "model": {"kind": "logistic_regression"}, "training": {"learning_rate": 0.1, "epochs": 1},
    ... })
    >>> [(step.round, step.metrics["eval/accuracy"] > 0.6) for step in simulate(config)]
    [(1, True), (2, True), (3, True)]
    """
    federation = assemble(config, source_folder)
    module = copy.deepcopy(federation.module)

    def key(round: int, client: int) -> bytes | None:
        """From the seed, which everybody knows: here it protects nobody."""
        if federation.example_level is None:
            return None
        return derive_key(config.seed, round, "examples", data.client_ids[client]).to_bytes(32, "little")

    data, params_D = federation.data, federation.initial_params_D
    optimizer = config.server_optimizer.init(len(params_D))
    held_D, memory = None, dict[int, Float32]()
    participations, stragglers = np.zeros(data.num_clients, np.int64), config.simulation.stragglers
    for round in range(1, config.rounds + 1):
        cohort = federation.select(round, participations.__getitem__, config.seed).tolist()
        participations[cohort] += 1
        training = config.training.in_round(round, config.rounds)
        round_seed, broadcast_seed = (derive_key(config.seed, round, each) for each in ("compression", "broadcast"))
        broadcast = CodecContext([broadcast_seed], broadcast_seed, federation.shapes)
        sent = config.broadcast.compress(params_D, held_D, broadcast)
        base_D = config.broadcast.decompress(sent, held_D, broadcast)
        held_D = base_D if config.broadcast.against == "previous" else None
        deltas, weights = [], []
        for client in cohort:
            seed = derive_key(config.seed, round, "training", data.client_ids[client])
            work = stragglers.work(seed, training.num_units) if stragglers is not None else None
            if stragglers is not None and stragglers.drop and work is not None:
                continue
            with one_thread():
                delta_D, _ = training.train(
                    module, base_D, *data.train(client), seed, key(round, client), work=work, learning_task=config.task
                )
                known = CodecContext([seed], round_seed, federation.shapes)
                wanted_D = delta_D + memory.get(client, np.float32(0))
                (received_D,) = config.compression.decompress(config.compression.compress(wanted_D[None], known), known)
            if config.compression.error_feedback:
                memory[client] = wanted_D - received_D
            deltas.append(received_D)
            weights.append(float(data.num_examples(client)))
        total = config.aggregation.init(len(params_D))
        if deltas:
            total = config.aggregation.add(total, np.stack(deltas), np.array(weights))
        params_D, optimizer = config.server_optimizer.update(params_D, -config.aggregation.aggregate(total), optimizer)
        yield SimulatedRound(
            round, tuple(data.client_ids[client] for client in cohort), params_D, federation.evaluate(params_D)
        )
