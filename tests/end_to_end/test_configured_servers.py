"""The same training on servers that the user configured: a Prefect server, an MLflow server and PostgreSQL."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import DEADLINE_S, HEART, Fedrounds, clean_environment, data_of, prefect


@pytest.mark.slow
@pytest.mark.postgres
def test_configured_servers_give_the_digest_of_the_embedded_ones(
    fedrounds: Fedrounds, home: Path, template_home: Path, tmp_path: Path, postgres_database: str
) -> None:
    with (
        prefect_server(template_home, tmp_path / "prefect") as prefect_url,
        mlflow_server(template_home, tmp_path / "mlflow") as mlflow_url,
    ):
        configured = {
            "PREFECT_API_URL": prefect_url,
            "MLFLOW_TRACKING_URI": mlflow_url,
            "FEDROUNDS_DATABASE_URL": postgres_database,
        }
        there = data_of(fedrounds("train", HEART, "--set", "rounds=2", "--run-id", "r", "--json", **configured))
        flow_run = prefect(prefect_url, f"/flow_runs/{there['prefect_flow_run_id']}")
        assert flow_run["state"]["type"] == "COMPLETED"
        assert there["model_uri"] == "models:/heart-disease/1"
        assert data_of(fedrounds("journal", "verify", "--json", **configured))["rows"] > 0
    here = data_of(fedrounds("train", HEART, "--set", "rounds=2", "--run-id", "r", "--json"))
    assert here["params_digest"] == there["params_digest"]
    assert here["attempt"] == there["attempt"] == 1  # so it was not the same store


@pytest.mark.ci
def test_a_configured_server_that_is_away_is_named(fedrounds: Fedrounds) -> None:
    url = f"http://127.0.0.1:{free_port()}/api"
    completed = fedrounds("train", HEART, PREFECT_API_URL=url)
    assert completed.returncode == 3
    assert url in completed.stderr
    assert "PREFECT_API_URL" in completed.stderr


@contextmanager
def prefect_server(template_home: Path, folder: Path) -> Iterator[str]:
    """Prefect's own server command, on a database whose migrations are done."""
    folder.mkdir()
    shutil.copyfile(template_home / "prefect" / "prefect.db", folder / "prefect.db")
    port = free_port()
    environment = {
        "PREFECT_HOME": str(folder),
        "PREFECT_UI_STATIC_DIRECTORY": str(folder / "ui"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "true",
    }
    command = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with process(command, environment, folder, f"http://127.0.0.1:{port}/api/health"):
        yield f"http://127.0.0.1:{port}/api"


@contextmanager
def mlflow_server(template_home: Path, folder: Path) -> Iterator[str]:
    folder.mkdir()
    shutil.copyfile(template_home / "mlflow.db", folder / "mlflow.db")
    port = free_port()
    command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    environment = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with process(command, environment, folder, f"http://127.0.0.1:{port}/health"):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def process(command: list[str], environment: dict[str, str], folder: Path, health_url: str) -> Iterator[None]:
    """A Python module as a server, until the block ends."""
    log = folder / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", *command],
            env=clean_environment(folder / "home") | environment,
            cwd=folder,
            stdout=output,
            stderr=output,
            start_new_session=True,  # it starts further processes, which are to end with it
        )
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not answers(health_url):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")
            time.sleep(0.1)
        yield
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except OSError:
        return False
    return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
