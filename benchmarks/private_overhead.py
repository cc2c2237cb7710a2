"""What a privacy claim adds to a round: W1 (benchmarks/peers) with clipping and noise (W3) beside W1, in turn.

    python benchmarks/private_overhead.py --rounds 60

Two runs with two training processes each, a round of one and a round of the other: the whole walk of a round with its
store, without Prefect and MLflow, whose time is the same for both. Also the noise for ten million parameters. Needs
MNIST's files.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.peers.federated import configuration  # noqa: E402
from benchmarks.peers.measure import WORKLOAD, Task  # noqa: E402
from fedrounds.fl_components.config import parse_config  # noqa: E402
from fedrounds.fl_components.data.folders import find_folder  # noqa: E402
from fedrounds.fl_components.privacy.noise import gaussian  # noqa: E402
from fedrounds.fl_components.server import stages  # noqa: E402
from fedrounds.fl_components.server.opening import open_run  # noqa: E402
from fedrounds.fl_components.store import Store  # noqa: E402
from fedrounds.flows.round import walk  # noqa: E402

FILES = [f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
PRIVATE: dict[str, Any] = {
    "kind": "central",
    "noise_multiplier": 1.0,
    "clipping": {"kind": "fixed", "norm": 0.5},
    "delta": 1e-4,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--mnist", help="the folder of MNIST's files; by default where fedrounds finds them")
    options = parser.parse_args()
    os.environ["FLDATA"] = str(find_folder("mnist", FILES, options.mnist).resolve())
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fedrounds-private-"))
        os.environ["FLCACHE"] = f"{folder}/workload"
        fields = configuration(Task("W1", WORKLOAD), options.rounds + 2)
        fields |= {"execution": {"processes": 2}, "aggregation": {"weights": "uniform"}}
        store = stack.enter_context(Store.open(Path(folder) / "home"))
        hubs = {}
        for name, changes in {"W1": {}, "W3": {"privacy": PRIVATE}}.items():
            config = parse_config(fields | changes)
            hubs[name] = stack.enter_context(open_run(store, name, config=config, source_folder=str(ROOT)))
        seconds: dict[str, list[float]] = {name: [] for name in hubs}
        shares: dict[str, dict[str, list[float]]] = {name: {} for name in hubs}
        for round in range(1, options.rounds + 3):
            for name, run in hubs.items():
                began = time.perf_counter()
                walk(stages, run, round)
                if round > 2:
                    seconds[name].append(time.perf_counter() - began)
                    for stage, each in run.seconds.items():
                        shares[name].setdefault(stage, []).append(each)
    for name, each in seconds.items():
        longest = sorted(shares[name].items(), key=lambda item: -median(item[1]))[:5]
        told = ", ".join(f"{stage} {median(values) * 1000:.0f}" for stage, values in longest)
        print(f"{name}: {median(each) * 1000:.0f} ms a round (median of {len(each)}); {told}")
    added = median(seconds["W3"]) - median(seconds["W1"])
    print(f"clipping and noise add {added * 1000:.0f} ms a round")
    began = time.perf_counter()
    gaussian(bytes(32), 1e6, 10_000_000)
    print(f"noise for 10 million parameters: {time.perf_counter() - began:.2f} s (target 0.5)")


if __name__ == "__main__":
    main()
