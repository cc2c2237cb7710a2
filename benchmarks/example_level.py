"""What example-level privacy costs at the clients: W1 (benchmarks/peers) without and with DP-SGD, and with Opacus.

    python benchmarks/example_level.py --repeats 7

100 clients of 60 images, the 2NN of 199,210 parameters, an expected batch of 10, 6 steps. Side by side in one run, a
round of each in turn, medians; one thread each, and the cohort engine also in two processes. Opacus is written as its
user would: GradSampleModule and DPOptimizer with their own noise, one client after the other. Also where the time of a
private round goes. Needs MNIST's files.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.peers.measure import WORKLOAD, Task  # noqa: E402
from benchmarks.peers.torch_models import load  # noqa: E402
from fedrounds.fl_components.admission import Admission, RoundAdmission  # noqa: E402
from fedrounds.fl_components.aggregation import Mean  # noqa: E402
from fedrounds.fl_components.data.folders import find_folder  # noqa: E402
from fedrounds.fl_components.executors import LocalExecution, Workload  # noqa: E402
from fedrounds.fl_components.models import Mlp, ModelSpec, build_seeded  # noqa: E402
from fedrounds.fl_components.parameters import flatten  # noqa: E402
from fedrounds.fl_components.privacy.noise import WholeNormals  # noqa: E402
from fedrounds.fl_components.shared_memory import SharedMemory  # noqa: E402
from fedrounds.fl_components.task import Classification  # noqa: E402
from fedrounds.fl_components.training import (  # noqa: E402
    SGD,
    StreamingSum,
    grad_sampler_name,
    one_thread,
)
from fedrounds.fl_components.training.chunk import ExampleTable  # noqa: E402
from fedrounds.fl_components.values import SimulatedClient  # noqa: E402

FILES = [f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
PRIVACY = {"kind": "example_level", "noise_multiplier": 1.0, "max_grad_norm": 1.0}


def opacus_round(task: Task, module: torch.nn.Module, rate: float, steps: int) -> Callable[[], None]:
    """The sum of the cohort's updates."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    hooked = GradSampleModule(module, loss_reduction="mean")
    criterion = torch.nn.CrossEntropyLoss()
    x, y = (torch.from_numpy(each) for each in task.images[:2])
    start = [each.detach().clone() for each in module.parameters()]
    coins = np.random.default_rng(0)

    def run() -> None:
        total = [torch.zeros_like(each) for each in start]
        for client in task.cohort(0):
            with torch.no_grad():
                for parameter, each in zip(module.parameters(), start, strict=True):
                    parameter.copy_(each)
            rows = torch.from_numpy(task.rows[client])
            optimizer = DPOptimizer(
                torch.optim.SGD(hooked.parameters(), lr=task.learning_rate),
                noise_multiplier=1.0,
                max_grad_norm=1.0,
                expected_batch_size=task.batch_size,
            )
            for _ in range(steps):
                batch = rows[torch.from_numpy(coins.random(len(rows)) < rate)]
                if not len(batch):
                    continue  # once in 60,000 batches
                optimizer.zero_grad()
                criterion(hooked(x[batch]), y[batch]).backward()
                optimizer.step()
            with torch.no_grad():
                for each, parameter, from_ in zip(total, module.parameters(), start, strict=True):
                    each.add_(parameter - from_)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--mnist", help="the folder of MNIST's files; by default where fedrounds finds them")
    options = parser.parse_args()
    os.environ["FLDATA"] = str(find_folder("mnist", FILES, options.mnist).resolve())
    os.environ.setdefault("FLCACHE", str(Path(tempfile.gettempdir()) / "fedrounds-workload"))
    warnings.filterwarnings("ignore", message="Full backward hook")
    torch.set_num_threads(1)
    task, rule = Task("W1", WORKLOAD), Mlp(hidden=(200, 200))
    module = build_seeded(rule, (784,), (10,), seed=0)
    load(module, task.initial)
    start_D, cohort = flatten(module), task.cohort(0)
    rows = np.concatenate([task.rows[client] for client in cohort])
    stops = np.cumsum([len(task.rows[client]) for client in cohort])
    starts = np.concatenate([[0], stops[:-1]])
    x_train, y_train = task.images[:2]
    arrays: dict[str, Any] = {"x": x_train[rows], "y": y_train[rows], "starts": starts, "stops": stops}
    tasks = [
        SimulatedClient(str(client), row, int(stops[row] - starts[row]), seed=row, key=row.to_bytes(32, "little"))
        for row, client in enumerate(cohort)
    ]
    work = Workload(
        module=module,
        spec=ModelSpec.of(rule, (784,), (10,), 0, module),
        task=Classification(),
        examples=SharedMemory.from_arrays(arrays),
        num_parameters=len(start_D),
        result=(np.float32, (len(start_D),)),
    )
    rate, steps = task.batch_size / tasks[0].num_examples, tasks[0].num_examples // task.batch_size
    plain = SGD(learning_rate=task.learning_rate, batch_size=task.batch_size, steps=steps)
    # Clips each step's gradient as a whole: what a round takes where each client needs weights of its own.
    weights = plain.model_copy(update={"max_gradient_norm": 1.0})
    private = SGD.model_validate(
        {"learning_rate": task.learning_rate, "steps": steps, "privacy": PRIVACY | {"sampling_rate": rate}}
    )
    examples = ExampleTable(torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"]), starts, stops)
    print(f"{len(tasks)} clients, {len(start_D)} parameters, {steps} steps; way: {grad_sampler_name(module, examples)}")
    with ExitStack() as stack, one_thread():
        runs: dict[str, Callable[[], Any]] = {}
        for processes in (1, 2):
            executor = LocalExecution(processes=processes).executor(work, print)
            stack.callback(executor.close)
            shards = np.array_split(np.arange(len(tasks)), 1 if processes == 1 else 4)
            cut = [[tasks[row] for row in shard] for shard in shards]
            for name, each in (("not private", plain), ("clipped steps", weights), ("example-level", private)):

                def run(executor: Any = executor, each: SGD = each, cut: Any = cut) -> float:
                    streaming = StreamingSum(Mean(weights="uniform"), RoundAdmission(Admission()))
                    found = executor.train(each, start_D, cut, streaming)
                    return sum(float(result.sum()) for _, result in found)

                runs[f"engine, {processes} process{'es' * (processes > 1)}, {name}"] = run
        opacus_module = build_seeded(rule, (784,), (10,), seed=0)
        load(opacus_module, task.initial)
        runs["Opacus, 1 process"] = opacus_round(task, opacus_module, rate, steps)
        runs["the noise alone, 1 process"] = lambda: noise(tasks, len(start_D), steps)
        runs["torch.normal_, as much"] = lambda: torch_noise(len(tasks), len(start_D), steps)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for repeat in range(options.repeats + 1):  # the first one warms up
            for name, each_run in runs.items():
                began = time.perf_counter()
                each_run()
                if repeat:
                    seconds[name].append(time.perf_counter() - began)
    middle = {name: median(each) for name, each in seconds.items()}
    for name, each in seconds.items():
        print(f"{name:<40} {middle[name] * 1000:7.0f} ms a round (least {min(each) * 1000:.0f}; {len(each)} rounds)")
    alone, two = "engine, 1 process", "engine, 2 processes"
    noised = len(tasks) * steps * len(start_D)
    print(
        f"as fast as Opacus: {middle['Opacus, 1 process'] / middle[f'{alone}, example-level']:.2f} times (target 1.5)"
    )
    for name in (alone, two):
        times = middle[f"{name}, example-level"] / middle[f"{name}, not private"]
        print(f"{name}: {times:.2f} times a round that is not private (target 3)")
    print(f"noise: {middle['the noise alone, 1 process'] / noised * 1e9:.2f} ns a normal, {noised / 1e6:.0f} million")


def noise(tasks: list[SimulatedClient], num_parameters: int, steps: int) -> None:
    for task in tasks:
        assert task.key is not None
        stream = WholeNormals(task.key, 2.0**20)
        for _ in range(steps):
            for _block in stream.blocks(num_parameters):
                pass


def torch_noise(num_clients: int, num_parameters: int, steps: int) -> None:
    room = torch.empty(num_parameters)
    for _ in range(num_clients * steps):
        room.normal_()


if __name__ == "__main__":
    main()
