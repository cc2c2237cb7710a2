"""Whether a configuration's data and model come out the same when they are loaded once more.

A resume loads both again, in another process. What follows from the order of a set, whose hashes Python draws anew in
each process, or from a generator that no seed reaches, is then another federation.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import subprocess
import sys
from typing import Any, Final

import torch

from fl_components.config import FederationConfig, parse_config
from fl_components.parameters import constants_digest, load_into, params_digest
from fl_components.server.federation import Federation, assemble
from fl_components.server.rows import digest_of_data
from fl_components.training import made_up

_CHILD: Final = "from fl_components.server.reproducibility import tell; tell()"

_REPETITIONS: Final = 20

_WHAT: Final = {
    "data": "the data differ when they are loaded again: rows, labels, client ids or their order",
    "parameters": "the model's initial parameters differ when it is built again",
    "constants": "the model's frozen parameters or buffers differ when it is built again",
    "outputs": "the model's outputs differ for the same rows, parameters and torch seed",
}


class SecondLoad:
    """Loads a configuration in a process of its own, with another seed of Python's hashes, while this one goes on.

    `differences` waits for it.
    """

    def __init__(self, config: FederationConfig, source_folder: str) -> None:
        seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            text=True,
        )
        assert self._process.stdin is not None
        json.dump({"config": config.model_dump_json(), "source_folder": source_folder}, self._process.stdin)
        self._process.stdin.close()
        self._process.stdin = None

    def differences(self, federation: Federation) -> list[str]:
        """Return in words what differs from the federation that this process has loaded."""
        out, _ = self._process.communicate()
        if self._process.returncode:
            return ["the data or the model cannot be loaded a second time, in another process"]
        other, first = json.loads(out.splitlines()[-1]), digests(federation)
        differing = {name for name in _WHAT if other[name] != first[name]}
        if "parameters" in differing or "constants" in differing:
            differing.discard("outputs")  # they follow from these
        return [words for name, words in _WHAT.items() if name in differing]

    def close(self) -> None:
        """End the process, where nobody has waited for it."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


def digests(federation: Federation) -> dict[str, Any]:
    """Return the sha256 of the data, of the model's initial parameters and constants, and of what it makes of
    synthetic rows."""
    return {
        "data": digest_of_data(federation.data).hex(),
        "parameters": params_digest(federation.initial_params_D),
        "constants": constants_digest(federation.module),
        "outputs": _outputs(federation),
    }


def _outputs(federation: Federation) -> str:
    """Return the sha256 of the scores in train and in eval mode, by a copy of the model: `_REPETITIONS` times, as what
    a generator without a seed draws may come out the same."""
    module, digest = copy.deepcopy(federation.module), hashlib.sha256()
    load_into(module, federation.initial_params_D)
    rows = made_up(federation.training_examples)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for mode in [True] * _REPETITIONS + [False] * _REPETITIONS:
            torch.manual_seed(0)
            digest.update(module.train(mode)(rows.x.clone()).numpy(force=True).tobytes())
    return digest.hexdigest()


def tell() -> None:
    """Print the digests of the configuration on stdin, as the last line."""
    request = json.loads(sys.stdin.read())
    config = parse_config(json.loads(request["config"]))
    print(json.dumps(digests(assemble(config, request["source_folder"] or None))))
