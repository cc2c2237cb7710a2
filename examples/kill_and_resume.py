"""Kill a training at a random moment, resume it, and compare the model with that of a training left in peace.

    python examples/kill_and_resume.py [--seed N] [CONFIG]

Both models are the same to the last bit, whatever the moment. Try other seeds. Two folders that are removed at the end
hold all that the trainings write; your own runs are not touched.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

FEDROUNDS = Path(sys.executable).with_name("fedrounds")
EXAMPLE = Path(__file__).with_name("heart_disease.yaml")


def start(home: str, *arguments: str) -> subprocess.Popen[str]:
    """`fedrounds ARGUMENTS`, with its runs, its Prefect server and its MLflow database in the folder `home`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("FEDROUNDS_", "MLFLOW_"))}
    environment["FEDROUNDS_HOME"] = home
    return subprocess.Popen(
        [FEDROUNDS, *arguments, "--json"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(command: subprocess.Popen[str]) -> dict[str, Any]:
    """What the command says on stdout when it is done."""
    out, err = command.communicate()
    if command.returncode != 0:
        sys.exit(err)
    data: dict[str, Any] = json.loads(out)["data"]
    return data


def wait_for_round(command: subprocess.Popen[str], round: int) -> None:
    """Until the command says that this round is committed."""
    assert command.stderr is not None
    for line in command.stderr:
        if line.startswith("round ") and int(line.split()[1].partition("/")[0]) >= round:
            return
    sys.exit("The training ended before it could be killed. Give it more rounds.")


def stop_server(home: str) -> None:
    """Ends the Prefect server in `home`, which is about to be removed: by itself it would stay for another minute."""
    record = Path(home, "prefect", "server.json")
    if record.exists():
        with suppress(ProcessLookupError):
            os.kill(json.loads(record.read_text())["pid"], signal.SIGKILL)


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill a training at a random moment, resume it, compare the models.")
    parser.add_argument("config", nargs="?", default=str(EXAMPLE), help="a configuration of at least 3 rounds")
    parser.add_argument("--seed", type=int, help="decides the moment; without it, another one each time")
    options = parser.parse_args()
    draws = random.Random(options.seed)

    with tempfile.TemporaryDirectory() as peaceful, tempfile.TemporaryDirectory() as violent:
        try:
            print("Training in peace ...", flush=True)
            expected = finish(start(peaceful, "train", options.config))
            rounds = expected["rounds"]

            print("Training the same again ...", flush=True)
            training = start(violent, "train", options.config, "--run-id", "victim")
            wait_for_round(training, draws.randint(1, max(1, rounds - 2)))
            time.sleep(draws.uniform(0, 0.5))
            training.kill()
            training.communicate()
            found = finish(start(violent, "show", "victim"))
            print(f"Killed it with SIGKILL, {found['committed_round']} of {rounds} rounds committed.")

            print("Resuming it ...", flush=True)
            resumed = finish(start(violent, "resume", "victim"))
        finally:
            stop_server(peaceful)
            stop_server(violent)

    same = expected["params_digest"] == resumed["params_digest"]
    print(f"in peace   {expected['params_digest']}")
    print(f"resumed    {resumed['params_digest']}")
    print("The models are identical." if same else "THE MODELS DIFFER. Please report this, with the seed.")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
