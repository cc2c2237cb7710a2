"""Where MLflow is, how it is reached, and what its errors mean."""

from __future__ import annotations

import fcntl
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from contextvars import ContextVar
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast
from urllib.parse import urlsplit, urlunsplit

from fedrounds.fl_components.errors import ConfigError, FedroundsError, NotInstalled
from fedrounds.fl_components.redaction import redact_url
from fedrounds.tasks.proxies import bypassing_loopback

if TYPE_CHECKING:
    from mlflow import MlflowClient

# The tracker tries again by itself, so that one call must not: MLflow's own patience is 7 retries of 120 s.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

# What these say (tables are made, a connection is tried again, an export failed) the tracker says in its own words.
_CHATTY = (
    "mlflow.store.db.utils",
    "urllib3.connectionpool",
    "torch.export._trace",
    "torch.fx.experimental.symbolic_shapes",
)
_SCHEMES = ("http", "https", "sqlite", "postgresql", "postgres", "mysql", "mssql", "uc")
_quiet: ContextVar[bool] = ContextVar("quiet", default=False)


_NETWORK_ERRORS = (
    ("Connection refused", "connection refused"),
    ("timed out", "no answer in time"),
    ("timeout", "no answer in time"),
    ("Failed to resolve", "its name does not resolve"),
    ("Connection reset", "connection broken"),
    ("Connection aborted", "connection broken"),
    ("No route to host", "no route to host"),
)


def tracking_uri(home: Path) -> str:
    """Where runs are tracked: $MLFLOW_TRACKING_URI, else the database mlflow.db in the home folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or _local_uri(home)


def check_tracking_uri() -> None:
    """Raise `ConfigError` or `NotInstalled` for an MLFLOW_TRACKING_URI that MLflow will never take."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return
    where = f"MLFLOW_TRACKING_URI is {redact_url(uri)!r}"
    hint = "name a server (http://host:5000) or a database (sqlite:////folder/mlflow.db), or unset it"
    try:
        scheme = (urlsplit(uri).scheme if "://" in uri or ":" in uri else "").partition("+")[0].lower()
    except ValueError as error:
        raise ConfigError(f"{where}, which is not a URL: {error}", hint=hint) from error
    if uri.startswith("databricks"):
        if find_spec("databricks") is None or find_spec("databricks.sdk") is None:
            raise NotInstalled(
                f"{where}, for which the package databricks-sdk is missing", hint="install databricks-sdk"
            )
    elif scheme in ("", "file"):
        if os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() not in ("true", "1"):
            raise ConfigError(f"{where}, a folder, in which MLflow no longer keeps runs", hint=hint)
    elif scheme not in _SCHEMES and scheme not in {each.name for each in entry_points(group="mlflow.tracking_store")}:
        raise ConfigError(f"{where}, and MLflow knows no {scheme!r}", hint=hint)


def artifact_location(uri: str, home: Path) -> str | None:
    """Where a new experiment keeps its artifacts: in the home folder for our own database, else MLflow's choice."""
    if uri != _local_uri(home):
        return None
    (home / "mlartifacts").mkdir(mode=0o700, exist_ok=True)
    return (home / "mlartifacts").as_uri()


def is_local(uri: str) -> bool:
    """Whether `uri` needs no server: then a call that takes long is at work, not waiting.

    >>> is_local("sqlite:////srv/mlflow.db"), is_local("https://mlflow.example.org")
    (True, False)
    """
    return urlsplit(uri).scheme in ("sqlite", "file", "")


def public_uri(uri: str) -> str:
    """Return `uri` without a user name and password, for people.

    >>> public_uri("https://me:secret@mlflow.example.org/x")
    'https://mlflow.example.org/x'
    """
    parts = urlsplit(uri)
    if "@" in parts.netloc:
        uri = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    return redact_url(uri)  # a password may be in the query, or hold a slash


def run_url(uri: str, mlflow_run_id: str) -> str | None:
    """The address of a run's page, or None where `uri` is a database, which has no pages.

    >>> run_url("http://127.0.0.1:5000/", "b1946ac9")
    'http://127.0.0.1:5000/#/runs/b1946ac9'
    """
    return page_url(uri, f"#/runs/{mlflow_run_id}")


def page_url(uri: str, page: str) -> str | None:
    """The address of a page of MLflow's, or None where `uri` is a database."""
    if urlsplit(uri).scheme not in ("http", "https"):
        return None
    return f"{public_uri(uri).rstrip('/')}/{page}"


def prepare() -> None:
    """Import mlflow, which takes 2 to 4 s, with its environment set. What the user has set there is kept."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.update(bypassing_loopback())
    for name in _CHATTY:
        logger = logging.getLogger(name)
        if _passes not in logger.filters:
            logger.addFilter(_passes)
    import mlflow  # noqa: F401


def connect(uri: str) -> MlflowClient:
    """A client of the MLflow at `uri`. A new database gets its tables, which takes 5 to 8 s.

    MLflow's own tracking URI for the process is never set: it is the user's, and setting it changes the environment.
    """
    prepare()
    from mlflow import MlflowClient

    if urlsplit(uri).scheme == "sqlite":
        make_database(uri)
    return MlflowClient(tracking_uri=uri)


def is_there(uri: str) -> bool:
    """Whether anything can have been logged at `uri`: False only for an SQLite database that nobody has made yet."""
    from sqlalchemy import make_url

    return urlsplit(uri).scheme != "sqlite" or Path(make_url(uri).database or "").exists()


def make_database(uri: str) -> None:
    """Make an SQLite database whole or not at all: MLflow cannot use one whose making was cut short, by a kill say.

    Leaves one that is there as it is. Otherwise imports mlflow.
    """
    from sqlalchemy import make_url

    url = make_url(uri)
    path = Path(url.database or "")
    if url.database in (None, "", ":memory:") or path.exists():
        return
    prepare()
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return  # another process made it meanwhile
        unfinished = path.with_name(path.name + ".new")
        for leftover in (unfinished, unfinished.with_name(unfinished.name + "-journal")):
            leftover.unlink(missing_ok=True)
        unfinished.touch(mode=0o600)  # SQLite gives its other files the same mode
        artifacts = (path.parent / "mlartifacts").absolute().as_uri()
        made = SqlAlchemyStore(f"sqlite:///{unfinished}", artifacts)
        made.engine.dispose()
        unfinished.rename(path)


@contextmanager
def quiet() -> Iterator[None]:
    """The chatter of MLflow and of what it calls is dropped inside, in this thread only."""
    token = _quiet.set(True)
    try:
        yield
    finally:
        _quiet.reset(token)


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """What this thread prints to stderr inside is dropped: torch prints the graph of what it failed to export."""
    with redirect_stderr(cast(TextIO, _OtherThreads(sys.stderr))):
        yield


class _OtherThreads:
    """A stream for all threads but the one that made it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._thread = stream, threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._thread else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _passes(record: logging.LogRecord) -> bool:
    return not _quiet.get()


def http_status(error: BaseException) -> int:
    """The HTTP status that an error of MLflow stands for; 500 for any other error."""
    status = getattr(error, "get_http_status_code", None)  # MlflowException, without importing it
    return int(status()) if status is not None else 500


def is_missing(error: BaseException) -> bool:
    """Whether MLflow says that what was asked for does not exist."""
    return getattr(error, "error_code", None) in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND")


def is_refusal(error: BaseException) -> bool:
    """Whether MLflow answered, and said no: trying again as it is will not help."""
    return 400 <= http_status(error) < 500 and http_status(error) not in (408, 429)


def reason(error: BaseException) -> str:
    """Why a call failed, in a few words.

    >>> reason(OSError("HTTPConnectionPool(...): Max retries exceeded (... [Errno 111] Connection refused)"))
    'connection refused'
    """
    text = error.message if isinstance(error, FedroundsError) else str(error)
    if not is_refusal(error):
        for words, meaning in _NETWORK_ERRORS:
            if words in text:
                return meaning
    first_line = text.strip().partition("\n")[0].strip()
    return (first_line if len(first_line) <= 300 else first_line[:297] + "...") or type(error).__name__


def _local_uri(home: Path) -> str:
    return f"sqlite:///{home / 'mlflow.db'}"  # a home's path has nothing that a URL would have to quote
