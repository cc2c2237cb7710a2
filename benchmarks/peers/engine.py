"""The training stage of fedrounds alone, with neither Prefect nor MLflow beside it; a process a core from the start."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from benchmarks.peers.federated import configuration
from benchmarks.peers.measure import Task, main


def run(task: Task, rounds: int, setting: str) -> tuple[list[float], float]:
    from fedrounds.fl_components.config import parse_config
    from fedrounds.fl_components.server import stages
    from fedrounds.fl_components.server.opening import open_run
    from fedrounds.fl_components.store import Store
    from fedrounds.flows.round import walk

    processes = len(os.sched_getaffinity(0))
    config = parse_config(configuration(task, rounds) | {"execution": {"processes": processes}})
    with (
        tempfile.TemporaryDirectory(prefix="fedrounds-engine-") as home,
        Store.open(Path(home)) as store,
        open_run(store, "engine", config=config) as run,
    ):
        results = [walk(stages, run, round) for round in range(1, rounds + 1)]
    return [result.seconds["train"] for result in results], results[-1].metrics["eval/accuracy"]


if __name__ == "__main__":
    main("fedrounds", run)
