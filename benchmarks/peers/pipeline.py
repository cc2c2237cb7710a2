"""fedrounds as it is used: `fedrounds train` with its embedded Prefect server, MLflow and the store, in a new home.

A round lasts from one commit to the next, by the store's own clock, so whatever is done between them is in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from benchmarks.peers.federated import configuration
from benchmarks.peers.measure import Task, main

ROOT = Path(__file__).resolve().parents[2]
FEDROUNDS = Path(sys.executable).with_name("fedrounds")


def run(task: Task, rounds: int, setting: str) -> tuple[list[float], float]:
    from fedrounds.deployments.stack.files import server_files
    from fedrounds.fl_components.store import Store

    with tempfile.TemporaryDirectory(prefix="fedrounds-pipeline-", ignore_cleanup_errors=True) as folder:
        home, config = Path(folder) / "home", Path(folder) / "workload.yaml"
        config.write_text(json.dumps(configuration(task, rounds)))
        environment = {**os.environ, "FEDROUNDS_HOME": str(home), "PYTHONPATH": str(ROOT)}
        command = [str(FEDROUNDS), "train", str(config), "--run-id", "measured", "--json"]
        try:
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
            answer = json.loads(done.stdout)
            if done.returncode:
                sys.exit(f"the training failed: {answer}")
            with Store.open(home) as store:
                committed = store.rounds("measured")
        finally:
            server = server_files(home).read_record()
            if server is not None:  # it would wait for other clients for a while
                with contextlib.suppress(ProcessLookupError):
                    os.kill(server.pid, signal.SIGTERM)
    first = committed[0].result["metrics"]["time/round_s"]
    seconds = [first, *(after.committed_at - before.committed_at for before, after in pairwise(committed))]
    return seconds, answer["data"]["metrics"]["eval/accuracy"]


if __name__ == "__main__":
    main("fedrounds", run)
