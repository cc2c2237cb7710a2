"""Whether a configuration's data and model are the same when another process loads them.

A resume loads both again. Code that depends on the order of a set (Python draws new hashes in each process) or on a
generator without a seed then gives other data or another model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from fedrounds.fl_components.arrays import params_digest
from fedrounds.fl_components.config import FederationConfig, parse_config
from fedrounds.fl_components.parameters import constants_digest
from fedrounds.fl_components.rules import Rule
from fedrounds.fl_components.server.assembly import assemble
from fedrounds.fl_components.server.federation import Federation
from fedrounds.fl_components.server.row_digests import digest_of_data

_CHILD: Final = "from fedrounds.fl_components.server.reproducibility import print_digests; print_digests()"

_REPETITIONS: Final = 20
"""How often the scores are computed: what a generator without a seed draws may be the same once."""

_WHAT: Final = {
    "data": "the data differ when they are loaded again: rows, labels, client ids or their order",
    "parameters": "the model's initial parameters differ when it is built again",
    "constants": "the model's frozen parameters or buffers differ when it is built again",
    "outputs": "the model's outputs differ for the same rows, parameters and torch seed",
}


@contextmanager
def second_load(config: FederationConfig, source_folder: str) -> Iterator[Callable[[Federation], list[str]]]:
    """Load a configuration in another process, with another seed of Python's hashes.

    Yields a function that waits for that process and returns, in words, how its federation differs from the given one.
    Where data and model are fedrounds' own kinds, no process is started and nothing differs.
    """
    if not any(_is_own_code(rule) for rule in (config.data, config.model)):
        yield lambda federation: []
        return
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    command = [sys.executable, "-c", _CHILD]
    path = os.pathsep.join(filter(None, sys.path))
    environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": path}
    pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nowhere, env=environment, text=True) as process:
        try:
            assert process.stdin is not None and process.stdout is not None
            json.dump({"config": config.model_dump_json(), "source_folder": source_folder}, process.stdin)
            process.stdin.close()
            output = process.stdout

            def differences(federation: Federation) -> list[str]:
                lines = output.read().splitlines()
                if process.wait():
                    return ["the data or the model cannot be loaded a second time, in another process"]
                return _differences(digests(federation), json.loads(lines[-1]))

            yield differences
        finally:
            if process.poll() is None:
                process.kill()


def _is_own_code(rule: Rule) -> bool:
    return hasattr(rule, "path") or not type(rule).__module__.startswith("fedrounds.")


def _differences(first: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    differing = {name for name in _WHAT if other[name] != first[name]}
    if differing & {"parameters", "constants"}:
        differing.discard("outputs")  # they follow from these
    return [words for name, words in _WHAT.items() if name in differing]


def digests(federation: Federation) -> dict[str, str]:
    """Return the sha256 of the data, of the model's initial parameters and constants, and of its scores of synthetic
    rows."""
    return {
        "data": digest_of_data(federation.simulated.data).hex(),
        "parameters": params_digest(federation.initial_params_D),
        "constants": constants_digest(federation.module),
        "outputs": federation.scores_digest(_REPETITIONS),
    }


def print_digests() -> None:
    """Print the digests of the configuration on stdin, as the last line."""
    request = json.loads(sys.stdin.read())
    config = parse_config(json.loads(request["config"]))
    print(json.dumps(digests(assemble(config, request["source_folder"] or None))))
