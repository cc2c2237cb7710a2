"""Fixtures that all tests share: a home folder of their own, and a PostgreSQL server for those that want one."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from fedrounds.fl_components.store import Store
from tests.support import FULL_EXAMPLES, QUICK_EXAMPLES, copy_home, make_template_home, missing, use_home

settings.register_profile("full", deadline=None, max_examples=FULL_EXAMPLES)  # the machine may be busy
settings.register_profile("quick", settings.get_profile("full"), max_examples=QUICK_EXAMPLES)

LONGEST = ("faults", "stack", "end_to_end", "compression", "tasks", "training", "deployments", "server", "store", "")
"""The folders of tests, those that take longest first."""


def pytest_configure(config: pytest.Config) -> None:
    """Fewer generated cases where slow tests are left out."""
    settings.load_profile("quick" if "not slow" in config.option.markexpr else "full")


@pytest.hookimpl(tryfirst=True)  # before what -m leaves out is left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Make `ci` tests slow ones; the longest first: begun last, they would leave one worker with nothing to do."""
    for item in items:
        if item.get_closest_marker("ci") is not None:
            item.add_marker("slow")
    items.sort(key=_rank)


def _rank(item: pytest.Item) -> int:
    folders = item.nodeid.partition("::")[0].split("/")[:-1]
    return min(LONGEST.index(folder) for folder in [*folders, ""] if folder in LONGEST)


@pytest.fixture(scope="session", autouse=True)
def _no_fsync() -> Iterator[None]:
    """What this process writes need not outlive the machine; those that tests kill are others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new FEDROUNDS_HOME, with nothing else of the caller's environment that would move the store."""
    folder = tmp_path / "home"
    use_home(folder, monkeypatch)
    return folder


@pytest.fixture(scope="session")
def empty_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with an empty store, to be copied: making its tables takes a tenth of a second."""
    folder = tmp_path_factory.mktemp("empty") / "home"
    with pytest.MonkeyPatch.context() as environment:
        use_home(folder, environment)
        Store.open().close()
    return folder


@pytest.fixture
def store(home: Path, empty_home: Path) -> Iterator[Store]:
    """An empty store in `home`."""
    shutil.copytree(empty_home, home)
    with Store.open() as opened:
        yield opened


@pytest.fixture(scope="session")
def template_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose databases are made, which takes 20 s, and in which nothing has run: one for all workers."""
    base = tmp_path_factory.getbasetemp()
    return make_template_home((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "template")


@pytest.fixture
def warm_home(template_home: Path, tmp_path: Path) -> Path:
    """A home of the test's own whose databases are made."""
    return copy_home(template_home, tmp_path / "warm" / "home")


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """The URL of a PostgreSQL server on 127.0.0.1 that lives as long as the tests.

    Without PostgreSQL's server programs the test is skipped, but fails where CI=true.
    """
    programs = _postgres_programs()
    account = _account()
    if programs is None or account is None:
        what = "initdb and postgres" if programs is None else "an account named postgres (root may not run it)"
        missing(f"no PostgreSQL server: {what} not found")
    folder = Path(tempfile.mkdtemp(prefix="fedrounds-postgres-"))
    try:
        as_account: dict[str, Any] = {"cwd": folder}
        if os.geteuid() == 0:
            os.chown(folder, account.pw_uid, account.pw_gid)
            as_account |= {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        data = folder / "data"
        subprocess.run(
            [programs / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync"],
            check=True,
            stdout=subprocess.DEVNULL,
            **as_account,
        )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        settings = [
            "listen_addresses=127.0.0.1",
            f"port={port}",
            f"unix_socket_directories={folder}",
            "fsync=off",  # these databases need not outlive the machine
            "synchronous_commit=off",
            "full_page_writes=off",
            "autovacuum=off",
            "shared_buffers=32MB",
        ]
        with open(folder / "log", "wb") as log:
            server = subprocess.Popen(
                [programs / "postgres", "-D", data, *itertools.chain(*(("-c", setting) for setting in settings))],
                stdout=log,
                stderr=log,
                **as_account,
            )
        try:
            url = f"postgresql://postgres@127.0.0.1:{port}/postgres"
            _wait_until_ready(url, server, folder / "log")
            yield url
        finally:
            server.send_signal(signal.SIGINT)  # a fast shutdown: does not wait for clients
            try:
                server.wait(timeout=20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgres_database(postgres_url: str) -> Iterator[str]:
    """The URL of an empty PostgreSQL database, the test's own while it runs.

    It is emptied, not dropped: making a database copies hundreds of files.
    """
    import psycopg

    try:
        yield postgres_url
    finally:
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=[pytest.mark.postgres, pytest.mark.ci])])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database, once of each kind that the store runs on."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'fedrounds.db'}"
    url: str = request.getfixturevalue("postgres_database")
    return url


def _postgres_programs() -> Path | None:
    """The folder with initdb and postgres: on the PATH, or the newest where Debian keeps them."""
    folders = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    versions = Path("/usr/lib/postgresql").glob("*/bin")
    folders += sorted(versions, key=lambda folder: float(folder.parent.name), reverse=True)
    return next((f for f in folders if (f / "initdb").is_file() and (f / "postgres").is_file()), None)


def _account() -> pwd.struct_passwd | None:
    """Whom the server runs as: this account, or postgres where this one is root, which it refuses."""
    if os.geteuid() != 0:
        return pwd.getpwuid(os.geteuid())
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return None


def _wait_until_ready(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    import psycopg

    deadline = time.monotonic() + 60
    while True:
        try:
            psycopg.connect(url, connect_timeout=5).close()
            return
        except psycopg.OperationalError as error:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not start:\n{log.read_text(errors='replace')}") from error
            time.sleep(0.05)
