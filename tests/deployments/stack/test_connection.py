from __future__ import annotations

import os
import re
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from deployments.stack.connection import configured_api_url, connect
from deployments.stack.files import ServerRecord, answers, is_locked, last_lines, server_files, try_lock
from fl_components.errors import Unreachable

RunPython = Callable[..., subprocess.Popen[str]]
WaitUntil = Callable[[Callable[[], bool], str], None]

CLIENT = """
import sys
from pathlib import Path
from deployments.stack.connection import connect
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
    read, write = os.pipe()
    clients = []
    for _ in range(5):
        clients.append(run_python(CLIENT, str(warm_home)))
    os.close(read)
    os.close(write)
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
