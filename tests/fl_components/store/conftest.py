"""A store on each database, runs in it, and other processes that hold its leases."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import fedrounds.fl_components
from fedrounds.fl_components.store import RoundRecord, RunRecord, Store
from fedrounds.fl_components.store.lease import Lease
from tests.fl_components.store.lock_order import checked

# Takes a lease, then obeys: each line is an expression of `lease`, answered by its value or its exception's name.
_HOLDER = """
import json, sys
from pathlib import Path
from fedrounds.fl_components.run_state import RunState
from fedrounds.fl_components.store import Store
home, database_url, run_id, heartbeat_s, lapse_s = sys.argv[1:]
store = Store.open(Path(home), database_url=database_url, heartbeat_s=float(heartbeat_s), lapse_s=float(lapse_s))
lease = store.acquire(run_id)
print("held", flush=True)
for line in sys.stdin:
    try:
        answer = repr(eval(line))
    except Exception as error:
        answer = type(error).__name__
    print(answer, flush=True)
"""


class Process:
    """Another Python process, spoken to line by line."""

    def __init__(self, program: str, *arguments: object) -> None:
        source = str(Path(fedrounds.__file__).parents[1])
        self._popen = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": source},
        )
        self.pid = self._popen.pid

    def tell(self, line: str) -> None:
        assert self._popen.stdin is not None
        self._popen.stdin.write(line + "\n")
        self._popen.stdin.flush()

    def ask(self, line: str) -> str:
        self.tell(line)
        return self.answer()

    def answer(self) -> str:
        assert self._popen.stdout is not None
        return self._popen.stdout.readline().strip()

    def signal(self, number: int) -> None:
        self._popen.send_signal(number)

    def kill(self, *, reap: bool = True) -> None:
        self._popen.kill()
        if reap:
            self._popen.communicate()


@pytest.fixture(autouse=True)
def lock_order(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every transaction of every test locks in the order that `fedrounds.fl_components.store.database` gives."""
    if request.cls is not None and request.cls.__name__ == "TestChecker":
        yield
        return
    with checked() as order:
        yield
    assert order.violations == []


@pytest.fixture
def open_store(home: Path, database_url: str) -> Iterator[Callable[..., Store]]:
    """Opens the test's store, any number of times (as several processes would)."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(Store.open(home, **({"database_url": database_url} | options)))


@pytest.fixture
def store(open_store: Callable[..., Store]) -> Store:
    return open_store()


@pytest.fixture
def start_process() -> Iterator[Callable[..., Process]]:
    """Starts a program in another process, which does not outlive the test."""
    with ExitStack() as stack:

        def start(program: str, *arguments: object) -> Process:
            process = Process(program, *arguments)
            stack.callback(process.kill)
            return process

        yield start


@pytest.fixture
def start_holder(home: Path, database_url: str, start_process: Callable[..., Process]) -> Callable[..., Process]:
    """Starts a process that holds the lease of a run."""

    def start(run_id: str = "r", heartbeat_s: float = 5.0, lapse_s: float = 30.0) -> Process:
        process = start_process(_HOLDER, home, database_url, run_id, heartbeat_s, lapse_s)
        assert process.answer() == "held"
        return process

    return start


@pytest.fixture
def run_values() -> dict[str, Any]:
    """What a run is created with where a test does not care."""
    return {
        "name": "digits",
        "population": "p",
        "rounds": 5,
        "config": {"seed": 0, "training": {"learning_rate": 0.1, "steps": [1, 2]}},
        "config_digest": "c" * 64,
        "initial_state": b"initial",
        "params_digest": "0" * 64,
        "ancestor": None,
        "engine": {"torch": "2.13.0"},
        "source_folder": "/source",
    }


@pytest.fixture
def new_run(store: Store, run_values: dict[str, Any]) -> Callable[..., RunRecord]:
    """Creates a run; what a test does not care about has a default."""

    def create(run_id: str = "r", in_store: Store | None = None, **given: Any) -> RunRecord:
        return (in_store or store).create_run(run_id=run_id, **(run_values | given))

    return create


@pytest.fixture
def do_round() -> Callable[..., RoundRecord]:
    """Works through one round: reserve, seal, commit."""

    def work(lease: Lease, round: int, state: bytes | None = None) -> RoundRecord:
        collection = lease.reserve(round)
        lease.seal(round, collection, f"sum {round}".encode())
        result = {"metrics": {"train/loss": 1 / round}, "rejected": {}, "seconds": {"train": 0.1}}
        return lease.commit(
            round, state=state or f"state {round}".encode(), params_digest=f"{round:064d}", result=result
        )

    return work
