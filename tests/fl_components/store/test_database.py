"""Opening: new, current, older, newer and foreign databases; concurrent opening; what import costs."""

from __future__ import annotations

import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from fedrounds.fl_components.errors import ConfigError, NotInstalled, StoreError, Unreachable
from fedrounds.fl_components.store import Store
from fedrounds.fl_components.store.blobs import Blobs
from fedrounds.fl_components.store.database import Database
from fedrounds.fl_components.store.schema import VERSION_TABLE, metadata


def test_migrations_make_the_tables(store: Store) -> None:
    with store._transaction() as connection:
        context = MigrationContext.configure(
            connection, opts={"version_table": VERSION_TABLE, "compare_type": True, "compare_server_default": True}
        )
        assert compare_metadata(context, metadata) == []


def test_sqlite_settings_hold_on_every_connection(home: Path) -> None:
    with Store.open() as store, store._transaction() as one, store._database.snapshot() as two:
        for connection in (one, two):
            settings = {
                name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
                for name in ("journal_mode", "foreign_keys", "synchronous", "busy_timeout", "secure_delete")
            }
            assert settings == {
                "journal_mode": "wal",
                "foreign_keys": 1,
                "synchronous": 2,
                "busy_timeout": 30_000,
                "secure_delete": 1,
            }


def test_a_current_store_opens_without_alembic_and_nothing_imports_heavy_packages(home: Path) -> None:
    program = (
        "import sys; import fedrounds.fl_components.store as s; s.Store.open().close(); "
        "print(sorted({'torch', 'prefect', 'mlflow', 'alembic', 'fsspec', 'psycopg', 'psutil'} & sys.modules.keys()))"
    )
    Store.open().close()
    source = Path(__file__).parents[3]
    result = subprocess.run([sys.executable, "-c", program], cwd=source, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_many_processes_open_a_new_store_at_once(
    open_store: Callable[..., Store], home: Path, database_url: str, start_process: Callable[..., Any]
) -> None:
    program = (
        "import sys; from pathlib import Path; import alembic.command\n"
        "from fedrounds.fl_components.store import Store\n"
        "print('ready', flush=True); input()\n"
        "with Store.open(Path(sys.argv[1]), database_url=sys.argv[2]) as store: print(store.runs())"
    )
    processes = [start_process(program, home, database_url) for _ in range(3)]
    assert [process.answer() for process in processes] == ["ready"] * 3
    for process in processes:
        process.tell("")
    assert [process.answer() for process in processes] == ["[]"] * 3
    assert open_store().verify_journal().rows == 0


def test_a_store_of_a_newer_version_is_refused(open_store: Callable[..., Store]) -> None:
    with open_store()._transaction() as connection:
        connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '9999'"))
    with pytest.raises(StoreError, match="another version of fedrounds") as caught:
        open_store()
    assert "upgrade" in (caught.value.hint or "")


def test_a_database_of_something_else_is_refused_and_left_alone(
    open_store: Callable[..., Store], database_url: str
) -> None:
    database = Database(database_url)
    with database.transaction() as connection:
        connection.execute(text("CREATE TABLE runs (run_uuid TEXT)"))
    with pytest.raises(StoreError, match=r"not a fedrounds store.*runs"):
        open_store()
    with database.snapshot() as connection:
        assert list(connection.execute(text("SELECT * FROM runs"))) == []
    database.close()


def test_a_file_that_is_no_database_is_a_store_error(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("no database\n" * 100)
    with pytest.raises(StoreError, match="not a SQLite database"):
        Store.open(database_url=f"sqlite:///{file}")
    assert file.read_text() == "no database\n" * 100


def test_a_database_whose_folder_is_missing_is_a_store_error(home: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be opened") as caught:
        Store.open(database_url=f"sqlite:///{tmp_path}/missing/fedrounds.db")
    assert caught.value.hint


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("sqlite:///file:fed?mode=memory&cache=shared&uri=true", "is a file: URI"),
        ("sqlite:///file::memory:?uri=true", "is a file: URI"),
        ("sqlite:///FILE:fed.db?uri=true", "is a file: URI"),
        ("sqlite:///file:{tmp_path}/fed.db", "is a file: URI"),
        ("sqlite:///{tmp_path}/fed.db?mode=memory&uri=true", "has parameters"),
        ("sqlite:///fed.db", "relative path 'fed.db'.*other privacy budgets"),
        ("sqlite:///./fed.db", "relative path"),
        ("sqlite:///../fed.db", "relative path"),
        ("sqlite:///~/fed.db", "relative path"),
        ("sqlite:/// /fed.db", "relative path"),
        ("sqlite://srv/fed.db", "names a host"),
        ("mysql://host/database", "does not run on 'mysql'"),
        ("nonsense", "not a database URL"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_before_anything_is_made(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, message: str
) -> None:
    (folder := tmp_path / "working").mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("FEDROUNDS_DATABASE_URL", url.format(tmp_path=folder))
    with pytest.raises(ConfigError, match=message) as caught:
        Store.open()
    assert caught.value.hint
    assert list(folder.iterdir()) == []


def test_the_hint_for_a_relative_database_names_the_absolute_one(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        Database("sqlite:///here/fed.db")
    assert caught.value.hint == f"write sqlite:///{tmp_path}/here/fed.db"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("blobs", "relative path"),
        ("./blobs", "relative path"),
        ("file://blobs", "relative path"),
        ("file:blobs", "relative path"),
        ("local://blobs", "relative path"),
        ("dir::file://blobs", "relative path"),
        ("simplecache::blobs/x", "relative path"),
        ("KEY:PASS@bucket/x", "relative path"),
        ("memory://x", "memory"),
        ("memory", "memory"),
        ("simplecache::memory://x", "memory"),
        ("dir::memory", "memory"),
    ],
)
def test_a_place_of_blobs_that_depends_on_the_process_is_refused(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, message: str
) -> None:
    (folder := tmp_path / "working").mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("FEDROUNDS_BLOBS_URL", url)
    with pytest.raises(ConfigError, match=message) as caught:
        Store.open()
    assert "FEDROUNDS_BLOBS_URL" in str(caught.value.hint)
    assert "PASS" not in str(caught.value)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("url", ["{}", "file://{}", "~/blobs", "local://{}"])
def test_a_folder_of_blobs_is_one_in_all_working_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    key = Blobs(url.format(tmp_path / "blobs")).write("run", 1, b"x")
    assert (tmp_path / "blobs" / key).read_bytes() == b"x"


def test_a_server_that_does_not_answer_is_unreachable_and_its_password_is_not_shown(home: Path) -> None:
    with socket.socket() as bound:  # bound but not listening: nobody else gets the port, and it refuses
        bound.bind(("127.0.0.1", 0))
        url = f"postgresql://someone:secret@127.0.0.1:{bound.getsockname()[1]}/fedrounds"
        with pytest.raises(Unreachable) as caught:
            Store.open(database_url=url)
    assert "secret" not in caught.value.message
    assert "127.0.0.1" in caught.value.message


def test_a_home_with_characters_that_mean_something_in_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FEDROUNDS_DATABASE_URL", "FEDROUNDS_BLOBS_URL"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "a b&c=+ü#d:@'e"
    with Store.open(folder) as store:
        assert store.runs() == []
    assert {path.name for path in folder.iterdir()} == {"fedrounds.db"}
    assert {path.name for path in tmp_path.iterdir()} == {folder.name}


def test_postgresql_without_its_driver_says_what_to_install(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)  # importing it now fails
    with pytest.raises(NotInstalled, match="psycopg") as caught:
        Store.open(database_url="postgresql://host/database")
    assert "fedrounds[server]" in (caught.value.hint or "")


@pytest.mark.postgres
def test_a_database_that_does_not_exist_is_unreachable(home: Path, postgres_url: str) -> None:
    with pytest.raises(Unreachable, match="nowhere"):
        Store.open(database_url=postgres_url.rpartition("/")[0] + "/nowhere")


def test_a_locked_database_is_a_store_error(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedrounds.fl_components.store.database.LOCK_WAIT_S", 0.05)
    with Store.open() as store:
        other = sqlite3.connect(home / "fedrounds.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="locked"), store._transaction():
            pass
        assert store.runs() == []  # readers go on
        other.close()
        with store._transaction():
            pass


def test_a_bug_is_not_dressed_up_as_a_store_error(store: Store) -> None:
    with pytest.raises(IntegrityError), store._transaction() as connection:
        connection.execute(text("INSERT INTO leases (run_id, fence) VALUES ('nobody', 0)"))  # no such run
