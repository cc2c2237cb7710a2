"""fedrounds beside its peers, on the workloads of workload.py: seconds a round, peak memory, accuracy.

    python -m benchmarks.peers.bench --workloads W1 W2 --repeats 3 --markdown peers.md --json peers.json

All in one run, in turn: in each repeat each peer trains once, in processes and an environment of its own (made at the
first run by pip, a few minutes and gigabytes). A repeat's figure is the mean over its rounds after the first, which
compiles and warms up; evaluation is in no peer's rounds. Needs Linux, and MNIST's four files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from benchmarks.peers.environments import NotInstalled, python_of
from benchmarks.peers.measure import WORKLOAD, WORKLOADS, Task
from benchmarks.peers.tables import Row, table
from fedrounds.fl_components.data.folders import find_folder
from fedrounds.fl_components.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
SHARED_WORKLOAD = ROOT.parent / "shared" / "bench" / "workload.py"
FILES = [f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "fedrounds-peers"
CORES = len(os.sched_getaffinity(0))
QUICK_ROUNDS = 3
LIMIT_S = 1800.0
SAMPLE_INTERVAL_S = 0.25
SAMPLE_SHARE = 0.03  # of one core, at most, goes into watching memory


@dataclass(frozen=True)
class Peer:
    """A line of the tables: a module of this folder, the environment that it runs in (None: ours), and its setting."""

    module: str
    title: str
    environment: str | None = None
    setting: str = "best"
    rounds: int = 12
    workloads: tuple[str, ...] = WORKLOADS
    processes: int = 1  # started by torchrun, where there are several


PEERS = (
    Peer("limit", "floating-point limit"),
    Peer("engine", "fedrounds: training stage", rounds=20),
    Peer("pipeline", "fedrounds: whole pipeline", rounds=101),
    Peer("lean", f"lean PyTorch loop, {CORES} processes", setting=str(CORES)),
    Peer("lean", "lean PyTorch loop"),
    Peer("plain", "plain PyTorch loop"),
    Peer("fedjax", "FedJAX", "fedjax"),
    Peer("pfl", f"pfl, {CORES} processes", "pfl", processes=CORES),
    Peer("pfl", "pfl", "pfl"),
    Peer("flower", "Flower, best setting", "flower"),
    Peer("flower", "Flower, default setting", "flower", setting="default", rounds=5, workloads=("W1",)),
)


def main() -> None:
    options = _options()
    rows = {
        (workload, peer): Row(workload, peer.module, peer.title)
        for workload in options.workloads
        for peer in PEERS
        if peer.module in options.peers and workload in peer.workloads
    }
    pythons: dict[Peer, Path] = {}
    for peer in dict.fromkeys(peer for _, peer in rows):
        try:
            pythons[peer] = python_of(peer.environment, options.cache)
        except NotInstalled as reason:
            for (_, other), row in rows.items():
                if other is peer:
                    row.error = f"not installed: {reason}"
    _prepare(options.mnist, options.workload, options.cache)
    machine = about()
    print(machine, flush=True)
    try:
        for repeat in range(options.repeats):
            for (workload, peer), row in rows.items():
                if row.error is None:
                    rounds = QUICK_ROUNDS if options.quick else peer.rounds
                    _measure(pythons[peer], peer, options.workload, rounds, row)
                    told = row.error or f"{row.means_s[-1]:.3f} s a round, {row.peak_mb[-1]:.0f} MB"
                    print(f"{repeat + 1}/{options.repeats} {workload:<3} {row.title}: {told}", flush=True)
    finally:  # a run that is stopped tells what it has
        _report(options, list(rows.values()), machine)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modules = list(dict.fromkeys(peer.module for peer in PEERS))
    shared = SHARED_WORKLOAD if SHARED_WORKLOAD.exists() else WORKLOAD
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS)
    parser.add_argument("--peers", nargs="+", choices=modules, default=modules)
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--quick", action="store_true", help=f"one repeat of {QUICK_ROUNDS} rounds, of W1 alone")
    parser.add_argument("--mnist", help="the folder of MNIST's files; by default where fedrounds finds them")
    parser.add_argument("--workload", type=Path, default=shared, help=f"the definition (default: {shared})")
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"for the environments (default: {CACHE})")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    parser.add_argument("--json", type=Path, help="write every round's seconds to this file")
    options = parser.parse_args()
    options.workloads = options.workloads or (["W1"] if options.quick else list(WORKLOADS))
    options.repeats = options.repeats or (1 if options.quick else 3)
    options.workload, options.cache = options.workload.resolve(), options.cache.resolve()
    return options


def _prepare(mnist: str | None, definition: Path, cache: Path) -> None:
    """Put the workload's data where all processes find it."""
    try:
        folder = find_folder("mnist", FILES, mnist).resolve()
    except DataError as error:
        sys.exit(f"Error: {error.message}\nHint:  {error.hint}")
    digest = hashlib.sha256(definition.read_bytes() + str(folder).encode()).hexdigest()
    prepared = cache / f"workload-{digest[:12]}"
    prepared.mkdir(parents=True, exist_ok=True)
    os.environ.update(FLDATA=str(folder), FLCACHE=str(prepared))
    _ = Task("W1", definition).images


def _measure(python: Path, peer: Peer, definition: Path, rounds: int, row: Row) -> None:
    """Start a peer once and add what it answers to its row."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={peer.processes}"] if peer.processes > 1 else []
    command = [str(python), *launcher, "-m", f"benchmarks.peers.{peer.module}", "--workload", row.workload]
    command += ["--rounds", str(rounds), "--setting", peer.setting, "--definition", str(definition)]
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as complained:
        with subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=complained) as process:
            peak_mb = _peak_mb(process)
        said.seek(0)
        answer = (said.read().splitlines() or [""])[-1]
        if process.returncode or not answer.startswith("{"):
            complained.seek(0)
            row.error = (complained.read().strip().splitlines() or [f"ended with {process.returncode}"])[-1]
            return
    found = json.loads(answer)
    row.version, row.accuracy = found["version"].partition("+")[0], found["accuracy"]
    row.seconds.append(found["seconds"])
    row.peak_mb.append(peak_mb)


def _peak_mb(process: subprocess.Popen[bytes]) -> float:
    """Wait for a process; the largest PSS that it and its descendants had together, as it was seen."""
    peak_bytes, began = 0, time.monotonic()
    while process.poll() is None:
        looked = time.monotonic()
        if looked - began > LIMIT_S:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
        peak_bytes = max(peak_bytes, _pss_bytes(process.pid))
        time.sleep(max(SAMPLE_INTERVAL_S, (time.monotonic() - looked) / SAMPLE_SHARE))
    return peak_bytes / 1e6


def _pss_bytes(pid: int) -> int:
    total = 0
    try:
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            try:
                total += process.memory_full_info().pss
            except psutil.Error:  # one that has just ended
                continue
    except psutil.NoSuchProcess:
        return 0
    return total


def about() -> str:
    """The machine, the day, and what else runs on it."""
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    memory_gb = psutil.virtual_memory().total / 1e9
    machine = f"{name}, {CORES} cores, {memory_gb:.0f} GB, Python {platform.python_version()}"
    return f"{machine}, {time.strftime('%Y-%m-%d')}; load average before the run {os.getloadavg()[0]:.1f}"


def _report(options: argparse.Namespace, rows: list[Row], machine: str) -> None:
    tables = [
        f"{workload}\n\n{table([row for row in rows if row.workload == workload])}" for workload in options.workloads
    ]
    print("\n" + "\n\n".join(tables))
    if options.markdown:
        options.markdown.write_text("\n\n".join([machine, *tables]) + "\n")
    if options.json:
        options.json.write_text(json.dumps({"about": machine, "rows": [asdict(row) for row in rows]}) + "\n")


if __name__ == "__main__":
    main()
