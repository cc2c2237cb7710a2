"""What a population costs: a round's time and the process's memory with 1,000,000 clients against 1,000.

    python benchmarks/million_clients.py --repeats 3

Each training is a `fedrounds train` in a process of its own, the two populations in turn, in one new home. Time is the
median of the rounds after the first that are not evaluated; memory is the process's peak resident set.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

EXAMPLE = Path(__file__).parents[1] / "examples" / "million_clients.yaml"
FEDROUNDS = Path(sys.executable).with_name("fedrounds")
POPULATIONS = (1_000, 1_000_000)


def measure(num_clients: int, run_id: str, environment: dict[str, str]) -> tuple[float, float]:
    """Median seconds of a round, and peak MB (10^6 bytes), of one training."""
    command = [FEDROUNDS, "train", EXAMPLE, "--set", f"data.partition.num_clients={num_clients}", "--run-id", run_id]
    options = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([*map(str, command), "--json"], **options) as process:
        assert process.stdout is not None
        answer = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"the training failed: {answer.decode()}")
    shown = subprocess.run([str(FEDROUNDS), "show", run_id, "--json"], env=environment, capture_output=True, check=True)
    history = json.loads(shown.stdout)["data"]["history"]
    seconds = [row["metrics"]["time/round_s"] for row in history[1:] if "eval/accuracy" not in row["metrics"]]
    return median(seconds), usage.ru_maxrss * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    found: dict[int, list[tuple[float, float]]] = {each: [] for each in POPULATIONS}
    with tempfile.TemporaryDirectory(prefix="fedrounds-million-", ignore_cleanup_errors=True) as home:
        environment = {**os.environ, "FEDROUNDS_HOME": home}
        for repeat in range(arguments.repeats):
            for num_clients in POPULATIONS:
                found[num_clients].append(measure(num_clients, f"n{num_clients}-{repeat}", environment))
                round_s, peak_mb = found[num_clients][-1]
                print(f"{num_clients:>9,} clients: {round_s * 1000:.0f} ms a round, peak {peak_mb:.0f} MB", flush=True)
    (few_s, few_mb), (many_s, many_mb) = (
        (median(each[0] for each in found[n]), median(each[1] for each in found[n])) for n in POPULATIONS
    )
    more_mb = many_mb - few_mb
    print(f"a round takes {many_s / few_s:.2f} times as long (target 1.1), memory is {more_mb:+.0f} MB (target 100)")


if __name__ == "__main__":
    main()
