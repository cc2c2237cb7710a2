"""A home whose embedded server runs, and what the tests of the stack look at."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from fedrounds.deployments.stack import deploy
from fedrounds.deployments.stack.connection import connect
from fedrounds.deployments.stack.files import is_locked, server_files
from tests.support import copy_home

ROOT = Path(__file__).resolve().parents[3]
CONFIGURES = ("PREFECT_", "MLFLOW_", "FEDROUNDS_")


@contextmanager
def _clean_environment(folder: Path) -> Iterator[None]:
    """Nothing is configured, and the user's home is `folder`; all as before afterwards."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(CONFIGURES):
            del os.environ[name]
    os.environ.update(HOME=str(folder), PYTHONPATH=os.pathsep.join([str(folder / "modules"), str(ROOT)]))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(autouse=True)
def user_home(tmp_path: Path) -> Iterator[Path]:
    """The user's home folder in this test, in whose environment nothing is configured."""
    folder = tmp_path / "user"
    folder.mkdir()
    with _clean_environment(folder):
        yield folder


@pytest.fixture(scope="session")
def shared_home(template_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home whose embedded server runs for the whole session."""
    home = copy_home(template_home, tmp_path_factory.mktemp("shared") / "home")
    with _clean_environment(home.parent):
        connection = connect(home, idle_s=1.0)
    with connection:
        connection.wait()
        yield home
    _wait_until(lambda: not is_locked(server_files(home).server_lock), "the session's server leaves")


WaitUntil = Callable[[Callable[[], bool], str], None]


def _wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 120.0
    while not condition():
        assert time.monotonic() < deadline, f"not within two minutes: {what}"
        time.sleep(0.05)


@pytest.fixture
def wait_until() -> WaitUntil:
    return _wait_until


@pytest.fixture
def servers() -> Callable[[Path], list[psutil.Process]]:
    """The processes that serve a home, also those that are still starting."""

    def find(home: Path) -> list[psutil.Process]:
        folder = str(server_files(home).folder)
        processes = psutil.process_iter(["cmdline", "status"])
        return [each for each in processes if folder in (each.info["cmdline"] or [])]

    return find


@pytest.fixture
def run_python() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Runs code in a process of its own; what still runs at the test's end is killed."""
    started: list[subprocess.Popen[str]] = []

    def run(code: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **variables},
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


STAND_IN = """
import json, os, time
from pathlib import Path
from prefect import flow

@flow(name="federated-training")
def federated_training(config: str, overrides: list[str] = [], run_id: str | None = None) -> None:
    names = ("FEDROUNDS_HOME", "PREFECT_API_URL", "PREFECT_HOME", "MLFLOW_TRACKING_URI")
    seen = {name: os.environ.get(name) for name in names}
    seen |= {"config": config, "overrides": overrides, "folder": os.getcwd(), "pid": os.getpid()}
    partial = Path(config).with_suffix(".partial")
    partial.write_text(json.dumps(seen))
    partial.rename(Path(config).with_suffix(".json"))
    time.sleep(600)  # a training is still going on when the stack is stopped
"""


@pytest.fixture
def stand_in(user_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The shipped prefect.yaml, with a flow of the training's name and signature in the training's place."""
    modules = user_home / "modules"
    modules.mkdir()
    (modules / "stand_in.py").write_text(STAND_IN)
    path = tmp_path / "prefect.yaml"
    path.write_text(deploy.PREFECT_FILE.read_text().replace("fedrounds.flows.training.", "stand_in."))
    monkeypatch.setattr(deploy, "PREFECT_FILE", path)
    monkeypatch.syspath_prepend(modules)
    yield path
    sys.modules.pop("stand_in", None)
