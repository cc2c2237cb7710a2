"""MLflow for the tests: a database that is ready to use, and a server that can be killed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedrounds.fl_components.store import Store
from fedrounds.tasks.tracking import server

START_S = 120  # a deadline, not a measure: the machine may be busy


@pytest.fixture(scope="session")
def mlflow_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its tables, to be copied: making them takes seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    with server.quiet():
        server.connect(f"sqlite:///{path}")
    return path


@pytest.fixture
def store(store: Store, home: Path, mlflow_template: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty store in a new home folder, whose MLflow database is there already."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copyfile(mlflow_template, home / "mlflow.db")
    return store


class MlflowServer:
    """`mlflow server` on a port of 127.0.0.1, which it keeps when it is started again."""

    def __init__(self, folder: Path, template: Path) -> None:
        self._folder = folder
        folder.mkdir()
        shutil.copyfile(template, folder / "mlflow.db")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = {
            "--backend-store-uri": f"sqlite:///{self._folder / 'mlflow.db'}",
            "--artifacts-destination": str(self._folder / "artifacts"),
            "--host": "127.0.0.1",
            "--port": str(self._port),
            "--workers": "1",
        }
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with open(self._folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *(word for option in options.items() for word in option)],
                stdout=log,
                stderr=log,
                env=environment,
                cwd=self._folder,
                start_new_session=True,  # it starts further processes, which are to end with it
            )
        deadline = time.monotonic() + START_S
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            except OSError as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    log_text = (self._folder / "log").read_text(errors="replace")
                    raise RuntimeError(f"mlflow server did not start:\n{log_text}") from error
                time.sleep(0.1)

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture
def mlflow_server(tmp_path: Path, mlflow_template: Path) -> Iterator[MlflowServer]:
    server_ = MlflowServer(tmp_path / "mlflow-server", mlflow_template)
    try:
        yield server_
    finally:
        server_.kill()
