"""The tables, the same on SQLite and PostgreSQL. `migrations/` makes them; a test holds the two equal."""

from __future__ import annotations

import hmac
import json
import secrets
from typing import Any, Final, TypeAlias

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Dialect,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    Row,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from fedrounds.fl_components.account import Account
from fedrounds.fl_components.canonical import canonical_json
from fedrounds.fl_components.errors import JournalBroken
from fedrounds.fl_components.run_state import RunState

AnyRow: TypeAlias = "Row[*tuple[Any, ...]]"

VERSION: Final = "0008"
"""The newest revision in migrations/versions; a database that says so needs no migration."""

VERSION_TABLE: Final = "fedrounds_version"
"""Not alembic's default name, so that a database of Prefect or MLflow is never taken for ours."""


def new_digest_key() -> str:
    """A random key for `column_digest`, 64 hexadecimal digits."""
    return secrets.token_hex(32)


def column_digest(key: str, column: str, value: Any) -> str | None:
    """Return what the journal holds of a column's value: its HMAC-SHA256 under the key of its row; None for None.

    The key stands beside the value, so whoever can read the value can check it. The journal alone confirms no guess at
    a value that a privacy claim withholds, and once the row is deleted its digests tell nothing.

    >>> key = "0" * 64
    >>> column_digest(key, "result", {"a": 1}) == column_digest(key, "result", {"a": 1})
    True
    >>> column_digest(key, "result", {"a": 1}) == column_digest(key, "withheld", {"a": 1})
    False
    """
    if value is None:
        return None
    return hmac.new(key.encode(), canonical_json([column, value]).encode(), "sha256").hexdigest()


class JsonText(TypeDecorator[Any]):
    """JSON kept as canonical text, so that both databases give back exactly what was put in."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        return None if value is None else canonical_json(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        return None if value is None else json.loads(value)


class StateText(TypeDecorator[RunState]):
    """A run's state as text."""

    impl = String(32)
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else str(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> RunState | None:
        if value is not None and value not in tuple(RunState):
            raise JournalBroken(
                f"a run of the store has the state {value[:40]!r}, which is none",
                hint="restore the database from a backup: it was changed by another program",
            )
        return None if value is None else RunState(value)


class AccountText(TypeDecorator[Account]):
    """An account as its string form."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: Account | None, dialect: Dialect) -> str | None:
        return None if value is None else str(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> Account | None:
        return None if value is None else Account.parse(value)


class database_clock(FunctionElement[float]):
    """The database's own clock in unix seconds: the one clock that all processes of a store share."""

    type = Double()
    inherit_cache = True


@compiles(database_clock, "sqlite")
def _sqlite_clock(element: database_clock, compiler: SQLCompiler, **_: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(database_clock, "postgresql")
def _postgresql_clock(element: database_clock, compiler: SQLCompiler, **_: Any) -> str:
    return "CAST(extract(epoch FROM clock_timestamp()) AS double precision)"


metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

runs = Table(
    "runs",
    metadata,
    Column("run_id", String(128), primary_key=True),
    Column("journal_sequence", BigInteger, nullable=False),  # of its creation: the order of runs, without a clock
    Column("name", String, nullable=False),
    Column("population", String, nullable=False),
    Column("state", StateText, nullable=False),
    Column("rounds", Integer, nullable=False),
    Column("committed_round", Integer, nullable=False),
    Column("config", JsonText, nullable=False),
    Column("config_digest", String(64), nullable=False),
    Column("params_digest", String(64), nullable=False),
    Column("ancestor", String),
    Column("engine", JsonText, nullable=False),
    Column("source_folder", String, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("error", JsonText),
    Column("created_at", Double, nullable=False),
    Column("updated_at", Double, nullable=False),
    Column("initial_state_key", String, nullable=False),
    Column("mlflow_run_id", String),
    Column("tracked_round", Integer, nullable=False),
    Column("model_uri", String),
    Column("prefect_flow_runs", JsonText, nullable=False),
    Column("sweep_id", String(128)),  # of the sweep that this run is a cell of
    Column("digest_key", String(64), nullable=False),  # of the digests that the journal has of this row's columns
    Column("secret_id", String(32)),  # a commitment to the secret of a run under a privacy claim
    Column("secret_home", String),  # where that secret was created
    UniqueConstraint("journal_sequence"),
    Index(None, "name"),
    Index(None, "sweep_id"),
)

sweeps = Table(
    "sweeps",
    metadata,
    Column("sweep_id", String(128), primary_key=True),
    Column("journal_sequence", BigInteger, nullable=False),
    Column("name", String, nullable=False),
    Column("config", JsonText, nullable=False),  # what all cells share
    Column("over", JsonText, nullable=False),  # [[field, [value, ...]], ...]
    Column("source_folder", String, nullable=False),
    Column("created_at", Double, nullable=False),
    UniqueConstraint("journal_sequence"),
)

participations = Table(  # written only for a selection rule that looks at it
    "participations",
    metadata,
    Column("run_id", ForeignKey("runs.run_id"), primary_key=True),
    Column("client", BigInteger, primary_key=True, autoincrement=False),  # its row in the table of clients
    Column("rounds", Integer, nullable=False),
    Column("last_round", Integer, nullable=False),
)

client_states = Table(  # what a client keeps from one round for its next one
    "client_states",
    metadata,
    Column("run_id", ForeignKey("runs.run_id"), primary_key=True),
    Column("client", String(100), primary_key=True),
    Column("round", Integer, primary_key=True, autoincrement=False),  # that made it; it counts once that is committed
    Column("blob_key", String, nullable=False),
)

rounds = Table(
    "rounds",
    metadata,
    Column("run_id", ForeignKey("runs.run_id"), primary_key=True),
    Column("round", Integer, primary_key=True, autoincrement=False),
    Column("collection", Integer, nullable=False),
    Column("params_digest", String(64), nullable=False),
    Column("state_key", String),
    Column("result", JsonText, nullable=False),
    Column("withheld", JsonText, nullable=False),  # what a privacy claim keeps from all views
    Column("digest_key", String(64), nullable=False),  # as in `runs`
    Column("committed_at", Double, nullable=False),
)

budgets = Table(  # what each account may spend
    "budgets",
    metadata,
    Column("account", AccountText, primary_key=True),
    Column("journal_sequence", BigInteger, nullable=False),  # of the row that set its terms last
    Column("epsilon", Double),
    Column("delta", Double, nullable=False),
    Column("unit", String(16), nullable=False),
    Column("neighbouring", String(32), nullable=False),
    Column("accountant", String(32), nullable=False),
    Column("demonstration", Boolean, nullable=False),
    Column("set_at", Double, nullable=False),
)

collections = Table(  # reservations: a round may collect updates, once for each
    "collections",
    metadata,
    Column("run_id", ForeignKey("runs.run_id"), primary_key=True),
    Column("round", Integer, primary_key=True, autoincrement=False),
    Column("collection", Integer, primary_key=True, autoincrement=False),
    Column("journal_sequence", BigInteger, nullable=False),  # of its reservation: the order of the ledger
    Column("state", String(16), nullable=False),
    Column("reserved_at", Double, nullable=False),
    Column("settled_at", Double),
    UniqueConstraint("journal_sequence"),
)

charges = Table(  # what a collection costs each account that pays for it; none without a privacy claim
    "charges",
    metadata,
    Column("run_id", String(128), primary_key=True),
    Column("round", Integer, primary_key=True, autoincrement=False),
    Column("collection", Integer, primary_key=True, autoincrement=False),
    Column("account", ForeignKey("budgets.account"), primary_key=True),
    Column("event", JsonText, nullable=False),
    ForeignKeyConstraint(
        ["run_id", "round", "collection"], ["collections.run_id", "collections.round", "collections.collection"]
    ),
    Index(None, "account"),
)

totals = Table(  # what the charges of an account add up to, by run and in all runs
    "totals",
    metadata,
    Column("account", ForeignKey("budgets.account"), primary_key=True),
    Column("run_id", String(128), primary_key=True),  # "": all runs together
    Column("spent", JsonText, nullable=False),  # [[event, count], ...]
    Index(None, "run_id"),
)

fingerprint_key = Table(  # one row: which key the fingerprints are made with, and where it was made
    "fingerprint_key",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("key_id", String(16), nullable=False),
    Column("host", String, nullable=False),
    Column("home", String, nullable=False),
    Column("journal_sequence", BigInteger, nullable=False),
)

fingerprints = Table(  # keyed digests of the rows and columns of data
    "fingerprints",
    metadata,
    Column("data_id", String(64), primary_key=True),  # the hash of the digests of these data
    Column("digest", String(48), primary_key=True),
    Column("client", String(100), nullable=False),  # who holds it; "" where several do, or where that is not recorded
    Index(None, "digest"),
)

bindings = Table(  # data that a population answers for, once it has a budget
    "bindings",
    metadata,
    Column("population", String, primary_key=True),
    Column("data_id", String(64), primary_key=True),
    Column("journal_sequence", BigInteger, nullable=False),
    Index(None, "data_id"),
)

data_uses = Table(  # runs on data that are not known to be public; they outlive the runs
    "data_uses",
    metadata,
    Column("run_id", String(128), primary_key=True),
    Column("data_id", String(64), primary_key=True),
    Column("name", String, nullable=False),
    Column("population", String, nullable=False),
    Column("units", JsonText, nullable=False),  # whose data a budget answers for: client, example, both or none
    Column("at", Double, nullable=False),
    Column("journal_sequence", BigInteger, nullable=False),
    Index(None, "population"),
    Index(None, "data_id"),
)

seals = Table(
    "seals",
    metadata,
    Column("run_id", ForeignKey("runs.run_id"), primary_key=True),
    Column("round", Integer, primary_key=True, autoincrement=False),
    Column("collection", Integer, nullable=False),
    Column("blob_key", String, nullable=False),
)

leases = Table(  # one row a run; the holder's columns are NULL while nobody holds it
    "leases",
    metadata,
    Column("run_id", ForeignKey("runs.run_id"), primary_key=True),
    Column("fence", Integer, nullable=False),
    Column("host", String),
    Column("boot_id", String),
    Column("pid_namespace", String),
    Column("pid", Integer),
    Column("process_started_s", Double),  # after the boot, so that a corrected clock does not change it
    Column("heartbeat_at", Double),
    Column("lapse_s", Double),
)

journal = Table(
    "journal",
    metadata,
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("at", Double, nullable=False),
    Column("run_id", String(128)),
    Column("kind", String(32), nullable=False),
    Column("content", Text, nullable=False),  # the text itself is hashed, so it is kept as it was written
    Column("previous", String(64), nullable=False),
    Column("hash", String(64), nullable=False),
    Column("key_id", String(16), nullable=False),
    Column("signature", String(128), nullable=False),  # Ed25519 over the hash
    Index(None, "run_id", "sequence"),
)

journal_head = Table(  # one row, locked by every append
    "journal_head",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("rows", BigInteger, nullable=False),
    Column("hash", String(64), nullable=False),
)
