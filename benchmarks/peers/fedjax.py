"""FedJAX (Ro et al. 2021, https://arxiv.org/abs/2108.02117): its federated averaging, compiled for the CPU.

The setting is its way through the clients: `jit`, one after the other, or `pmap`, over as many devices as cores. `best`
is the faster of the two on each model. Where a client's last batch is not full (W1u), FedJAX fills it with examples
that were used before.
"""

from __future__ import annotations

import os
import time
from typing import Any

from benchmarks.peers.measure import Task, main


def run(task: Task, rounds: int, setting: str) -> tuple[list[float], float]:
    setting = ("pmap" if task.model == "cnn" else "jit") if setting == "best" else setting
    if setting == "pmap":  # before jax is imported
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={len(os.sched_getaffinity(0))}"
    import fedjax
    import jax
    import jax.numpy as jnp
    from fedjax.algorithms import fed_avg
    from jax.lax import conv_general_dilated, max, reduce_window

    def dense(x: Any, weight: Any, bias: Any) -> Any:
        return x @ weight.T + bias

    def conv(x: Any, weight: Any, bias: Any) -> Any:
        x = conv_general_dilated(x, weight, (1, 1), "SAME") + bias[:, None, None]
        return reduce_window(jax.nn.relu(x), -jnp.inf, max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")

    def forward(params: Any, x: Any) -> Any:
        layers = list(zip(params[::2], params[1::2], strict=True))
        if task.model == "cnn":
            x = conv(conv(x.reshape(-1, 1, 28, 28), *layers[0]), *layers[1]).reshape(len(x), -1)
            layers = layers[2:]
        for layer in layers[:-1]:
            x = jax.nn.relu(dense(x, *layer))
        return dense(x, *layers[-1])

    def loss(params: Any, batch: Any, rng: Any) -> Any:
        scores = jax.nn.log_softmax(forward(params, batch["x"]))
        return -jnp.take_along_axis(scores, batch["y"][:, None], axis=1)[:, 0]

    x_train, y_train, x_test, y_test = task.images
    batches = fedjax.ShuffleRepeatBatchHParams(batch_size=task.batch_size, num_epochs=1, skip_shuffle=True)
    with fedjax.for_each_client_backend(setting):
        algorithm = fed_avg.federated_averaging(
            fedjax.grad(loss), fedjax.optimizers.sgd(task.learning_rate), fedjax.optimizers.sgd(1.0), batches
        )
        state = algorithm.init([jnp.asarray(array) for array in task.initial])
        key = jax.random.PRNGKey(0)
        seconds = []
        for round in range(rounds):
            began = time.perf_counter()
            clients = []
            for client in task.cohort(round):
                rows = task.shuffled(round, client)
                clients.append((client, fedjax.ClientDataset({"x": x_train[rows], "y": y_train[rows]}), key))
            state, _ = algorithm.apply(state, clients)
            jax.block_until_ready(state.params)
            seconds.append(time.perf_counter() - began)
    hits = [
        forward(state.params, x_test[start : start + 1000]).argmax(1) == y_test[start : start + 1000]
        for start in range(0, len(y_test), 1000)
    ]
    return seconds, float(jnp.concatenate(hits).mean())


if __name__ == "__main__":
    main("fedjax", run)
