"""The simulated clients of a round: what each of them holds, and how long its network takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedrounds.fl_components.arrays import Tensors
from fedrounds.fl_components.server.run import Run
from fedrounds.fl_components.values import ClientTask, RoundPlan, SimulatedClient


def simulated_clients(run: Run, plan: RoundPlan, tasks: Sequence[ClientTask]) -> list[SimulatedClient]:
    """Return the clients of these tasks, with what a real client would hold itself.

    A client that answers for its examples has a secret of the round, which serves no other purpose and is gone with
    the round's key. A client whose rows or training differ has another one.
    """
    keys: list[bytes | None] = [None] * len(tasks)
    if run.federation.example_level is not None:
        training, clients = run.training_digest(plan), run.federation.simulated
        digests = [clients.digest(task.index).hex() for task in tasks]
        keys = [
            run.key(plan.round, "examples", plan.collection, task.client_id, training, digest)
            for task, digest in zip(tasks, digests, strict=True)
        ]
    states: Sequence[Tensors] = [{}] * len(tasks)
    if run.config.training.objective.channels:
        states = run.client_states([task.client_id for task in tasks])
    return [SimulatedClient.of(task, key, state) for task, key, state in zip(tasks, keys, states, strict=True)]


def slowest_s(run: Run, tasks: Sequence[ClientTask], upload_bytes: Sequence[int], download_bytes: int) -> float:
    """Return the simulated time of the slowest of these clients, where a network is simulated; else 0."""
    network, training = run.config.simulation.network, run.config.training
    if network is None or not tasks:
        return 0.0
    seconds_N = network.seconds(
        np.array([task.index for task in tasks]),
        seed=run.config.seed,
        examples_N=[training.num_samples_processed(task.num_examples) for task in tasks],
        upload_bytes_N=upload_bytes,
        download_bytes=download_bytes,
    )
    return float(seconds_N.max())
