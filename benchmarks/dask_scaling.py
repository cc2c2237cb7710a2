"""What a second Dask worker brings: seconds of a round's training on one and on two workers, and in local processes.

    python benchmarks/dask_scaling.py --rounds 10
    python benchmarks/dask_scaling.py --shard-sizes 10 25

1,000 clients of 60 examples, all of them in each round: one epoch in batches of 10, on a 784-200-200-10 network of
199,210 parameters. With MNIST where its files are found, else with noise in its shape. The lines take turns, a round
each, in an order that is reversed from turn to turn. Their medians are told, the CPU seconds of a round, and the part
of it in which whoever trains does so and does not wait for work. Schedulers and workers are processes of this machine:
with fewer than three processors, two workers share theirs with the scheduler and this process.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

from fedrounds.fl_components.admission import Admission, RoundAdmission
from fedrounds.fl_components.config import parse_config
from fedrounds.fl_components.errors import DataError
from fedrounds.fl_components.executors import DaskExecution, Executor, LocalExecution
from fedrounds.fl_components.server.assembly import assemble
from fedrounds.fl_components.server.federation import Federation
from fedrounds.fl_components.server.workload import workload
from fedrounds.fl_components.training import StreamingSum
from fedrounds.fl_components.values import SimulatedClient

NUM_CLIENTS, NUM_EXAMPLES = 1_000, 60
TARGET = 0.85
MNIST = {"kind": "mnist", "partition": {"kind": "iid", "num_clients": NUM_CLIENTS}}
NOISE = {"kind": "function", "path": f"{Path(__file__).stem}:noise"}
PRELOAD = ("--preload", "fedrounds.fl_components.executors.dask")


def noise() -> dict[str, tuple[Any, ...]]:
    """Examples in the shape of MNIST's."""
    draw = np.random.default_rng(0)

    def examples(count: int) -> tuple[Any, Any]:
        return draw.standard_normal((count, 784), np.float32), draw.integers(0, 10, count)

    return {f"client{index:04}": (*examples(NUM_EXAMPLES), *examples(1)) for index in range(NUM_CLIENTS)}


def federation(shard_size: int) -> Federation:
    def loaded(data: dict[str, Any]) -> Federation:
        fields = {
            "name": "dask-scaling",
            "rounds": 1,
            "data": data,
            "model": {"kind": "mlp", "hidden": [200, 200]},
            "training": {"learning_rate": 0.1, "batch_size": 10, "epochs": 1},
            "selection": {"kind": "uniform", "cohort_size": NUM_CLIENTS},
            "execution": {"kind": "local", "shard_size": shard_size},
            "evaluation": {"per_client": False},
        }
        return assemble(parse_config(fields), str(Path(__file__).parent))

    try:
        return loaded(MNIST)
    except DataError as error:
        print(f"with noise instead of MNIST: {error.message}", flush=True)
        return loaded(NOISE)


@contextmanager
def dask_cluster(num_workers: int) -> Iterator[str]:
    """The address of a scheduler with that many workers, of one thread each."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    commands = [["scheduler", "--host", "127.0.0.1", "--port", str(port)]]
    commands += [["worker", address, "--nthreads", "1", "--memory-limit", "0", "--no-nanny"]] * num_workers
    with tempfile.TemporaryDirectory(prefix="fedrounds-dask-") as folder, ExitStack() as stack:
        for what, *options in commands:
            command = [sys.executable, "-m", f"distributed.cli.dask_{what}", "--no-dashboard", *PRELOAD, *options]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            process = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.kill)
        from distributed import Client

        with Client(address, timeout=60, set_as_default=False) as client:
            client.wait_for_workers(num_workers, timeout=60)
        yield address


def cpu_s() -> float:
    """CPU seconds of this process and those that it started, so far."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def measure(shard_size: int, rounds: int) -> None:
    whole = federation(shard_size)
    work, rule = workload(whole), whole.config.training
    assert whole.streamed is not None
    streaming = StreamingSum(whole.streamed, RoundAdmission(Admission()))
    tasks = [
        SimulatedClient(whole.population.client_ids[row], row, NUM_EXAMPLES, seed=row) for row in range(NUM_CLIENTS)
    ]
    shards = [tasks[shard] for shard in whole.config.execution.shards([1.0] * NUM_CLIENTS)]
    with ExitStack() as stack:
        lines: dict[str, Executor] = {}
        for count in (1, 2):
            address = stack.enter_context(dask_cluster(count))
            executions = {
                f"dask, {count} worker(s)": DaskExecution(address=address, shard_size=shard_size),
                f"local, {count} process(es)": LocalExecution(processes=count, shard_size=shard_size),
            }
            for name, execution in executions.items():
                lines[name] = stack.enter_context(closing(execution.executor(work, print)))
        seconds: dict[str, list[float]] = {name: [] for name in lines}
        cpu: dict[str, list[float]] = {name: [] for name in lines}
        busy: dict[str, list[float]] = {name: [] for name in lines}
        sums = set[bytes]()
        for turn in range(-2, rounds):  # two to warm up, in which engines are built
            for name in list(lines) if turn % 2 else reversed(lines):
                spans: list[float] = []
                lines[name].on_shard = lambda _, began, ended, process, spans=spans: spans.append(ended - began)
                began, cpu_began = time.perf_counter(), cpu_s()
                total_D = np.zeros(work.num_parameters)
                for _, sum_D in lines[name].train(rule, whole.initial_params_D, shards, streaming):
                    total_D += sum_D
                ended = time.perf_counter()
                if turn >= 0:
                    seconds[name].append(ended - began)
                    cpu[name].append(cpu_s() - cpu_began)
                    busy[name].append(sum(spans) / (ended - began) / (2 if ", 2 " in name else 1))
                sums.add(total_D.tobytes())
    assert len(sums) == 1, "the lines differ in some bits"
    print(f"\nshards of {shard_size}: {len(shards)}; load of the machine {os.getloadavg()[0]:.1f}")
    for name, found in seconds.items():
        told = f"{median(found):.2f} s a round ({min(found):.2f} to {max(found):.2f})"
        print(f"{name:<22} {told}, {median(cpu[name]):.2f} CPU s, training {median(busy[name]):.0%}")
    for kind, what in (("dask", "worker(s)"), ("local", "process(es)")):
        one, two = (seconds[f"{kind}, {count} {what}"] for count in (1, 2))
        by_turn = median(a / (2 * b) for a, b in zip(one, two, strict=True))
        print(f"{kind}: efficiency of two {median(one) / (2 * median(two)):.0%}; turn by turn {by_turn:.0%}")
    print(f"the target for dask is {TARGET:.0%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--shard-sizes", type=int, nargs="+", default=[25], help="25 is the default of this model")
    arguments = parser.parse_args()
    for shard_size in arguments.shard_sizes:
        measure(shard_size, arguments.rounds)


if __name__ == "__main__":
    main()
