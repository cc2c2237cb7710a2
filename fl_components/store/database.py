"""SQLite or PostgreSQL behind one interface: opening, migrating, transactions, and what goes wrong with them.

**The lock order.** On SQLite a transaction that writes has the whole database. On PostgreSQL it locks rows, and two
transactions that lock the same rows in different orders deadlock. So each transaction locks in this order:

1. the row of one run's lease;
2. rows of `budgets`: a template before any client's account, then by code point (`accounts.find_budgets`);
3. the row of `journal_head`.

Nothing is locked after the head but what the locks above guard: new rows, the run's own rows, and rows of `budgets`
that the transaction has locked before. Rows of `totals` and `charges` are written only by whoever has locked their
account. An insert counts as well: a foreign key to `budgets` locks the row that it names (FOR KEY SHARE), and waits
for whoever holds that row FOR UPDATE. The tests of the store check this order in every transaction
(tests/fl_components/store/lock_order.py).
"""

from __future__ import annotations

import os
import shlex
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, ProgrammingError

from fedrounds.fl_components.errors import ConfigError, FedroundsError, NotInstalled, StoreError, Unreachable
from fedrounds.fl_components.redaction import redact_url
from fedrounds.fl_components.store.durable_files import sync_folder
from fedrounds.fl_components.store.schema import VERSION, VERSION_TABLE, metadata

LOCK_WAIT_S: Final = 30.0
"""How long a transaction waits for another's lock before it gives up."""

_MIGRATION_LOCK: Final = 0x0FED_2085  # PostgreSQL's advisory lock that lets one process at a time migrate


class Database:
    """An engine with two kinds of transactions: `transaction` writes, `snapshot` reads one state of all tables."""

    def __init__(self, url: str | URL) -> None:
        self._url = _checked(url)
        self.label = redact_url(self._url.render_as_string(hide_password=True))
        if self._url.get_backend_name() == "sqlite":
            _make_private(Path(self._url.database or ""))
            engine = create_engine(self._url, connect_args={"timeout": LOCK_WAIT_S})
            event.listen(engine, "connect", _prepare_sqlite)
            event.listen(engine, "begin", _begin_sqlite)
            self._writer: Engine = engine.execution_options(begin="BEGIN IMMEDIATE")
            self._reader: Engine = engine
        else:
            try:
                engine = create_engine(self._url, pool_pre_ping=True)
            except ImportError as error:
                raise NotInstalled(
                    f"a store on PostgreSQL needs {error.name}, which is not installed",
                    hint="pip install 'fedrounds[server]'",
                ) from error
            event.listen(engine, "connect", _prepare_postgresql)
            self._writer = engine
            self._reader = engine.execution_options(isolation_level="REPEATABLE READ")

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """A transaction that writes: commits at the end, rolls back when the body raises."""
        with self._errors(), self._writer.begin() as connection:
            yield connection

    @contextmanager
    def snapshot(self) -> Iterator[Connection]:
        """A transaction that only reads, and sees one state of the database throughout."""
        with self._errors(), self._reader.begin() as connection:
            yield connection

    def compact(self) -> None:
        """Give the space of deleted rows back, where that is the store's to do: SQLite's file is rewritten, and its log
        emptied. While another process uses the database this is left to a later call."""
        if self._url.get_backend_name() != "sqlite":
            return  # autovacuum does
        connection = self._writer.raw_connection()
        try:
            driver: Any = connection.driver_connection
            driver.execute("VACUUM")
            driver.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        except sqlite3.OperationalError:
            pass
        finally:
            connection.close()

    def close(self) -> None:
        self._reader.dispose()  # both engines share one pool

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except UnicodeEncodeError as error:  # half a surrogate pair: an argument of a command that was not UTF-8
            raise ConfigError(f"{error.object!a} is not UTF-8 text", hint="write it in UTF-8") from error
        except DBAPIError as error:
            known = _explain(error, self.label)
            if known is None:
                raise
            raise known from error


def open_database(url: str | URL) -> Database:
    """The database at `url`, with the newest schema. An empty one is filled, an older one migrated.

    Raises `ConfigError` when the URL cannot be used, `StoreError` when the database holds something else or comes from
    a newer fedrounds, `Unreachable` when its server does not answer, `NotInstalled` when its driver is missing.
    """
    database = Database(url)
    try:
        with database.snapshot() as connection:
            current = _version(connection) == VERSION
        if not current:
            _migrate(database)
    except BaseException:
        database.close()
        raise
    return database


def _checked(url: str | URL) -> URL:
    hint = "write sqlite:////folder/fedrounds.db or postgresql://user@host/database"
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ConfigError(f"{redact_url(str(url))!r} is not a database URL", hint=hint) from error
    except ValueError as error:  # a port that is no number
        raise ConfigError(
            f"{redact_url(str(url))!r} is not a database URL: its port is not a number", hint=hint
        ) from error
    if parsed.drivername in ("postgresql", "postgres", "postgresql+psycopg"):
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername != "sqlite":
        raise ConfigError(f"the store does not run on {redact_url(parsed.drivername)!r}", hint=hint)
    _check_sqlite(parsed, redact_url(parsed.render_as_string(hide_password=True)))
    return parsed


def _check_sqlite(url: URL, label: str) -> None:
    """Raise `ConfigError` unless the URL names one file, whatever the working folder."""
    hint = "write sqlite:// and the absolute path of a file: sqlite:////folder/fedrounds.db"
    file = url.database or ""
    if url.host or url.username or url.password or url.port:
        raise ConfigError(f"the database URL {label} names a host, and SQLite has none", hint=hint)
    if file in ("", ":memory:"):
        raise ConfigError("a database in memory would not outlive the process", hint=hint)
    if file.lower().startswith("file:") or url.query:
        raise ConfigError(
            f"the database URL {label} has parameters or is a file: URI, which may name a database in memory, or "
            "another one in each working folder",
            hint=hint,
        )
    if not os.path.isabs(file):
        raise ConfigError(
            f"the database URL {label} has the relative path {file!r}, which is another database, with other privacy "
            "budgets, in each working folder",
            hint=f"write sqlite:///{os.path.abspath(os.path.expanduser(file))}",
        )


def _make_private(file: Path) -> None:
    """Create the database's file so that its owner alone reads it; SQLite gives its other files the same mode.

    Raises `StoreError` where other accounts may read one that exists.
    """
    try:
        os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        sync_folder(file.parent)
        return
    except FileExistsError:
        modes = [path.stat().st_mode & 0o777 for path in (file, file.parent)]
    except OSError:
        return  # SQLite says why
    if all(mode & 0o077 for mode in modes):
        raise StoreError(
            f"the database {file} has the mode {modes[0]:04o}: other accounts may read it, and it holds what privacy "
            "claims withhold",
            hint=f"chmod 600 {shlex.quote(str(file))}*",
        )


def _prepare_sqlite(connection: sqlite3.Connection, _: Any) -> None:
    connection.isolation_level = None  # transactions are begun by `_begin_sqlite` alone
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA secure_delete = ON")  # what is deleted is overwritten, not left in free pages
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:  # SQLite does not wait for a lock by itself when it changes the journal mode
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _begin_sqlite(connection: Connection) -> None:
    # A writer takes the write lock at its start: one that began as a reader could not be made to wait for it.
    connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))


def _prepare_postgresql(connection: Any, _: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute(f"SET lock_timeout = {LOCK_WAIT_S * 1000:.0f}")
        # A process stopped inside a transaction must not keep its locks for longer than others wait for them.
        cursor.execute(f"SET idle_in_transaction_session_timeout = {LOCK_WAIT_S * 500:.0f}")
    connection.commit()


def _version(connection: Connection) -> str | None:
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    return connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()


def _migrate(database: Database) -> None:
    """Brings the schema to the newest version in one transaction, one process at a time."""
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    with database.transaction() as connection:  # on SQLite this is the lock
        if connection.dialect.name == "postgresql":
            connection.execute(text(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"))
        version = _version(connection)
        if version == VERSION:
            return  # another process was first
        if version is None:
            _refuse_other_tables(connection, database.label)
        elif version not in {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}:
            raise StoreError(
                f"the store at {database.label} was written by another version of fedrounds (schema {version}; this "
                f"one has schema {VERSION})",
                hint="upgrade fedrounds, or use another FEDROUNDS_HOME",
            )
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _refuse_other_tables(connection: Connection, label: str) -> None:
    tables = sorted(inspect(connection).get_table_names())
    if tables:
        shown = ", ".join(tables[:4]) + (", ..." if len(tables) > 4 else "")
        ours = " (some of them named as the store's)" if set(tables) & set(metadata.tables) else ""
        raise StoreError(
            f"the database {label} is not a fedrounds store: it holds other tables{ours}: {shown}",
            hint="give the store a database of its own",
        )


def _explain(error: DBAPIError, label: str) -> FedroundsError | None:
    """The error for people, or None where the fault is in the program."""
    if isinstance(error.orig, sqlite3.Error):
        return _explain_sqlite(error.orig, label)
    return _explain_postgresql(error, label)


def _explain_sqlite(cause: sqlite3.Error, label: str) -> StoreError | None:
    code = (getattr(cause, "sqlite_errorcode", None) or 0) & 0xFF  # the low byte is the primary code
    match code:
        case sqlite3.SQLITE_FULL:
            return disk_full_error(label)
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM:
            return StoreError(
                f"the database {label} cannot be written to",
                hint="give this account the right to write to the file and its folder, or set FEDROUNDS_HOME",
            )
        case sqlite3.SQLITE_CANTOPEN:
            return StoreError(
                f"the database {label} cannot be opened",
                hint="check that its folder exists and that this account may write there",
            )
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return _locked(label)
        case sqlite3.SQLITE_NOTADB:
            return StoreError(
                f"the file {label} is not a SQLite database", hint="move it away, or set FEDROUNDS_DATABASE_URL"
            )
        case sqlite3.SQLITE_CORRUPT:
            return StoreError(f"the database {label} is damaged ({cause})", hint="restore it from a backup")
        case sqlite3.SQLITE_IOERR:
            return StoreError(
                f"reading or writing the database {label} failed ({cause})",
                hint="check that its disk has space left and is healthy; what was committed is kept",
            )
    if isinstance(cause, sqlite3.OperationalError):
        return StoreError(f"the database {label} failed: {cause}")
    return None


def _explain_postgresql(error: DBAPIError, label: str) -> FedroundsError | None:
    state: str | None = getattr(error.orig, "sqlstate", None)
    reason = str(error.orig).strip().split("\n")[0]
    match state:
        case "53100":
            return disk_full_error(label)
        case "55P03":
            return _locked(label)
        case "42501" | "25006":
            return StoreError(
                f"the database {label} cannot be written to ({reason})",
                hint="give its account the right to create and change tables there",
            )
    if isinstance(error, IntegrityError | ProgrammingError):
        return None
    if error.connection_invalidated or state is None or state[:2] in ("08", "28", "3D", "57"):
        return Unreachable(
            f"the database {label} does not answer: {reason}",
            hint="check FEDROUNDS_DATABASE_URL, and that the server runs and lets this account in",
        )
    return StoreError(f"the database {label} failed: {reason}")


def _locked(label: str) -> StoreError:
    return StoreError(
        f"another process has kept the database {label} locked for {LOCK_WAIT_S:.0f} s",
        hint="look for a process that was stopped in the middle of its work, and end it",
    )


def disk_full_error(place: str) -> StoreError:
    return StoreError(
        f"the disk that holds {place} is full",
        hint="free some space, then resume the run: nothing that was committed is lost",
    )
