"""The reference semantics: federated training in plain loops, without a store, stages or executors.

What the flows compute is what this computes; a test holds them equal. Read it to see what a run means.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fedrounds.fl_components.aggregation import Updates
from fedrounds.fl_components.arrays import Float32, Tensors
from fedrounds.fl_components.client import ClientExamples, RoundSpec, run_round
from fedrounds.fl_components.compression import CodecContext
from fedrounds.fl_components.config import FederationConfig
from fedrounds.fl_components.layout import DELTA, PARAMS
from fedrounds.fl_components.randomness import derive_key
from fedrounds.fl_components.server.assembly import assemble
from fedrounds.fl_components.server.broadcast import encode_broadcast
from fedrounds.fl_components.server.federation import Federation
from fedrounds.fl_components.server.specs import round_spec
from fedrounds.fl_components.values import ClientTask, RoundPlan
from fedrounds.fl_components.wire import decode_update, max_update_bytes


@dataclass(frozen=True, slots=True)
class SimulatedRound:
    """One round: who took part, the parameters after it (float32 [D]), and their test metrics."""

    round: int
    cohort: tuple[str, ...]
    params_D: Float32
    metrics: dict[str, float]


def simulate(config: FederationConfig, source_folder: str | None = None) -> Iterator[SimulatedRound]:
    """Return the rounds of `config`, one after the other, from fresh parameters.

    >>> from fedrounds.fl_components.config import parse_config
    >>> config = parse_config({
    ...     "name": "heart", "rounds": 3, "data": {"kind": "heart_disease"},
    ...     "model": {"kind": "logistic_regression"}, "training": {"learning_rate": 0.1, "epochs": 1},
    ... })
    >>> [(step.round, step.metrics["eval/accuracy"] > 0.6) for step in simulate(config)]
    [(1, True), (2, True), (3, True)]
    """
    federation = assemble(config, source_folder)
    data, objective = federation.simulated.data, config.training.objective
    sent_layout, received_layout = federation.update_layout, federation.broadcast_layout
    state = federation.initial_state()
    params_D, optimizer, aggregator, channels, held = (
        state.params_D,
        state.server_optimizer,
        state.aggregator,
        state.channels,
        state.broadcast,
    )
    client_states: dict[str, Tensors] = {}
    participations = np.zeros(data.num_clients, np.int64)
    for round in range(1, config.rounds + 1):
        cohort = federation.select(round, participations.__getitem__, config.seed).tolist()
        participations[cohort] += 1

        values_M = received_layout.join({PARAMS: params_D, **channels})
        seed = derive_key(config.seed, round, "broadcast")
        context = CodecContext([seed], seed, received_layout.shapes)
        sent = encode_broadcast(config.broadcast, received_layout.channels, values_M, held, context)

        updates, num_examples, names = [], [], []
        for client in cohort:
            name, stragglers = data.client_ids[client], config.simulation.stragglers
            spec = _spec(federation, round, client, sent.digest)
            if stragglers is not None and stragglers.drop and spec.work is not None:
                continue
            examples, secret = ClientExamples(*data.train(client)), _secret(federation, round, name)
            answer = run_round(spec, sent.frame, examples, client_states.get(name), secret)
            client_states[name] = answer.state
            update = decode_update(answer.frame, max_update_bytes(sent_layout.size))
            updates.append(config.compression.decompress([update.parts], spec.update_context(sent_layout))[0])
            num_examples.append(float(data.num_examples(client)))
            names.append(name)

        updates_NM = np.stack(updates) if updates else np.zeros((0, sent_layout.size), np.float32)
        admitted = Updates(tuple(names), updates_NM, np.array(num_examples), np.zeros(len(names), np.int64))
        result = config.aggregation.combine(admitted, aggregator)
        aggregate, aggregator = sent_layout.split(result.aggregate_M), result.state
        params_D, optimizer = config.server_optimizer.update(params_D, -aggregate.pop(DELTA), optimizer)
        if objective.channels:
            channels = objective.next_received(channels, aggregate, len(names) / data.num_clients)
        held = sent.held
        yield SimulatedRound(
            round, tuple(data.client_ids[client] for client in cohort), params_D, federation.evaluate(params_D)
        )


def _spec(federation: Federation, round: int, client: int, base_digest: str) -> RoundSpec:
    """Return what a client must know of a round."""
    config, name = federation.config, federation.population.client_ids[client]
    seed, stragglers = derive_key(config.seed, round, "training", name), config.simulation.stragglers
    work = None if stragglers is None else stragglers.work(seed, config.training.num_units)
    task = ClientTask(name, client, federation.population.num_examples(client), seed, work)
    plan = RoundPlan("simulation", round, base_digest, 0, (task,), (), (), 0)
    return round_spec(federation, plan, task, config.seed)


def _secret(federation: Federation, round: int, name: str) -> bytes | None:
    """Return a client's secret. It comes from the seed, which everybody knows: here it protects nobody."""
    if federation.example_level is None:
        return None
    return derive_key(federation.config.seed, round, "examples", name).to_bytes(32, "little")
