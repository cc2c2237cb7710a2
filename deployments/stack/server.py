"""The embedded Prefect API server of one home: `python -c "... serve(folder, idle_s)"` in a session of its own.

There are never two, it takes its last port again, and it leaves when no client has held `clients.lock` for a while, or
when its home is gone, also while it starts. Nothing heavy is imported before the server's lock is held.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import sys
import threading
import time
import traceback
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from fedrounds.deployments.stack.files import TOKEN_PATH, ServerFiles, ServerRecord, try_lock
from fedrounds.deployments.stack.replay import App, Receive, ReplayBusy, Scope, Send

if TYPE_CHECKING:
    import uvicorn

SHUTDOWN_LIMIT_S = 30.0

# What a user's environment may change: sizes and periods.
TUNING = {
    # Batches: with SQLite each write is a transaction that may meet another.
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "200",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "200",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_BATCH_SIZE": "500",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_READ_BATCH_SIZE": "200",
    "PREFECT_SERVER_SERVICES_TRIGGERS_READ_BATCH_SIZE": "200",
    # The database is mostly events (0.17 MB a flow run), which nobody reads after a day.
    "PREFECT_SERVER_EVENTS_RETENTION_PERIOD": "P1D",
    "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
    "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
}


def serve(folder: str, idle_s: float) -> None:
    """Serves until no client has been there for `idle_s`. Returns at once when another process serves this home."""
    files = ServerFiles(Path(folder))
    lock = _server_lock(files)
    if lock is None:
        return
    last = files.read_record()
    listener = _bind(last.port if last else _usual_port(files))
    record = ServerRecord(pid=os.getpid(), port=listener.getsockname()[1], token=secrets.token_hex(16))
    _set_environment(files, record.port)
    watch = Watch(files, record, lock, idle_s)
    watch.start()

    import uvicorn
    from prefect.server.api.server import create_app

    app = _with_token(ReplayBusy(create_app(final=True)), record.token)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, ws_per_message_deflate=False, timeout_graceful_shutdown=3
    )
    watch.server = server = uvicorn.Server(config)
    asyncio.run(server.serve(sockets=[listener]))


class Watch(threading.Thread):
    """Announces the server when it is ready, and ends its process when the home is gone or no client is left.

    It is a thread that runs from the moment the lock is held, because the event loop may be missing, busy or blocked
    while the server starts. Whatever goes wrong in it ends the process: a server without its watch would stay forever.

    Args:
      lock: the open descriptor of `server.lock`.
      server: set as soon as there is one.
    """

    def __init__(self, files: ServerFiles, record: ServerRecord, lock: int, idle_s: float) -> None:
        super().__init__(name="server-watch", daemon=True)
        self.server: uvicorn.Server | None = None
        self._files, self._record, self._lock, self._idle_s = files, record, lock, idle_s

    def run(self) -> None:
        status = 1
        try:
            self._watch()
            time.sleep(SHUTDOWN_LIMIT_S)  # the process ends before, and this thread with it
            status = 0
        except HomeRemoved:
            status = 0  # no command can find this server any more, and it can save nothing
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    def _watch(self) -> None:
        """Return when the server has been asked to leave."""
        while self.server is None or not self.server.started:
            self._check_home()
            time.sleep(0.05)
        self._check_home()
        try:
            self._files.write_record(self._record)
        except OSError:
            self._check_home()  # it went in this instant
            raise
        idle_since = time.monotonic()
        while True:
            time.sleep(min(1.0, self._idle_s / 4))
            self._check_home()
            clients = try_lock(self._files.clients_lock, exclusive=True)
            if clients is None:
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since < self._idle_s:
                os.close(clients)
            else:
                # The lock is kept until the process has ended: a client that comes now waits for it, then starts the
                # next server.
                self.server.should_exit = True
                return

    def _check_home(self) -> None:
        """Raise `HomeRemoved` unless the file that this process has locked is still at its place in the home."""
        try:
            there = os.stat(self._files.server_lock)
        except OSError as error:
            raise HomeRemoved from error
        if not os.path.samestat(there, os.fstat(self._lock)):
            raise HomeRemoved


class HomeRemoved(Exception):
    """The home of this server was removed or moved away; another may be in its place."""


def _server_lock(files: ServerFiles) -> int | None:
    deadline = time.monotonic() + 0.5
    while (lock := try_lock(files.server_lock, exclusive=True)) is None and time.monotonic() < deadline:
        time.sleep(0.02)  # a client that looks whether the lock is held takes it for an instant
    return lock


def _usual_port(files: ServerFiles) -> int:
    """A port that is this home's own, below those that systems give to outgoing connections."""
    return 20_000 + zlib.crc32(os.fsencode(files.folder)) % 10_000


def _bind(port: int) -> socket.socket:
    # Named as TCP: asyncio turns Nagle's delay off only for a socket whose protocol says so (24 ms a request).
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError:
        listener.bind(("127.0.0.1", 0))
    return listener


def _set_environment(files: ServerFiles, port: int) -> None:
    """Prefect's settings of this process: the home's own, whatever the user's are for other servers."""
    for name in [name for name in os.environ if name.startswith("PREFECT_") and name not in TUNING]:
        del os.environ[name]
    for name, value in TUNING.items():
        os.environ.setdefault(name, value)
    os.environ.update(
        PREFECT_HOME=str(files.folder),
        PREFECT_SERVER_DATABASE_CONNECTION_URL=f"sqlite+aiosqlite:///{files.database}",
        PREFECT_SERVER_API_HOST="127.0.0.1",
        PREFECT_SERVER_API_PORT=str(port),
        PREFECT_SERVER_UI_STATIC_DIRECTORY=str(files.folder / "ui"),  # by default: into site-packages
        PREFECT_SERVER_ANALYTICS_ENABLED="false",
        DO_NOT_TRACK="true",
    )


def _with_token(app: App, token: str) -> App:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == TOKEN_PATH:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": token.encode()})
        else:
            await app(scope, receive, send)

    return answer
