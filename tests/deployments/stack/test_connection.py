from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from fedrounds.deployments.stack import connection as stack_connection
from fedrounds.deployments.stack.connection import client_settings, configured_api_url, connect
from fedrounds.deployments.stack.files import ServerRecord, answers, is_locked, last_lines, server_files, try_lock
from fedrounds.fl_components.errors import ConfigError, StoreError, Unreachable

RunPython = Callable[..., subprocess.Popen[str]]
WaitUntil = Callable[[Callable[[], bool], str], None]

CLIENT = """
import sys
from pathlib import Path
from fedrounds.deployments.stack.connection import connect
with connect(Path(sys.argv[1]), idle_s=1.0) as connection:
    assert "prefect" not in sys.modules
    print(connection.wait(), flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def stranger() -> Iterator[int]:
    """The port of an HTTP server that is not ours and answers everything with 200."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"true")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.ci
def test_five_clients_at_once_share_one_server_which_leaves_after_them(
    warm_home: Path,
    stranger: int,
    run_python: RunPython,
    servers: Callable[[Path], list[psutil.Process]],
    wait_until: WaitUntil,
) -> None:
    files = server_files(warm_home)
    # An old record, whose process id and port are now somebody else's: not believed.
    files.write_record(ServerRecord(pid=os.getpid(), port=stranger, token="0" * 32))
    clients = [run_python(CLIENT, str(warm_home)) for _ in range(5)]
    urls = {client.stdout.readline().strip() for client in clients if client.stdout}
    assert len(urls) == 1, urls
    record = files.read_record()
    assert record is not None and answers(record)
    assert urls == {f"http://127.0.0.1:{record.port}/api"}
    assert record.port != stranger
    assert [server.pid for server in servers(warm_home)] == [record.pid]
    for client in clients:
        client.kill()  # the kernel gives their locks back
    wait_until(lambda: not is_locked(files.server_lock), "the server leaves when its clients are gone")
    wait_until(lambda: servers(warm_home) == [], "its process ends")
    assert not answers(record)


@pytest.mark.ci
def test_a_server_whose_home_is_removed_leaves(warm_home: Path, run_python: RunPython, wait_until: WaitUntil) -> None:
    client = run_python(CLIENT, str(warm_home))
    assert client.stdout is not None and client.stdout.readline()
    record = server_files(warm_home).read_record()
    assert record is not None and answers(record)
    warm_home.rename(warm_home.with_name("away"))  # removed in one step: the server writes while files are deleted
    wait_until(lambda: not answers(record), "the server leaves, though a client of that home still lives")


SERVE = """
import sys
from pathlib import Path
from fedrounds.deployments.stack.server import serve
serve(sys.argv[1], 60.0)
"""


def test_a_server_whose_home_is_removed_while_it_starts_leaves(
    tmp_path: Path, run_python: RunPython, wait_until: WaitUntil
) -> None:
    home = tmp_path / "home"
    files = server_files(home)
    server = run_python(SERVE, str(files.folder))
    wait_until(lambda: files.server_lock.exists() and is_locked(files.server_lock), "the server has its lock")
    home.rename(tmp_path / "away")
    assert server.wait(120) == 0


def test_a_server_leaves_when_another_home_takes_the_place_of_its_own(
    tmp_path: Path, run_python: RunPython, wait_until: WaitUntil
) -> None:
    home = tmp_path / "home"
    files = server_files(home)
    server = run_python(SERVE, str(files.folder))
    wait_until(lambda: files.server_lock.exists() and is_locked(files.server_lock), "the server has its lock")
    home.rename(tmp_path / "away")
    with contextlib.closing(os.fdopen(os.open(server_files(home).server_lock, os.O_CREAT | os.O_RDWR))):
        assert server.wait(120) == 0


WATCH = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace
from fedrounds.deployments.stack.files import ServerFiles, ServerRecord, try_lock
from fedrounds.deployments.stack.server import Watch
files = ServerFiles(Path(sys.argv[1]))
watch = Watch(files, ServerRecord(os.getpid(), 1, "t"), try_lock(files.server_lock, exclusive=True), 60.0)
watch.server = SimpleNamespace(started=True)
watch.start()
time.sleep(120)
"""


def test_a_server_that_cannot_be_watched_ends_and_says_why(tmp_path: Path, run_python: RunPython) -> None:
    files = server_files(tmp_path)
    files.record.mkdir()  # in the record's place
    server = run_python(WATCH, str(files.folder))
    output, _ = server.communicate(timeout=60)
    assert server.returncode == 1
    assert "Is a directory" in output


FLOW = """
import sys
from pathlib import Path
from fedrounds.deployments.stack.connection import client_settings, connect
with connect(Path(sys.argv[1]), print, idle_s=1.0) as connection, client_settings(connection):
    from prefect import flow, task
    from prefect.client.orchestration import get_client

    @task
    def step(number: int) -> int:
        return number

    @flow
    def training() -> int:
        step(1)
        print("kill the server", flush=True)
        sys.stdin.readline()
        return step(2)

    state = training(return_state=True)
    with get_client(sync_client=True) as client:
        kept = client.read_flow_run(state.state_details.flow_run_id).state
    print(kept.type.value, connection.wait(), flush=True)
"""


@pytest.mark.ci
def test_a_flow_survives_kill_9_of_the_server_which_comes_back_on_its_port(
    warm_home: Path, run_python: RunPython, user_home: Path
) -> None:
    client = run_python(FLOW, str(warm_home))
    assert client.stdin is not None and client.stdout is not None
    assert client.stdout.readline().strip() == "starting the local Prefect server"
    assert client.stdout.readline().strip() == "kill the server"
    before = server_files(warm_home).read_record()
    assert before is not None
    psutil.Process(before.pid).kill()
    output, _ = client.communicate("\n", timeout=180)
    assert client.returncode == 0, output
    assert "the local Prefect server has ended; starting it again" in output
    # Prefect's client may have a last warning to say, about events that the dead server did not take.
    assert f"COMPLETED http://127.0.0.1:{before.port}/api" in output.splitlines()
    assert " INFO " not in output  # Prefect's own words are kept off the console
    after = server_files(warm_home).read_record()
    assert after is not None and after.pid != before.pid and after.port == before.port
    assert not (user_home / ".prefect").exists()


@pytest.mark.ci
def test_a_server_that_cannot_start_is_unreachable_with_its_log(tmp_path: Path) -> None:
    home = tmp_path / "home"
    server_files(home).database.mkdir()  # in the database's place
    said: list[str] = []
    with (
        connect(home, said.append, idle_s=1.0) as connection,
        pytest.raises(Unreachable, match=r"ended with exit status [1-9]") as caught,
    ):
        connection.wait()
    assert "unable to open database file" in caught.value.message
    assert "server.log" in str(caught.value.hint)
    assert said == ["starting the local Prefect server"]


@pytest.mark.parametrize("name", ["clients.lock", "server.lock", "server.log"])
def test_a_file_of_the_server_that_cannot_be_written_is_a_store_error(tmp_path: Path, name: str) -> None:
    folder = server_files(tmp_path).folder
    (folder / name).mkdir()  # in the file's place
    with pytest.raises(StoreError, match=f"no server can be run from {folder} .*{name}: Is a directory") as caught:
        connect(tmp_path, idle_s=1.0)
    assert "FEDROUNDS_HOME" in str(caught.value.hint)
    if name != "clients.lock":  # the interest is given up
        interest = try_lock(folder / "clients.lock", exclusive=True)
        assert interest is not None
        os.close(interest)


def test_a_folder_of_the_server_that_cannot_be_made_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "prefect").write_text("a file in the folder's place")
    with pytest.raises(StoreError, match=r"no server can be run from .*File exists"):
        connect(tmp_path, idle_s=1.0)


@pytest.mark.ci
def test_a_server_that_cannot_be_started_is_started_when_it_can_be(
    warm_home: Path, monkeypatch: pytest.MonkeyPatch, wait_until: WaitUntil
) -> None:
    monkeypatch.setattr(stack_connection, "RETRY_INTERVAL_S", 0.1)
    files = server_files(warm_home)
    leaving = try_lock(files.clients_lock, exclusive=True)  # as a server does that leaves: its client waits
    assert leaving is not None
    with connect(warm_home, idle_s=1.0) as connection:
        files.log("server").unlink(missing_ok=True)
        files.log("server").mkdir()
        os.close(leaving)
        with pytest.raises(StoreError, match=r"server\.log: Is a directory"):
            connection.wait()
        files.log("server").rmdir()
        wait_until(lambda: (record := files.read_record()) is not None and answers(record), "the server is started")
    wait_until(lambda: not is_locked(files.server_lock), "the server leaves")


def test_a_configured_server_is_used_as_it_is(tmp_path: Path, stranger: int) -> None:
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{stranger}/api"
    said: list[str] = []
    with connect(tmp_path / "home", said.append) as connection:
        assert connection.wait() == f"http://127.0.0.1:{stranger}/api"
        assert connection.environment() == {
            "FEDROUNDS_HOME": str(tmp_path / "home"),
            "PREFECT_API_URL": f"http://127.0.0.1:{stranger}/api",
            "NO_PROXY": "127.0.0.1,localhost,::1",
            "no_proxy": "127.0.0.1,localhost,::1",
        }
    assert said == []
    assert list((tmp_path / "home").iterdir()) == []  # no server of its own


def test_a_configured_server_that_does_not_answer_is_unreachable(tmp_path: Path) -> None:
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{closed_port()}/api"
    with connect(tmp_path / "home") as connection, pytest.raises(Unreachable, match="Connection refused") as caught:
        connection.wait()
    assert "PREFECT_API_URL" in str(caught.value.hint)


@pytest.mark.parametrize(
    "url",
    [
        "http://admin:hunter2@127.0.0.1:9/api",
        "http://hunter2@127.0.0.1:9/api",
        "http://admin:hunter2\n@127.0.0.1:9/api",
        "http://admin:a 'hunter2'@127.0.0.1:9/api",
        "http://admin%3Ahunter2%40127.0.0.1:9/api",
        "http:admin:hunter2@127.0.0.1:9/api",
        "//admin:hunter2@127.0.0.1:9/api",
        "admin:hunter2@127.0.0.1:9/api",
        "hunter2@127.0.0.1:9/api",
    ],
)
def test_a_configured_server_with_a_password_in_its_address_is_refused(tmp_path: Path, url: str) -> None:
    os.environ["PREFECT_API_URL"] = url
    with pytest.raises(ConfigError, match="with a user name or a password") as caught:
        connect(tmp_path / "home")
    assert "PREFECT_API_AUTH_STRING to user:password" in str(caught.value.hint)
    assert "hunter2" not in f"{caught.value.message} {caught.value.hint}"


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:4200/api",
        "ftp://127.0.0.1/api",
        "http:///api",
        "http://127.0.0.1:99999/api",
        "http://[::1/api",
        "'http://127.0.0.1:4200/api'",
        "http://127.0.0.1:4200/api\n",
        "http://127.0.0.1:4200/api?api_key=hunter2",
        "http://127.0.0.1:4200/api?sig=hunter2",
        "http://127.0.0.1:4200/api#hunter2",
    ],
)
def test_a_configured_server_whose_address_is_none_is_refused(tmp_path: Path, url: str) -> None:
    os.environ["PREFECT_API_URL"] = url
    with pytest.raises(ConfigError, match="not the address of a server") as caught:
        connect(tmp_path / "home")
    assert "api_key=hunter2" not in str(caught.value) and "sig=hunter2" not in str(caught.value)
    assert "http://host:4200/api" in str(caught.value.hint)


@pytest.mark.parametrize("url", ["https://prefect.example/api", "http://[::1]:4200/api", "HTTP://host:80/a%20b/api"])
def test_the_plain_address_of_a_server_is_taken(tmp_path: Path, url: str) -> None:
    os.environ["PREFECT_API_URL"] = url
    with connect(tmp_path / "home") as connection:
        assert connection.environment()["PREFECT_API_URL"] == url


PROFILES = """
active = "team"
[profiles.team]
PREFECT_API_URL = "https://prefect.example/api/"
[profiles.other]
PREFECT_API_URL = "https://other.example/api"
[profiles.none]
PREFECT_LOGGING_LEVEL = "DEBUG"
"""


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "https://prefect.example/api"),
        ({"PREFECT_PROFILE": "other"}, "https://other.example/api"),
        ({"PREFECT_PROFILE": "none"}, None),
        ({"PREFECT_PROFILE": "unknown"}, None),
        ({"PREFECT_API_URL": "http://first.example/api"}, "http://first.example/api"),
        ({"PREFECT_API_URL": ""}, "https://prefect.example/api"),
        ({"PREFECT_HOME": "/nowhere"}, None),
        (
            {"PREFECT_PROFILES_PATH": "~/.prefect/profiles.toml", "PREFECT_HOME": "/nowhere"},
            "https://prefect.example/api",
        ),
    ],
)
def test_the_configured_server_is_read_as_prefect_reads_it(
    user_home: Path, variables: dict[str, str], expected: str | None
) -> None:
    (user_home / ".prefect").mkdir()
    (user_home / ".prefect" / "profiles.toml").write_text(PROFILES)
    os.environ.update(variables)
    assert configured_api_url() == expected


def test_no_profile_is_no_configured_server(user_home: Path) -> None:
    assert configured_api_url() is None
    (user_home / ".prefect").mkdir()
    (user_home / ".prefect" / "profiles.toml").write_text("this is = not [ toml")
    assert configured_api_url() is None


def test_the_environment_is_as_before_after_client_settings(shared_home: Path, run_python: RunPython) -> None:
    client = run_python(SETTINGS, str(shared_home))
    output, _ = client.communicate(timeout=120)
    assert client.returncode == 0, output


SETTINGS = """
import logging, os, sys, threading
from pathlib import Path
from fedrounds.deployments.stack.connection import client_settings, connect
home = Path(sys.argv[1])
with connect(home) as connection:
    before = dict(os.environ)
    import prefect.main  # which sets its loggers up
    from prefect.settings import get_current_settings
    level = logging.getLogger("prefect").level
    with client_settings(connection):
        seen = []
        other = threading.Thread(target=lambda: seen.append(get_current_settings()))  # its context is its own
        other.start()
        other.join()
        for settings in (get_current_settings(), *seen):
            assert settings.api.url == connection.wait(), settings.api.url
            assert settings.home == home / "prefect", settings.home
            assert settings.ui_url == connection.wait().removesuffix("/api"), settings.ui_url
            assert settings.results.local_storage_path.is_relative_to(home)
        assert len(seen) == 1
        assert not logging.getLogger("prefect.flow_runs").isEnabledFor(logging.INFO)
        assert os.environ["PREFECT_API_URL"] == connection.wait()
    assert dict(os.environ) == before
    assert get_current_settings().api.url is None
    assert logging.getLogger("prefect").level == level
"""


@pytest.mark.parametrize(
    "variables",
    [
        {"HTTP_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "ALL_PROXY": "http://127.0.0.1:9"},
        {"ALL_PROXY": "socks5://127.0.0.1:9", "NO_PROXY": "localhost,127.0.0.0/8"},
        {"http_proxy": "socks4://127.0.0.1:9", "NO_PROXY": "[::1]:80"},
    ],
    ids=["http", "socks", "unreadable"],
)
def test_the_home_s_server_is_never_reached_through_a_proxy(
    shared_home: Path, variables: dict[str, str], user_home: Path
) -> None:
    os.environ.update(variables)
    with connect(shared_home) as connection, client_settings(connection):
        from prefect.client.orchestration import get_client
        from prefect.events.clients import PrefectEventsClient

        with get_client(sync_client=True) as client:
            assert client.api_healthcheck() is None

        async def open_both() -> None:
            async with get_client() as client:
                assert await client.api_healthcheck() is None
            async with PrefectEventsClient():
                pass  # its websocket is open

        asyncio.run(open_both())
    for name, value in variables.items():
        assert os.environ[name] == value


def test_a_remote_server_is_asked_through_the_proxy(tmp_path: Path, stranger: int) -> None:
    os.environ.update(PREFECT_API_URL="http://prefect.invalid/api", HTTP_PROXY=f"http://127.0.0.1:{stranger}")
    with connect(tmp_path / "home") as connection:
        assert connection.wait() == "http://prefect.invalid/api"  # the proxy answered


def test_a_lock_ends_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    shared = try_lock(path, exclusive=False)
    assert shared is not None
    assert not is_locked(path)  # shared is not taken
    assert try_lock(path, exclusive=True) is None
    os.close(shared)
    exclusive = try_lock(path, exclusive=True)
    assert exclusive is not None
    assert is_locked(path)
    assert try_lock(path, exclusive=False) is None
    os.close(exclusive)
    assert not is_locked(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"pid": 1}', '{"pid": "x", "port": 1, "token": ""}'])
def test_a_record_that_cannot_be_read_is_no_record(tmp_path: Path, text: str) -> None:
    files = server_files(tmp_path)
    assert files.read_record() is None
    files.record.write_text(text)
    assert files.read_record() is None


def test_a_record_is_written_whole_and_private(tmp_path: Path) -> None:
    files = server_files(tmp_path)
    record = ServerRecord(pid=12, port=34, token="ab")
    files.write_record(record)
    assert files.read_record() == record
    assert files.record.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in files.folder.iterdir()] == ["server.json"]


def test_last_lines_of_a_long_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_lines(log) == ""
    log.write_text("".join(f"line {number}\n" for number in range(10_000)))
    assert last_lines(log, 2) == "line 9998\nline 9999"
