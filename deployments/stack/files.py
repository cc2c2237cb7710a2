"""The files by which clients and the embedded server of one home find each other.

Truth is in the kernel's locks (`flock`), which end with their process however it ends: `server.lock` is held by the
server, `clients.lock` is shared by all clients. `server.json` only says where to knock; see `answers`.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from fedrounds.fl_components.errors import StoreError
from fedrounds.fl_components.store.durable_files import make_folder

TOKEN_PATH = "/fedrounds"
"""The server answers its token here, so that a client knows it from whatever else may listen on that port."""


@dataclass(frozen=True, slots=True)
class ServerRecord:
    """What the server writes when it is ready. A client believes it only if `answers(record)`."""

    pid: int
    port: int
    token: str


@dataclass(frozen=True, slots=True)
class ServerFiles:
    """The paths of one home's embedded server; `folder` is also its PREFECT_HOME."""

    folder: Path

    @property
    def clients_lock(self) -> Path:
        return self.folder / "clients.lock"

    @property
    def server_lock(self) -> Path:
        return self.folder / "server.lock"

    @property
    def record(self) -> Path:
        return self.folder / "server.json"

    @property
    def database(self) -> Path:
        return self.folder / "prefect.db"

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def read_record(self) -> ServerRecord | None:
        """The last server's record, or None if there is none that can be read."""
        try:
            data = json.loads(self.record.read_text())
            return ServerRecord(pid=int(data["pid"]), port=int(data["port"]), token=str(data["token"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write_record(self, record: ServerRecord) -> None:
        """Replaces the record in one step, so that no reader sees half of it."""
        temporary = self.record.with_suffix(f".{record.pid}.tmp")
        temporary.write_text(json.dumps(asdict(record)))
        temporary.chmod(0o600)
        temporary.replace(self.record)


def server_files(home: Path) -> ServerFiles:
    """The embedded server's files under `home`; makes their folder. Raises `StoreError` if it cannot."""
    folder = home.absolute() / "prefect"
    with os_errors_as_store_errors(folder):
        make_folder(folder, 0o700)
    return ServerFiles(folder)


@contextlib.contextmanager
def os_errors_as_store_errors(folder: Path) -> Iterator[None]:
    """What the system refuses to a server that is to run in `folder`, as a `StoreError`."""
    try:
        yield
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or error
        raise StoreError(
            f"no server can be run from {folder} ({what})",
            hint="check that the disk is not full and that this account may write there, or set FEDROUNDS_HOME to "
            "another folder",
        ) from error


def try_lock(path: Path, *, exclusive: bool) -> int | None:
    """An open descriptor that holds the lock until it is closed (or the process ends), or None if it is taken.

    Raises `StoreError` if the file cannot be locked.
    """
    with os_errors_as_store_errors(path.parent):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                return None
            raise
    return descriptor


def is_locked(path: Path) -> bool:
    """Whether some process holds the lock exclusively."""
    descriptor = try_lock(path, exclusive=False)
    if descriptor is None:
        return True
    os.close(descriptor)
    return False


def answers(record: ServerRecord, *, timeout_s: float = 2.0) -> bool:
    """Whether the server that wrote `record` is the one that answers on its port now.

    A process id proves nothing: ids are used again, and so are ports.
    """
    connection = http.client.HTTPConnection("127.0.0.1", record.port, timeout=timeout_s)
    try:
        connection.request("GET", TOKEN_PATH)
        response = connection.getresponse()
        return response.status == 200 and response.read(200) == record.token.encode()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def last_lines(log: Path, count: int = 12) -> str:
    """The end of a log file, for an error message; empty if there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 16_384))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-count:])
    except OSError:
        return ""
