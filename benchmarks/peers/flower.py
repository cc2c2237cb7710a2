"""Flower (Beutel et al. 2020, https://arxiv.org/abs/2007.14390): FedAvg in its simulation runtime, which runs on Ray.

The setting `default` leaves Flower's own: 1,000 nodes, each client 2 cores and so one actor on 2 cores, torch's own
number of threads. `best` is the fastest that was found: an actor for each core, one thread in each, at normal priority
(Ray lowers its workers'), and no more nodes than a cohort needs, since the runtime looks for messages through all of
them. Two actors a core were no faster. Neither setting evaluates on clients.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import Any

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from benchmarks.peers.flower_client import app as client_app
from benchmarks.peers.measure import NUM_CLIENTS, Task, main
from benchmarks.peers.torch_models import accuracy, module


class WorkloadFedAvg(FedAvg):
    """FedAvg that names in each message the client of the workload whose part a node plays."""

    def __init__(self, task: Task, nodes: int, threads: int) -> None:
        super().__init__(
            fraction_train=task.cohort_size / nodes,
            fraction_evaluate=0.0,
            min_train_nodes=task.cohort_size,
            min_available_nodes=nodes,
        )
        self.task, self.threads = task, threads
        self.seconds: list[float] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._began = time.perf_counter()
        messages = list(super().configure_train(server_round, arrays, config, grid))
        round = server_round - 1
        named: list[Message] = []
        for message, client in zip(messages, self.task.cohort(round), strict=True):
            fields: dict[str, Any] = {
                "workload": self.task.name,
                "definition": str(self.task.definition),
                "threads": self.threads,
                "round": round,
                "client": client,
            }
            content = RecordDict({"arrays": arrays, "config": ConfigRecord(fields)})
            node = message.metadata.dst_node_id
            named.append(Message(content=content, message_type=MessageType.TRAIN, dst_node_id=node))
        return named

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        replies = list(replies)
        failed = [reply for reply in replies if reply.has_error()]
        if failed:
            raise RuntimeError(f"{len(failed)} of {len(replies)} clients failed: {failed[0].error.reason}")
        aggregated = super().aggregate_train(server_round, replies)
        self.seconds.append(time.perf_counter() - self._began)
        return aggregated


def run(task: Task, rounds: int, setting: str) -> tuple[list[float], float]:
    best = setting == "best"
    nodes, threads = (task.cohort_size, 1) if best else (NUM_CLIENTS, 0)
    strategy = WorkloadFedAvg(task, nodes, threads)
    model = module(task)
    server_app = ServerApp()

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        result = strategy.start(grid=grid, initial_arrays=ArrayRecord(model.state_dict()), num_rounds=rounds)
        model.load_state_dict(result.arrays.to_torch_state_dict())

    if best:
        os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 (Ray's own spelling)
    backend = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}} if best else {}
    run_simulation(server_app, client_app, num_supernodes=nodes, backend_config=backend)
    return strategy.seconds, accuracy(model, task)


if __name__ == "__main__":
    main("flwr", run)
