"""Trainings that are killed: in forked processes that share their imports, and as the real command."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fedrounds.deployments.stack.files import ServerRecord, answers, is_locked, server_files, try_lock
from fedrounds.fl_components.config import load_config
from fedrounds.fl_components.store import Store
from tests.support import copy_home, wait_until
from tests.undisturbed import undisturbed_digest

collect_ignore = ["processes.py"]  # a program without doctests, which takes seconds to import
ROOT = Path(__file__).resolve().parents[2]
FEDERATION = Path(__file__).with_name("federation.yaml")
FEDROUNDS = Path(sys.executable).with_name("fedrounds")
DEADLINE_S = 240.0  # not a measure: the machine may be busy
CONFIGURES = ("PREFECT_", "MLFLOW_", "FEDROUNDS_")

# So that importing starts no thread, and the driver can fork.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}


def clean_environment(**variables: str) -> dict[str, str]:
    """This process's environment, in which nothing is configured but `variables`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(CONFIGURES)}
    return (
        kept | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])} | variables
    )


Cases = dict[str, dict[str, Any]]


@pytest.fixture
def run_cases(tmp_path: Path) -> Callable[..., Cases]:
    """Runs processes.py; what it told of each case, by the case's name."""

    def run(*arguments: str, config: str = "federation.yaml") -> Cases:
        program, folder = ROOT / "tests" / "faults" / "processes.py", tmp_path / "stores"
        folder.mkdir()
        found = subprocess.run(
            [sys.executable, program, arguments[0], folder, *arguments[1:]],
            env=clean_environment(PREFECT_HOME=str(tmp_path / "prefect"), **ONE_THREAD) | {"FAULTS_CONFIG": config},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert found.returncode == 0, found.stderr
        cases = [json.loads(line) for line in found.stdout.splitlines()]
        return {each.pop("case"): each for each in cases}

    return run


class Command:
    """`fedrounds` in a process, whose output goes to files."""

    def __init__(self, folder: Path, home: Path, arguments: tuple[str, ...], options: dict[str, Any]) -> None:
        self._out, self._err = folder / "out", folder / "err"
        variables = {"FEDROUNDS_HOME": str(home), "HOME": str(folder), **options.pop("variables", {})}
        with open(self._out, "wb") as out, open(self._err, "wb") as err:
            self._process = subprocess.Popen(
                [*options.pop("before", []), FEDROUNDS, *arguments, "--json"],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=folder,
                env=clean_environment(**variables),
                **options,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def words(self) -> str:
        """What was said to people."""
        return self._err.read_text()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def end(self, exit_code: int) -> dict[str, Any]:
        """Waits for the end, and returns the object on stdout: its data or its error."""
        found = self._process.wait(timeout=DEADLINE_S)
        reply = json.loads(self._out.read_text() or "{}")
        assert found == exit_code, (reply.get("error"), self.words)
        data: dict[str, Any] = reply["data" if exit_code == 0 else "error"]
        return data


class Stack:
    """A home folder, what is in it, and commands that work there."""

    def __init__(self, folder: Path, home: Path | None = None) -> None:
        self.folder = folder
        self.home = home or folder / "home"
        self._commands: list[Command] = []
        self._numbers = itertools.count()

    def start(self, *arguments: str, **options: Any) -> Command:
        place = self.folder / f"command-{next(self._numbers)}"
        place.mkdir()
        self._commands.append(Command(place, options.pop("home", self.home), arguments, options))
        return self._commands[-1]

    def store(self) -> Store:
        return Store.open(self.home, database_url=f"sqlite:///{self.home}/fedrounds.db", blobs_url=f"{self.home}/blobs")

    def wait(self, command: Command, condition: Callable[[], bool], what: str) -> None:
        """Until `condition` holds, while the command runs."""

        def holds() -> bool:
            if condition():
                return True
            assert command.running, f"the command ended before {what}:\n{command.words}"
            return False

        # Rounds are short: what is to be killed in one must be seen in it.
        wait_until(holds, lambda: f"{what}\n{command.words}", DEADLINE_S, look_every_s=0.005)

    def server(self) -> ServerRecord:
        """Prefect's server, which answers."""
        record = server_files(self.home).read_record()
        assert record is not None and answers(record)
        return record

    def prefect(self, kind: str, run_id: str) -> list[dict[str, Any]]:
        """The "flow_runs" of one run, or their "task_runs", as Prefect's API tells them, the first one first."""
        question = {"flow_runs": {"tags": {"all_": [f"run:{run_id}"]}}, "limit": 200}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.server().port}/api/{kind}/filter",
            data=json.dumps(question).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return sorted(json.load(answer), key=lambda each: str(each["created"]))

    def close(self) -> None:
        """Ends what was started here."""
        for command in self._commands:
            command.kill()
        files = server_files(self.home)
        record = files.read_record()
        if record is not None and answers(record):
            os.kill(record.pid, signal.SIGTERM)
        wait_until(lambda: not is_locked(files.server_lock), "Prefect's server has ended", DEADLINE_S)


@pytest.fixture(scope="session")
def stack(template_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A home whose Prefect server, once a command has started it, serves all tests: starting one takes long."""
    folder = tmp_path_factory.mktemp("stack")
    stack = Stack(folder, copy_home(template_home, folder / "home"))
    interest = try_lock(server_files(stack.home).clients_lock, exclusive=False)
    assert interest is not None
    try:
        yield stack
    finally:
        os.close(interest)
        stack.close()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], str]:
    """The params_digest after so many rounds of federation.yaml, from the stages alone in this process."""

    @cache
    def digest(rounds: int) -> str:
        return undisturbed_digest(load_config(FEDERATION, [f"rounds={rounds}"]), tmp_path_factory.mktemp("undisturbed"))

    return digest
