from __future__ import annotations

import json
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from uuid import UUID

import psutil
import pytest

from fedrounds.deployments.stack import up as stack_up
from fedrounds.deployments.stack.connection import client_settings, connect
from fedrounds.deployments.stack.deploy import deploy
from fedrounds.deployments.stack.files import answers, server_files
from fedrounds.deployments.stack.up import Part, _free_port, _mlflow, _process, _wait_for_mlflow
from fedrounds.fl_components.errors import Unreachable

RunPython = Callable[..., subprocess.Popen[str]]
WaitUntil = Callable[[Callable[[], bool], str], None]

STACK = """
import sys
from fedrounds.deployments.stack import up
getattr(up, sys.argv[1])(lambda text: print(text, flush=True))
"""


def lines_until_started(stack: subprocess.Popen[str]) -> list[str]:
    assert stack.stdout is not None
    lines: list[str] = []
    while not lines or lines[-1] != "Ctrl-C stops it":
        line = stack.stdout.readline()
        assert line, lines
        lines.append(line.strip())
    return lines


@pytest.mark.ci
def test_up_runs_a_deployment_and_stops_all_that_it_started(
    shared_home: Path, stand_in: Path, tmp_path: Path, run_python: RunPython, wait_until: WaitUntil
) -> None:
    stack = run_python(STACK, "up", FEDROUNDS_HOME=str(shared_home))
    lines = dict(line.split(maxsplit=1) for line in lines_until_started(stack))
    record = server_files(shared_home).read_record()
    assert record is not None
    assert lines["Prefect"] == f"http://127.0.0.1:{record.port}"
    with urllib.request.urlopen(lines["MLflow"] + "/health") as response:
        assert response.status == 200
    assert (shared_home / "mlflow.db").is_file()

    config = tmp_path / "config.yaml"
    config.write_text("name: config\n")
    deployed = deploy(config, home=shared_home)
    with connect(shared_home) as connection, client_settings(connection):
        from prefect.client.orchestration import get_client

        with get_client(sync_client=True) as client:
            run = client.create_flow_run_from_deployment(UUID(deployed["deployment_id"]))
            wait_until(config.with_suffix(".json").exists, "the worker runs the deployment")
            seen = json.loads(config.with_suffix(".json").read_text())
            assert client.read_flow_run(run.id).state_name == "Running"
    family = psutil.Process(stack.pid).children(recursive=True)
    assert seen.pop("pid") in [process.pid for process in family]
    assert seen == {
        "FEDROUNDS_HOME": str(shared_home),
        "PREFECT_API_URL": lines["Prefect"] + "/api",
        "PREFECT_HOME": str(shared_home / "prefect"),
        "MLFLOW_TRACKING_URI": None,  # the home's own database, which is what the UI shows
        "config": str(config),
        "overrides": ["model.start_from=latest"],
        "folder": str(shared_home / "work"),
    }

    stack.send_signal(signal.SIGTERM)
    assert stack.wait(timeout=120) == 0
    assert [process for process in family if process.is_running()] == []
    assert answers(record)  # the server stays: this session is its client too


def test_ui_starts_no_mlflow_beside_a_configured_one(shared_home: Path, run_python: RunPython) -> None:
    stack = run_python(STACK, "ui", FEDROUNDS_HOME=str(shared_home), MLFLOW_TRACKING_URI="http://mlflow.example")
    assert lines_until_started(stack)[-2:] == ["MLflow    http://mlflow.example", "Ctrl-C stops it"]
    assert psutil.Process(stack.pid).children() == []
    stack.send_signal(signal.SIGINT)
    assert stack.wait(timeout=60) == 0


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_part_that_ends_by_itself_is_unreachable_with_its_log(tmp_path: Path) -> None:
    ends_at_once = ["json.tool"]  # finds nothing on its input
    words = "ended with exit status 1; its log ends:\nExpecting value"
    with (
        _process(ends_at_once, {}, tmp_path, "part") as (process, log),
        pytest.raises(Unreachable, match=words) as caught,
    ):
        _wait_for_mlflow(_free_port(20_000), process, log)
    assert caught.value.hint == f"see {log}"


def health_server(home: Path, port: int) -> AbstractContextManager[Part]:
    """Starts fast and answers /health, or ends because its port is taken; and MLflow's server does no more here."""
    (server_files(home).folder / "health").touch()
    return _process(["http.server", "--bind", "127.0.0.1", str(port)], {}, home, "part")


def test_what_answers_on_a_taken_port_is_not_believed(tmp_path: Path) -> None:
    port = _free_port(20_000)
    with health_server(tmp_path, port) as first:
        assert _wait_for_mlflow(port, *first)
        with health_server(tmp_path, port) as second:
            assert not _wait_for_mlflow(port, *second)


@pytest.mark.ci
@pytest.mark.parametrize("times_taken", [3, 4])
def test_a_port_that_is_taken_while_mlflow_starts_is_passed_over_three_times(
    tmp_path: Path, taken_port: int, monkeypatch: pytest.MonkeyPatch, times_taken: int
) -> None:
    started_on: list[int] = []
    free_port = _free_port(taken_port)
    found_free = iter([taken_port] * times_taken + [free_port])

    @contextmanager
    def server(home: Path, database: str, port: int) -> Iterator[Part]:
        assert (home / "mlflow.db").is_file()  # it is not the server that makes it
        started_on.append(port)
        with health_server(home, port) as part:
            yield part

    monkeypatch.setattr(stack_up, "_mlflow_server", server)
    monkeypatch.setattr(
        stack_up, "_free_port", lambda first: next(found_free) if first == stack_up.MLFLOW_PORT else _free_port(first)
    )
    with _mlflow(tmp_path) as wait:
        if times_taken == 4:
            with pytest.raises(Unreachable, match="ended with exit status"):
                wait()
            assert started_on == [taken_port] * 4
        else:
            url, (process, _) = wait()
            assert (url, process.poll()) == (f"http://127.0.0.1:{free_port}", None)
            assert started_on == [taken_port] * 3 + [free_port]


def test_a_port_that_is_taken_is_passed_over(taken_port: int) -> None:
    assert taken_port < _free_port(taken_port) < taken_port + 100
