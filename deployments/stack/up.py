"""`fedrounds up`: the Prefect server, MLflow's UI and a worker, until Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import psutil

from fedrounds.deployments.stack.connection import Connection, Say, connect
from fedrounds.deployments.stack.deploy import WORK_POOL
from fedrounds.deployments.stack.files import last_lines, os_errors_as_store_errors, server_files
from fedrounds.fl_components.errors import Unreachable
from fedrounds.tasks.proxies import unusable_proxies
from fedrounds.tasks.tracking.server import make_database, quiet, tracking_uri

MLFLOW_PORT = 5000
MLFLOW_START_LIMIT_S = 90.0
MLFLOW_MAX_RETRIES = 3
STOP_LIMIT_S = 5.0

Part = tuple[subprocess.Popen[bytes], Path]
"""A process that is part of the stack, and its log."""


def up(say: Say = print, *, home: Path | None = None) -> None:
    """Runs the local stack until Ctrl-C or SIGTERM: Prefect's API and UI, MLflow's UI, and a worker of the work pool.

    What the user configured (PREFECT_API_URL, MLFLOW_TRACKING_URI) is used and not started. Stops what it started;
    the Prefect server stays while others use it. Raises `Unreachable` when a part does not start, or ends by itself.
    """
    _run_stack(say, home, with_worker=True)


def ui(say: Say = print, *, home: Path | None = None) -> None:
    """Like `up` without the worker: only looks."""
    _run_stack(say, home, with_worker=False)


def _run_stack(say: Say, home: Path | None, *, with_worker: bool) -> None:
    with (
        _sigterm_interrupts(),
        contextlib.suppress(KeyboardInterrupt),
        connect(home, say) as connection,
        contextlib.ExitStack() as stack,
    ):
        parts: dict[str, Part] = {}
        mlflow_url = os.environ.get("MLFLOW_TRACKING_URI")
        mlflow = None if mlflow_url else stack.enter_context(_mlflow(connection.home))
        api_url = connection.wait()
        say(f"Prefect   {api_url.removesuffix('/api')}")
        if mlflow is not None:
            mlflow_url, parts["MLflow's server"] = mlflow()
        say(f"MLflow    {mlflow_url}")
        if with_worker:
            parts["the worker"] = stack.enter_context(_worker(connection))
            say(f"worker    runs the deployments of work pool {WORK_POOL!r}; its log is {parts['the worker'][1]}")
            say(f"Prefect's own command line finds this server with PREFECT_API_URL={api_url}")
        say("Ctrl-C stops it")
        while True:
            for name, (process, log) in parts.items():
                if process.poll() is not None:
                    raise _ended(name, process, log)
            time.sleep(0.2)


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, and a second signal does not stop it from cleaning up."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _mlflow(home: Path) -> Iterator[Callable[[], tuple[str, Part]]]:
    """Starts MLflow's server. The block gets a function that waits until it answers: its address and process."""
    database = tracking_uri(home)
    with quiet():
        make_database(database)  # the server would make it in place, and leave half of one when it is interrupted
    with contextlib.ExitStack() as running:

        def start() -> tuple[int, Part]:
            running.close()
            port = _free_port(MLFLOW_PORT)
            return port, running.enter_context(_mlflow_server(home, database, port))

        port, part = start()

        def wait() -> tuple[str, Part]:
            nonlocal port, part
            retries_left = MLFLOW_MAX_RETRIES
            while not _wait_for_mlflow(port, *part):
                if retries_left == 0:
                    raise _ended("MLflow's server", *part)
                retries_left -= 1
                port, part = start()
            return f"http://127.0.0.1:{port}", part

        yield wait


@contextlib.contextmanager
def _mlflow_server(home: Path, database: str, port: int) -> Iterator[Part]:
    # One worker, because each imports MLflow anew. Artifacts are not proxied: runs that write to the database
    # directly must find them too.
    command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", database]
    command += ["--no-serve-artifacts", "--default-artifact-root", str(home / "mlartifacts")]
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with _process(command, environment, home, "mlflow") as part:
        yield part


def _wait_for_mlflow(port: int, process: subprocess.Popen[bytes], log: Path) -> bool:
    """Until the server answers; False if it ended because another program has taken its port meanwhile."""
    deadline = time.monotonic() + MLFLOW_START_LIMIT_S
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        if process.poll() is not None and _free_port(port) != port:
            return False
        if process.poll() is not None or time.monotonic() > deadline:
            raise _ended("MLflow's server", process, log)
        if _listens(process.pid, port):  # else what answers there is another's
            with contextlib.suppress(OSError), opener.open(f"http://127.0.0.1:{port}/health", timeout=2.0):
                return True
        time.sleep(0.1)


def _listens(pid: int, port: int) -> bool:
    """Whether the process `pid`, or one that it has started, listens on the port."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        return any(
            each.status == psutil.CONN_LISTEN and each.laddr.port == port
            for member in (process, *process.children(recursive=True))
            for each in member.net_connections("tcp")
        )
    return False


@contextlib.contextmanager
def _worker(connection: Connection) -> Iterator[Part]:
    command = ["prefect", "worker", "start", "--pool", WORK_POOL, "--type", "process", "--install-policy", "never"]
    command += ["--name", f"fedrounds-{socket.gethostname()}"]
    environment = {"PREFECT_WORKER_QUERY_SECONDS": "5", **os.environ, **connection.environment()}
    for name in unusable_proxies(environment):  # Prefect's own programs fail on these, whether needed or not
        del environment[name]
    with _process(command, environment, connection.home, "worker") as part:
        yield part


@contextlib.contextmanager
def _process(command: list[str], environment: dict[str, str], home: Path, name: str) -> Iterator[Part]:
    """Runs a Python module as a process, and ends it and all that it started with the block."""
    files = server_files(home)
    log_path = files.log(name)
    with os_errors_as_store_errors(files.folder), log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            env=environment,
            cwd=files.folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches this command only, which then ends them in order
        )
    try:
        yield process, log_path
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the process, then what is left of its children: a worker waits for its flow runs, which may last hours."""
    family = _family(process.pid)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_LIMIT_S)
    for child in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.terminate()
    _, alive = psutil.wait_procs(family, timeout=STOP_LIMIT_S)
    for child in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.kill()
    process.wait()


def _family(pid: int) -> list[psutil.Process]:
    """All that the process `pid` has started: its children, and its session, which may outlive it."""
    family = set()
    with contextlib.suppress(psutil.NoSuchProcess):
        family.update(psutil.Process(pid).children(recursive=True))
    for other in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.NoSuchProcess):
            if other.pid != pid and os.getsid(other.pid) == pid:
                family.add(other)
    return list(family)


def _free_port(first: int) -> int:
    """The first port from `first` on that nobody listens on."""
    for port in range(first, first + 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port
    raise Unreachable(f"none of the ports {first} to {first + 99} is free for MLflow's server")


def _ended(name: str, process: subprocess.Popen[bytes], log: Path) -> Unreachable:
    status = process.poll()
    what = "does not answer" if status is None else f"ended with exit status {status}"
    return Unreachable(f"{name} {what}; its log ends:\n{last_lines(log)}", hint=f"see {log}")
