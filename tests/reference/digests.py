"""Train every example and the fault tests' configurations for a few rounds, and compare the results with digests.json.

    python tests/reference/digests.py            # compare; exits with 1 where a result differs
    python tests/reference/digests.py --write    # record the results of this commit on this machine

A result is the digest of the final parameters and, under a privacy claim, each epsilon. The digests hold on one kind of
processor, so no test runs this: a change of structure runs it before and after, on one machine. Needs MNIST and
Shakespeare ($FEDROUNDS_DATA).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RECORDED = Path(__file__).with_suffix(".json")
CASES: dict[str, tuple[Any, ...]] = {
    "heart_disease": ("examples/heart_disease.yaml", 5),
    "heart_disease_private": ("examples/heart_disease_private.yaml", 3),
    "digits": ("examples/digits.yaml", 3),
    "mnist_2nn_iid": ("examples/mnist_2nn_iid.yaml", 2),
    "mnist_2nn_two_shard": ("examples/mnist_2nn_two_shard.yaml", 2),
    "mnist_cnn_iid": ("examples/mnist_cnn_iid.yaml", 1),
    "compressed": ("examples/compressed.yaml", 2),
    "private": ("examples/private.yaml", 2),
    "shakespeare": ("examples/shakespeare.yaml", 1),
    "million_clients": ("examples/million_clients.yaml", 2),
    "faults": ("tests/faults/federation.yaml", 3),
    "faults-private": ("tests/faults/private.yaml", 3),
    "faults-silos": ("tests/faults/silos.yaml", 3, "training.objective.kind=loss"),
}
# The command line with a run secret that is the same in every process, so that noise repeats.
COMMAND = """
import sys
from fedrounds.fl_components.store.secrets import entropy
entropy.token_bytes = lambda size: bytes(range(size))
from fedrounds.deployments.cli import main
sys.argv[0] = "fedrounds"
main()
"""


def train(config: str, rounds: int, *overrides: str) -> dict[str, Any]:
    """Train for some rounds from a home of its own, and return what is compared."""
    with tempfile.TemporaryDirectory() as home:
        run = subprocess.run(
            [
                *(sys.executable, "-c", COMMAND, "train", config, "--run-id", "reference"),
                *(word for override in (f"rounds={rounds}", *overrides) for word in ("--set", override)),
                "--json",
            ],
            cwd=ROOT,
            env=os.environ | {"FEDROUNDS_HOME": home, "PREFECT_HOME": f"{home}/prefect"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            check=False,
        )
    answer = json.loads(run.stdout)
    if "error" in answer:
        return {"error": answer["error"]}
    privacy = answer["data"]["privacy"] or {}
    epsilons = {name: value for name, value in privacy.items() if "epsilon" in name}
    return {"params_digest": answer["data"]["params_digest"], **epsilons}


def main() -> None:
    """Print each result as it is known, and what differs from the recorded one."""
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        results[name] = train(*case)
        same = "same" if results[name] == recorded.get(name) else f"recorded: {recorded.get(name)}"
        print(name, results[name], "" if "--write" in sys.argv else same, flush=True)
    if "--write" in sys.argv:
        RECORDED.write_text(json.dumps(results, indent=2) + "\n")
    elif results != recorded:
        sys.exit(1)


if __name__ == "__main__":
    main()
