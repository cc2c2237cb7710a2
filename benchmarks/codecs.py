"""What it takes to make a hundred updates small and large again: seconds, bytes and what is lost; beside peers.

    python -m benchmarks.codecs --markdown codecs.md --json codecs.json
    python -m benchmarks.codecs --rules --peers --bad-input

100 updates of the 2NN (199,210 parameters), float32, each of a client that trained an epoch on 60 images of MNIST;
normal numbers where MNIST is not (or with `--input normal`). Ours is what the stages `compress` and `admit` call, in
the processes that train, one for each core: frames, checksums, checks, the error that a round reports and the way to
these processes and back are in it. A peer has the same numbers, an
environment of its own (made at the first run by pip: minutes, and 5 GB for all), one process, and all cores where it
can use them; only what it does itself is timed. All in turn, in one run. `--bad-input` also sends what is to be
refused (bad_frames.py).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.bad_frames import bad_input
from benchmarks.peers.bench import CACHE, CORES, ROOT, about
from benchmarks.peers.codec import squared
from benchmarks.peers.environments import NotInstalled, python_of
from benchmarks.peers.tables import aligned
from fedrounds.fl_components.admission import RoundAdmission
from fedrounds.fl_components.arrays import Float32
from fedrounds.fl_components.config import FederationConfig, parse_config
from fedrounds.fl_components.errors import DataError
from fedrounds.fl_components.executors import MAX_OF_SHARD, Executor, LocalExecution, RowMapper, Workload
from fedrounds.fl_components.layout import DELTA, Layout
from fedrounds.fl_components.models import Mlp, ModelSpec, build_seeded
from fedrounds.fl_components.parameters import flatten
from fedrounds.fl_components.randomness import derive_key
from fedrounds.fl_components.server.assembly import assemble
from fedrounds.fl_components.server.encoding import Codec
from fedrounds.fl_components.server.workload import workload
from fedrounds.fl_components.shared_memory import SharedMemory
from fedrounds.fl_components.task import Classification
from fedrounds.fl_components.values import ClientTask, RoundPlan, SimulatedClient

RULES: dict[str, dict[str, Any]] = {
    "none": {"kind": "none"},
    "top_k 1 %": {"kind": "top_k", "fraction": 0.01},
    "top_k 1 %, signs": {"kind": "top_k", "fraction": 0.01, "values": {"kind": "sign"}},
    "random_k 1 %": {"kind": "random_k", "fraction": 0.01},
    "qsgd, 4 bits": {"kind": "qsgd", "bits": 4},
    "uniform, 8 bits": {"kind": "uniform", "bits": 8},
    "sign": {"kind": "sign"},
    "ternary": {"kind": "ternary"},
    "eden, 1 bit": {"kind": "eden", "bits": 1},
    "eden, 2 bits": {"kind": "eden", "bits": 2},
    "eden, 4 bits": {"kind": "eden", "bits": 4},
    "dithered, step 1": {"kind": "dithered", "step": 1.0},
    "dead_zone, step 0.35": {"kind": "dead_zone", "step": 0.35},
    "dead_zone, step 3": {"kind": "dead_zone", "step": 3.0},
    "low_rank, rank 2": {"kind": "low_rank", "rank": 2},
    "byte_budget, 27 kB": {"kind": "byte_budget", "update_bytes": 27_000},
    "byte_budget, 2.4 kB, feedback": {"kind": "byte_budget", "update_bytes": 2_400, "error_feedback": True},
}
TARGETS_S = {"top_k 1 %": 0.15, "top_k 1 %, signs": 0.15, "qsgd, 4 bits": 0.25, "eden, 1 bit": 0.6}
HOSTILE = ("none", "top_k 1 %, signs", "qsgd, 4 bits", "eden, 1 bit")
PEERS = {"general": "zstandard, blosc2, SZ3", "openfl": "OpenFL", "appfl": "APPFL", "flsim": "FLSim"}
SHAPES = ((200, 784), (200,), (200, 200), (200,), (10, 200), (10,))
COPY = "copy by numpy (memory bandwidth)"
UPDATES, FEW = 100, 4
LIMIT_S = 1800.0
HEADER = (
    *("100 updates", "encode s", "decode s", "both s", "least - most"),
    *("bytes an update", "bits a parameter", "error", "target"),
)


@dataclass
class Row:
    """A line of the table. `seconds` are those to encode and to decode all updates, in each repeat; `error` is squared,
    over the squared norm; `reason` says why there is nothing."""

    title: str
    seconds: list[Sequence[float]] = field(default_factory=list)
    num_bytes: float = 0.0
    error: float = 0.0
    reason: str = ""
    target_s: float | None = None

    def add(self, seconds: Sequence[float], num_bytes: float, error: float) -> None:
        self.seconds.append(seconds)
        self.num_bytes, self.error = num_bytes, error

    def cells(self, num_parameters: int) -> list[str]:
        if not self.seconds:
            return [self.title, *[""] * (len(HEADER) - 2), self.reason or "stopped"]
        both = [sum(each) for each in self.seconds]
        parts = [f"{median(each):.3f}" for each in zip(*self.seconds, strict=True)]
        met = ""
        if self.target_s is not None:
            met = f"under {self.target_s:g} s: {'met' if median(both) < self.target_s else 'missed'}"
        return [
            *(self.title, *(parts if len(parts) == 2 else ["", ""]), f"{median(both):.3f}"),
            *(f"{min(both):.3f} - {max(both):.3f}", f"{self.num_bytes:,.0f}"),
            *(f"{8 * self.num_bytes / num_parameters:.3f}", f"{self.error:.4g}", met),
        ]


@dataclass(frozen=True)
class Updates:
    """Updates, float32 [N, D], those who send them, and the shapes of the layers that make up D."""

    deltas_ND: Float32
    tasks: tuple[ClientTask, ...]
    shapes: Sequence[Sequence[int]]
    told: str

    @property
    def plan(self) -> RoundPlan:
        return RoundPlan("codecs", 1, "0123456789abcdef" * 4, 0, self.tasks, (), (), min_updates=0)

    def codec(self, rule: dict[str, Any]) -> Codec:
        return Codec(
            _config({"compression": rule}).compression,
            derive_key(0, 1, "compression"),
            Layout((DELTA,), tuple(map(tuple, self.shapes))),
        )


def workers() -> Executor:
    """The processes of a run of the 2NN whose rule takes single updates, one for each core."""
    rule, shapes = Mlp(hidden=(200, 200)), ((28, 28), (10,))
    module = build_seeded(rule, *shapes, seed=0)
    row = {"x": np.zeros((1, 28, 28), np.float32), "y": np.zeros(1, np.int64), "starts": [0], "stops": [1]}
    num_parameters = len(flatten(module))
    work = Workload(
        module=module,
        spec=ModelSpec.of(rule, *shapes, 0, module),
        task=Classification(),
        examples=SharedMemory.from_arrays({name: np.asarray(array) for name, array in row.items()}),
        num_parameters=num_parameters,
        result=(np.float32, (MAX_OF_SHARD, num_parameters)),
    )
    return LocalExecution(processes=CORES).executor(work, print)


def main() -> None:
    options = _options()
    updates = updates_of(options.input, FEW if options.quick else UPDATES)
    machine = f"{about()}\n{updates.told}"
    print(machine, flush=True)
    targets_s = {} if options.quick else TARGETS_S
    rows = [Row(COPY), *(Row(rule, target_s=targets_s.get(rule)) for rule in options.rules)]
    pythons: dict[str, Path] = {}
    for name in options.peers:
        try:
            pythons[name] = python_of(name, options.cache)
        except NotInstalled as reason:
            rows.append(Row(PEERS[name], reason=f"not installed: {reason}"))
    bad = ""
    try:
        with tempfile.TemporaryDirectory(prefix="fedrounds-codecs-") as folder, closing(workers()) as executor:
            np.save(f"{folder}/updates.npy", updates.deltas_ND)
            for repeat in range(options.repeats):
                rows[0].add([copy_s(updates.deltas_ND)], updates.deltas_ND[0].nbytes, 0.0)
                for row in rows[1 : 1 + len(options.rules)]:
                    row.add(*ours(updates, RULES[row.title], executor.map_rows))
                for name, python in pythons.items():
                    _measure(python, name, f"{folder}/updates.npy", updates.shapes, rows)
                print(f"{repeat + 1}/{options.repeats}", flush=True)
        if options.bad_input:
            codecs = {name: updates.codec(RULES[name]) for name in HOSTILE}
            first = updates.plan, updates.tasks[0], updates.deltas_ND[0]
            bad = "\n\n" + bad_input(codecs, *first, quick=options.quick)
    finally:  # a run that is stopped tells what it has
        cells = [row.cells(updates.deltas_ND.shape[1]) for row in rows]
        table = aligned([HEADER, *cells]) + bad
        print("\n" + table)
        if options.markdown:
            options.markdown.write_text(f"{machine}\n\n{table}\n")
        if options.json:
            options.json.write_text(json.dumps({"about": machine, "rows": [asdict(row) for row in rows]}) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rules",
        nargs="*",
        choices=RULES,
        default=list(RULES),
        metavar="RULE",
        help=", ".join(RULES).replace("%", "%%"),
    )
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--input", choices=("mnist", "normal"), default="mnist")
    parser.add_argument("--bad-input", action="store_true", help="also how long it takes to refuse a frame")
    parser.add_argument("--quick", action="store_true", help=f"one repeat with {FEW} updates")
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"for the environments (default: {CACHE})")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    parser.add_argument("--json", type=Path, help="write every repeat's seconds to this file")
    options = parser.parse_args()
    options.repeats, options.cache = options.repeats or (1 if options.quick else 5), options.cache.resolve()
    return options


def _config(fields: dict[str, Any]) -> FederationConfig:
    mnist = {"kind": "mnist", "partition": {"kind": "iid", "num_clients": 1000}}
    training = {"learning_rate": 0.1, "batch_size": 10, "epochs": 1}
    return parse_config(
        {"name": "codecs", "rounds": 1, "data": mnist, "model": {"kind": "mlp"}, "training": training} | fields
    )


def updates_of(kind: str, count: int) -> Updates:
    """So many updates, of MNIST or normal numbers (which they are too where MNIST is not)."""
    if kind == "mnist":
        try:
            return _trained(count)
        except DataError as error:
            print(f"{error.message}: normal numbers instead", file=sys.stderr)
    size = sum(int(np.prod(shape)) for shape in SHAPES)
    deltas_ND = 0.01 * np.random.default_rng(0).standard_normal((count, size), np.float32)
    tasks = tuple(ClientTask(f"{client:04d}", client, 60, derive_key(0, 1, f"{client}")) for client in range(count))
    return Updates(deltas_ND, tasks, SHAPES, f"{count} updates of {size:,} normal numbers")


def _trained(count: int) -> Updates:
    """By the engine of the stage `train`."""
    config = _config(
        {
            "selection": {"kind": "uniform", "cohort_size": count},
            "compression": {"kind": "sign"},  # single updates, not their sum
            "execution": {"processes": 1},
        }
    )
    federation = assemble(config)
    ids, rows = federation.population.client_ids, federation.select(1, np.zeros_like, config.seed).tolist()
    num_examples = federation.simulated.data.num_examples
    tasks = tuple(
        ClientTask(ids[row], row, num_examples(row), derive_key(config.seed, 1, "training", ids[row])) for row in rows
    )
    work = [config.training.num_samples_processed(task.num_examples) * federation.num_parameters for task in tasks]
    clients = [SimulatedClient.of(task) for task in tasks]
    shards = [clients[shard] for shard in config.execution.shards(work)]
    executor = config.execution.executor(workload(federation), print)
    trained = executor.train(config.training, federation.initial_params_D, shards, None)
    deltas_ND = np.concatenate([deltas_ND[: len(report.client_ids)].copy() for report, deltas_ND in trained])
    size = federation.num_parameters
    told = f"{count} updates of {size:,} parameters: the 2NN after an epoch on {num_examples(rows[0])} images of MNIST"
    return Updates(deltas_ND.astype(np.float32, copy=False), tasks, federation.parameter_shapes, told)


def ours(updates: Updates, rule: dict[str, Any], map_rows: RowMapper) -> tuple[tuple[float, float], float, float]:
    """Seconds to encode and to decode, bytes of a frame, squared error."""
    codec, plan, tasks, deltas_ND = updates.codec(rule), updates.plan, updates.tasks, updates.deltas_ND
    admission = RoundAdmission(_config({}).admission)
    few, _, _ = codec.encode(plan, tasks[:FEW], deltas_ND[:FEW], map_rows=map_rows)  # warms up
    codec.decode(plan, tasks[:FEW], few, admission, map_rows)
    began = time.perf_counter()
    frames, _, _ = codec.encode(plan, tasks, deltas_ND, map_rows=map_rows)
    encoded_at = time.perf_counter()
    decoded_ND, refused = codec.decode(plan, tasks, frames, admission, map_rows)
    ended = time.perf_counter()
    assert not refused, refused
    error = squared(decoded_ND - deltas_ND) / squared(deltas_ND)
    return (encoded_at - began, ended - encoded_at), sum(map(len, frames)) / len(frames), error


def copy_s(deltas_ND: Float32) -> float:
    """Seconds to read and to write the updates once, a thread on each core."""
    copied_ND = np.ones_like(deltas_ND)  # its pages are there already
    pieces = np.array_split(np.arange(deltas_ND.size), CORES)
    bounds = [slice(int(piece[0]), int(piece[-1]) + 1) for piece in pieces]
    source, target = deltas_ND.reshape(-1), copied_ND.reshape(-1)
    with ThreadPoolExecutor(CORES) as pool:
        began = time.perf_counter()
        list(pool.map(lambda bound: np.copyto(target[bound], source[bound]), bounds))
        return time.perf_counter() - began


def _measure(python: Path, name: str, file: str, shapes: Iterable[Sequence[int]], rows: list[Row]) -> None:
    """Start a peer once and add what it answers to its rows."""
    command = [str(python), "-m", f"benchmarks.peers.codec_{name}", "--updates", file, "--threads", str(CORES)]
    command += ["--shapes", json.dumps(list(shapes))]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
        answer = (done.stdout.splitlines() or [""])[-1]
        why = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
    except subprocess.TimeoutExpired:
        answer, why = "", f"took more than {LIMIT_S:.0f} s"
    if not answer.startswith("["):
        answer = json.dumps([{"title": PEERS[name], "reason": f"failed: {why}"}])
    by_title = {row.title: row for row in rows}
    for found in json.loads(answer):
        row = by_title.get(found["title"])
        if row is None:
            row = Row(found["title"])
            rows.append(row)
        if "reason" in found:
            row.reason = found["reason"]
        else:
            row.add(found["seconds"], found["num_bytes"], found["error"])


if __name__ == "__main__":
    main()
