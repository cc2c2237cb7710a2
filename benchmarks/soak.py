"""Whether a long run stays as it began: the time of a round, the memory and the open files of 500 rounds.

    python benchmarks/soak.py --plot docs/images/soak.png
    python benchmarks/soak.py --rounds 100 --set execution.processes=2

One `fedrounds train` of workload W1 (benchmarks/peers) in a new home, with everything that belongs to it: the run, its
training processes, the embedded Prefect server (a child of the run). A line for each fifty rounds: the mean time from
commit to commit, and at the last sample before the block's end the memory (PSS: what is shared counts once), without
the Prefect server and of it, and the open files. Needs Linux and MNIST's files.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # `benchmarks` is a package of this repository, not an installed one

from benchmarks.peers.federated import configuration  # noqa: E402
from benchmarks.peers.measure import WORKLOAD, Task  # noqa: E402
from fedrounds.deployments.stack.files import server_files  # noqa: E402
from fedrounds.fl_components.data.folders import find_folder  # noqa: E402
from fedrounds.fl_components.store import Store  # noqa: E402

FEDROUNDS = Path(sys.executable).with_name("fedrounds")
FILES = [f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
SAMPLE_INTERVAL_S = 2.0
BLOCK = 50


@dataclass(frozen=True)
class Sample:
    """All processes of a run at one time: seconds since the epoch, MB (10^6 bytes) without and of the Prefect server,
    open files, how many they are."""

    time_s: float
    memory_mb: float
    server_mb: float
    files: int
    processes: int


def sample(run: psutil.Process, server: int | None) -> Sample:
    """`server` is the id of the Prefect server's process, once there is one."""
    memory, server_memory, files, processes = 0, 0, 0, 0
    for process in [run, *run.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            held = process.memory_full_info().pss
            memory += held
            server_memory += held if process.pid == server else 0
            files += process.num_fds()
            processes += 1
    return Sample(time.time(), (memory - server_memory) / 1e6, server_memory / 1e6, files, processes)


@contextmanager
def embedded_server_ended(home: Path) -> Iterator[None]:
    try:
        yield
    finally:
        server = server_files(home).read_record()
        if server is not None:  # it would wait for other clients for a while
            with suppress(psutil.NoSuchProcess):
                psutil.Process(server.pid).terminate()


def soak(rounds: int, mnist: str | None, overrides: Sequence[str]) -> tuple[list[float], list[Sample]]:
    """When each round was committed (seconds since the epoch), and the samples."""
    os.environ["FLDATA"] = str(find_folder("mnist", FILES, mnist).resolve())
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory(prefix="fedrounds-soak-", ignore_cleanup_errors=True) as folder:
        home, config = Path(folder) / "home", Path(folder) / "workload.yaml"
        os.environ["FLCACHE"] = str(Path(folder) / "workload")
        config.write_text(json.dumps(configuration(Task("W1", WORKLOAD), rounds)))
        environment = {**os.environ, "FEDROUNDS_HOME": str(home), "PYTHONPATH": str(ROOT)}
        command = [str(FEDROUNDS), "train", str(config), "--run-id", "soak", "--json"]
        command += [word for override in overrides for word in ("--set", override)]
        with embedded_server_ended(home):
            with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as training:
                run = psutil.Process(training.pid)
                while training.poll() is None:
                    server = server_files(home).read_record() if home.exists() else None
                    with suppress(psutil.NoSuchProcess):
                        samples.append(sample(run, server.pid if server is not None else None))
                    with suppress(subprocess.TimeoutExpired):
                        training.wait(SAMPLE_INTERVAL_S)
                if training.returncode:
                    assert training.stdout is not None
                    sys.exit(f"the training failed: {training.stdout.read()}")
            with Store.open(home) as store:
                return [row.committed_at for row in store.rounds("soak")], samples


def draw(committed: list[float], samples: list[Sample], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    began = committed[0]
    figure, axes = pyplot.subplots(3, 1, figsize=(8, 6), sharex=True)
    seconds = [after - before for before, after in pairwise(committed)]
    axes[0].plot([at - began for at in committed[1:]], [each * 1000 for each in seconds], ".", ms=2, color="#1f5f8b")
    axes[0].set(ylabel="ms a round", ylim=(0, 3 * sorted(seconds)[len(seconds) // 2] * 1000))
    within = [each for each in samples if began <= each.time_s <= committed[-1]]
    for axis, name, label, color in (
        (axes[1], "memory_mb", "the run and its training processes", "#1f5f8b"),
        (axes[1], "server_mb", "the Prefect server", "#c46a1b"),
        (axes[2], "files", None, "#1f5f8b"),
    ):
        times, values = [each.time_s - began for each in within], [getattr(each, name) for each in within]
        axis.plot(times, values, color=color, label=label)
    axes[1].set(ylabel="memory, MB (PSS)", ylim=(0, None))
    axes[1].legend(frameon=False)
    axes[2].set(ylabel="open files", ylim=(0, None))
    axes[2].set(xlabel=f"seconds after the first of {len(committed)} rounds")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--mnist", help="the folder of MNIST's files; by default where fedrounds finds them")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="FIELD=VALUE")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    committed, samples = soak(options.rounds, options.mnist, options.overrides)
    print("rounds     ms a round   memory MB   Prefect server MB   open files   processes")
    for start in range(1, len(committed), BLOCK):
        stop = min(start + BLOCK, len(committed))
        block_ms = mean(after - before for before, after in pairwise(committed[start - 1 : stop])) * 1000
        last = max((each for each in samples if each.time_s <= committed[stop - 1]), key=lambda each: each.time_s)
        print(
            f"{start + 1:>3}-{stop:<6} {block_ms:>9.0f} {last.memory_mb:>11.0f} {last.server_mb:>19.0f} "
            f"{last.files:>12} {last.processes:>11}"
        )
    if options.plot:
        draw(committed, samples, options.plot)


if __name__ == "__main__":
    main()
