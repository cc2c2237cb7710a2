"""The client's side of the Prefect server: the one that the user configured, or the home's own.

    with connect(say=print) as connection:         # the server boots ...
        import torch                               # ... while the caller imports and loads
        connection.wait()
        with client_settings(connection):
            federated_training(...)

Importing this module imports no Prefect.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import ssl
import subprocess
import sys
import threading
import time
import tomllib
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import fedrounds
from fedrounds.deployments.stack.files import (
    answers,
    is_locked,
    last_lines,
    os_errors_as_store_errors,
    server_files,
    try_lock,
)
from fedrounds.fl_components.errors import ConfigError, FedroundsError, Unreachable, one_line
from fedrounds.fl_components.redaction import redact_url
from fedrounds.fl_components.store.home import home as default_home
from fedrounds.tasks.proxies import bypassing_loopback, check_usable, direct_prefect_clients, is_loopback

Say = Callable[[str], None]

WATCH_INTERVAL_S = 0.25
RETRY_INTERVAL_S = 5.0
START_LIMIT_S = 180.0

# For glibc: with an arena for each thread that asks the database, the server grew by 0.09 MB a round without end.
ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}

_servers: list[subprocess.Popen[bytes]] = []  # kept, because a Popen that is forgotten warns that its process runs on


def silent(text: str) -> None:
    """Says nothing."""


class Connection(ABC):
    """A Prefect server and this process's interest in it. A context manager; `close` gives the interest up."""

    def __init__(self, home: Path) -> None:
        self.home = home

    @abstractmethod
    def wait(self) -> str:
        """The API's URL, as soon as the server answers. Raises `Unreachable`, or `StoreError` if none can start."""

    @abstractmethod
    def environment(self) -> dict[str, str]:
        """The variables that make another process use the same home and the same server (after `wait`)."""

    @abstractmethod
    def close(self) -> None:
        """Gives up the interest in the server, and never stops it: another client may need it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def connect(home: Path | None = None, say: Say = silent, *, idle_s: float = 60.0) -> Connection:
    """A connection to the configured Prefect server, or else to the embedded one of `home`, started if needed.

    Returns at once: the server boots while the caller goes on, and `Connection.wait` waits for it. An embedded server
    is kept: if it dies it is started again on the same port, until the connection is closed. It leaves by itself
    when there has been no client for `idle_s` (decided by who starts it). `say` is told in words of what takes time,
    also from another thread.

    Raises `ConfigError` if the configured API is no URL of a server, or one with a password, and `StoreError` if the
    home folder cannot be written, or the server cannot be started.
    """
    # Read when prefect and mlflow are imported, so set before: a federation's runs are reported to nobody.
    os.environ.setdefault("DO_NOT_TRACK", "true")
    home = default_home(home)
    api_url = configured_api_url()
    if api_url is not None:
        _check_api_url(api_url)
        return ConfiguredServer(home, api_url)
    return EmbeddedServer(home, say, idle_s=idle_s)


def is_running(home: Path) -> bool:
    """Whether `connect` would find a server: one that is configured, or the home's own, which runs already."""
    return configured_api_url() is not None or is_locked(server_files(home).server_lock)


def configured_api_url() -> str | None:
    """The Prefect API that the user configured: in PREFECT_API_URL, or in the active profile; else None."""
    if api_url := os.environ.get("PREFECT_API_URL"):
        return api_url.rstrip("/")
    try:
        prefect_home = Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()
        profiles_path = Path(os.environ.get("PREFECT_PROFILES_PATH") or prefect_home / "profiles.toml").expanduser()
        data = tomllib.loads(profiles_path.read_text(encoding="utf-8"))
        active = os.environ.get("PREFECT_PROFILE") or data["active"]
        return str(data["profiles"][active]["PREFECT_API_URL"]).rstrip("/") or None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):  # RuntimeError: the account has no home folder
        return None


def _check_api_url(api_url: str) -> None:
    """Raise `ConfigError` unless `api_url` is the plain URL of a server.

    Prefect derives the links to its pages from it, which are shown and stored, so no password may be in it.
    """
    shown = f"PREFECT_API_URL is {redact_url(api_url)!r}"
    if "@" in api_url or "%40" in api_url.partition("?")[0]:
        raise ConfigError(
            f"{shown}, with a user name or a password that Prefect would show in the links to its pages",
            hint="set PREFECT_API_URL to the address without them, and PREFECT_API_AUTH_STRING to user:password, which "
            "Prefect's clients send in a header",
        )
    try:
        parts = urlsplit(api_url)
        is_server = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port or an IPv6 address that is none
        is_server = False
    if not is_server or "?" in api_url or "#" in api_url or not api_url.isprintable() or " " in api_url:
        raise ConfigError(
            f"{shown}, which is not the address of a server",
            hint="set it to an address such as http://host:4200/api (environment, or `prefect config view`), or unset "
            "it: fedrounds then starts its own server",
        )


class ConfiguredServer(Connection):
    """A server that the user configured; it is used as it is."""

    def __init__(self, home: Path, api_url: str) -> None:
        super().__init__(home)
        self.api_url = api_url

    def wait(self) -> str:
        if not is_loopback(self.api_url):
            check_usable(self.api_url)
        reason = self._why_unreachable()
        if reason is not None:
            raise Unreachable(
                f"the Prefect server at {self.api_url} does not answer: {reason}",
                hint="start it or correct PREFECT_API_URL (environment, or `prefect config view`); "
                "with none configured, fedrounds starts its own",
            )
        return self.api_url

    def environment(self) -> dict[str, str]:
        return {"FEDROUNDS_HOME": str(self.home), "PREFECT_API_URL": self.api_url, **bypassing_loopback()}

    def close(self) -> None:
        """Nothing is held."""

    def _why_unreachable(self) -> str | None:
        direct = [urllib.request.ProxyHandler({})] if is_loopback(self.api_url) else []
        try:
            with urllib.request.build_opener(*direct).open(f"{self.api_url}/health", timeout=5.0):
                return None
        except urllib.error.HTTPError as error:
            # A refusal is an answer: keys and passwords are the business of Prefect's own client.
            return None if error.code < 500 else f"HTTP {error.code}"
        except urllib.error.URLError as error:
            # So are certificates, which Prefect may be told to trust.
            return None if isinstance(error.reason, ssl.SSLCertVerificationError) else str(error.reason)
        except (OSError, http.client.HTTPException, ValueError) as error:
            return f"{type(error).__name__}: {error}"


class EmbeddedServer(Connection):
    """The home's own server, held by a shared lock and kept alive by a thread."""

    def __init__(self, home: Path, say: Say, *, idle_s: float) -> None:
        super().__init__(home)
        self._files = server_files(home)
        self._say = say
        self._idle_s = idle_s
        self._ready = threading.Event()
        self._closed = threading.Event()
        self._failure: FedroundsError | None = None
        self._api_url: str | None = None
        self._child: subprocess.Popen[bytes] | None = None
        # Importing prefect makes its home folder: the user's own is left alone.
        os.environ.setdefault("PREFECT_HOME", str(self._files.folder))
        self._interest = try_lock(self._files.clients_lock, exclusive=False)
        try:
            if not self._find():
                first = not self._files.database.exists()
                say(f"starting the local Prefect server{' (first start, about 20 s)' if first else ''}")
                self._spawn_if_none()
        except BaseException:
            self._give_up_interest()
            raise
        self._keeper = threading.Thread(target=self._keep, name="prefect-server-keeper", daemon=True)
        self._keeper.start()

    def wait(self) -> str:
        deadline = time.monotonic() + START_LIMIT_S
        while not self._ready.wait(timeout=0.05):
            if self._failure is not None:
                raise self._failure
            if time.monotonic() > deadline:
                raise self._unreachable(f"did not start within {START_LIMIT_S:.0f} s")
        assert self._api_url is not None
        return self._api_url

    def environment(self) -> dict[str, str]:
        return {
            "FEDROUNDS_HOME": str(self.home),
            "PREFECT_HOME": str(self._files.folder),
            "PREFECT_API_URL": self.wait(),
            "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",  # or Prefect starts a second server when this one is gone
            "DO_NOT_TRACK": "true",
            **bypassing_loopback(),
        }

    def close(self) -> None:
        self._closed.set()
        self._keeper.join()
        self._give_up_interest()

    def _give_up_interest(self) -> None:
        if self._interest is not None:
            os.close(self._interest)
            self._interest = None

    def _keep(self) -> None:
        """Until the connection is closed: takes the lock, finds the server, and starts it when there is none."""
        while not self._closed.is_set():
            try:
                self._look_after()
            except Exception as error:  # whatever it is, `wait` raises it: this thread must not end in silence
                if not isinstance(error, FedroundsError):
                    error = self._unreachable(f"cannot be looked after: {one_line(error)}")
                self._failure = error
                self._closed.wait(RETRY_INTERVAL_S)
            self._closed.wait(WATCH_INTERVAL_S if self._ready.is_set() else 0.05)

    def _look_after(self) -> None:
        if self._interest is None:  # the server was leaving
            self._interest = try_lock(self._files.clients_lock, exclusive=False)
        elif self._ready.is_set():
            if not is_locked(self._files.server_lock):  # it died, or was stopped
                self._failure = None
                self._ready.clear()
                self._child = None
                self._say("the local Prefect server has ended; starting it again")
        elif not self._find():
            self._spawn_if_none()

    def _find(self) -> bool:
        """Whether the server answers; if so, notes where."""
        record = self._files.read_record()
        if self._interest is None or record is None or not answers(record):
            return False
        if not is_locked(self._files.server_lock):  # this home is a copy, and the record that of the original's server
            return False
        self._api_url = f"http://127.0.0.1:{record.port}/api"
        self._failure = None
        self._ready.set()
        return True

    def _spawn_if_none(self) -> None:
        if self._child is not None:
            status = self._child.poll()
            if status is None:
                return
            self._child = None
            if status != 0:
                self._failure = self._unreachable(f"ended with exit status {status}")
                self._closed.wait(RETRY_INTERVAL_S)  # whatever it is, it is not mended sooner
                return
        if self._interest is None or is_locked(self._files.server_lock):
            return
        log_path = self._files.log("server")
        with os_errors_as_store_errors(self._files.folder):
            keep_size = log_path.exists() and log_path.stat().st_size < 2_000_000
            with log_path.open("ab" if keep_size else "wb") as log:
                self._child = subprocess.Popen(
                    [sys.executable, "-c", _SERVE, _root(), str(self._files.folder), str(self._idle_s)],
                    cwd=self._files.folder,  # Prefect reads .env, prefect.toml and pyproject.toml of its working folder
                    env=ONE_ARENA | os.environ | bypassing_loopback(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    umask=0o077,  # its database and logs are for this account alone
                    start_new_session=True,  # Ctrl-C is for the command, not for the server that others use too
                )
        _servers[:] = [*(server for server in _servers if server.poll() is None), self._child]

    def _unreachable(self, what: str) -> Unreachable:
        log = self._files.log("server")
        text = last_lines(log)
        return Unreachable(
            f"the local Prefect server {what}" + (f"; its log ends:\n{text}" if text else ""),
            hint=f"see {log}, or configure a Prefect server in PREFECT_API_URL",
        )


# The folder that holds the packages goes last on the path: an installed package is on it already.
_SERVE = """import sys
sys.path.append(sys.argv[1])
from fedrounds.deployments.stack.server import serve
serve(sys.argv[2], float(sys.argv[3]))
"""


def _root() -> str:
    return str(Path(fedrounds.__file__).parents[1])


@contextlib.contextmanager
def client_settings(connection: Connection) -> Iterator[None]:
    """Prefect's settings of this process while a flow runs here: this server, and a quiet console.

    They hold in this thread, in threads started meanwhile, and in the environment of child processes. Waits for the
    server (`Unreachable`). Prefect's loggers are set to WARNING, and do not say how a run ended, which the caller does,
    unless PREFECT_LOGGING_LEVEL is set.
    """
    variables = connection.environment()
    quiet = "PREFECT_LOGGING_LEVEL" not in os.environ
    variables.setdefault("PREFECT_LOGGING_LEVEL", os.environ.get("PREFECT_LOGGING_LEVEL", "WARNING"))
    with _variables(variables):
        import prefect.context
        import prefect.main  # which makes the console's handler
        from prefect.logging.handlers import PrefectConsoleHandler
        from prefect.settings import temporary_settings

        updates: dict[str, object] = {"api.url": variables["PREFECT_API_URL"]}
        if "PREFECT_HOME" in variables:
            updates["home"] = Path(variables["PREFECT_HOME"])
        logger = logging.getLogger("prefect")
        level = logger.level
        consoles = [each for each in logging.getLogger().handlers if quiet and isinstance(each, PrefectConsoleHandler)]
        logger.setLevel(variables["PREFECT_LOGGING_LEVEL"])
        for console in consoles:
            console.addFilter(_is_not_an_end)
        # Other threads read the global settings, not this thread's.
        prefect.context.refresh_global_settings_context()
        try:
            with temporary_settings(updates), direct_prefect_clients():
                yield
        finally:
            logger.setLevel(level)
            for console in consoles:
                console.removeFilter(_is_not_an_end)
    prefect.context.refresh_global_settings_context()


def _is_not_an_end(record: logging.LogRecord) -> bool:
    """False for what Prefect prints when a flow or task run fails: its traceback, twice, and its final state."""
    if not record.name.startswith(("prefect.flow_runs", "prefect.task_runs")):
        return True
    return record.exc_info is None and not record.getMessage().startswith("Finished in state")


@contextlib.contextmanager
def _variables(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
