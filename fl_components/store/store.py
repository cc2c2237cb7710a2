"""The store: what a training has done so far, and the only truth about it."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from sqlalchemy import URL, Connection, Select, Text, and_, cast, insert, or_, select

from fedrounds.fl_components.canonical import canonical_json
from fedrounds.fl_components.errors import (
    ConfigError,
    CorruptBlob,
    Diverged,
    JournalBroken,
    LeaseHeld,
    RunConflict,
    RunFailed,
    RunNotFound,
    StoreError,
    TooFewClients,
)
from fedrounds.fl_components.run_state import FINISHED_STATES, RunState
from fedrounds.fl_components.store import journal as journal_
from fedrounds.fl_components.store import lease as lease_
from fedrounds.fl_components.store.blobs import Blobs
from fedrounds.fl_components.store.database import Database, open_database
from fedrounds.fl_components.store.durable_files import write_durably
from fedrounds.fl_components.store.home import home as home_folder
from fedrounds.fl_components.store.keys import KeyRing, SigningKey
from fedrounds.fl_components.store.ledger import Ledger
from fedrounds.fl_components.store.membership import Memberships
from fedrounds.fl_components.store.reconciliation import blobs_in_use, reconcile
from fedrounds.fl_components.store.records import (
    Anchor,
    JournalReport,
    JournalRow,
    RoundRecord,
    RunRecord,
    Seal,
    SweepRecord,
)
from fedrounds.fl_components.store.schema import (
    AnyRow,
    client_states,
    column_digest,
    leases,
    new_digest_key,
    participations,
    rounds,
    runs,
    seals,
    sweeps,
)
from fedrounds.fl_components.store.secrets import RunSecret, destroy_secret, destroy_secrets, last_seen, secret_file

_logger = logging.getLogger(__name__)

_PAGE: Final = 1000
_MAX_ROWS: Final = 2**63 - 1  # a database's whole numbers have 64 bits
_RUN_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")  # also a folder's name

_UNFINISHED: Final = and_(
    runs.c.state != RunState.DELETED, or_(runs.c.state.not_in(FINISHED_STATES), leases.c.pid.is_not(None))
)
"""Of a run joined with its lease: a resume has something to do for it."""

# A round is a pure function: these errors come again.
_MAY_GO_WELL: Final = and_(
    *(cast(runs.c.error, Text).not_like(f'%"code":"{each.code}"%') for each in (TooFewClients, RunFailed, Diverged))
)

_RUN_COLUMNS: Final = [runs.c[name] for name in RunRecord.__slots__]
_SWEEP_COLUMNS: Final = [sweeps.c[name] for name in SweepRecord.__slots__]


class Store:
    """Runs, rounds, charges and the journal in a database, and their blobs beside it.

    Reading needs nothing more; what changes a run goes through its `Lease`. A store may be used from several threads.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, Store.open(Path(folder)) as store:
    ...     run = store.create_run(
    ...         run_id="demo", name="digits", population="public", rounds=2, config={"seed": 0}, config_digest="c0",
    ...         initial_state=b"w0", params_digest="p0", ancestor=None, engine={}, source_folder="/src",
    ...     )
    ...     with store.acquire("demo") as lease:
    ...         collection = lease.reserve(1)
    ...         lease.seal(1, collection, b"sum")
    ...         committed = lease.commit(1, state=b"w1", params_digest="p1", result={"metrics": {"train/loss": 0.5}})
    ...     (store.run("demo").committed_round, store.state_blob("demo"), store.verify_journal().rows)
    (1, b'w1', 4)
    """

    def __init__(self, home: Path, database: Database, blobs: Blobs, *, heartbeat_s: float, lapse_s: float) -> None:
        if not 0 < heartbeat_s < lapse_s / 2:
            raise ValueError(f"heartbeat_s ({heartbeat_s}) must be above 0 and below half of lapse_s ({lapse_s})")
        self.home = home
        self.heartbeat_s = heartbeat_s
        self.lapse_s = lapse_s
        self.keys = KeyRing(home / "secrets")
        self._may_sign = False
        self._anchor_file = home / "secrets" / "journal.anchor"
        self._database = database
        self._blobs = blobs
        self.ledger = Ledger(database, self._signing)
        self.memberships = Memberships(database, self.keys, self._signing, home)

    @classmethod
    def open(
        cls,
        home: Path | None = None,
        *,
        database_url: str | None = None,
        blobs_url: str | None = None,
        heartbeat_s: float = 5.0,
        lapse_s: float = 30.0,
    ) -> Store:
        """Opens the store, making or migrating it when needed.

        Args:
            home: the home folder; by default $FEDROUNDS_HOME or ~/.fedrounds.
            database_url: sqlite:/// with an absolute path, or postgresql://...; by default $FEDROUNDS_DATABASE_URL or a
                file in the home.
            blobs_url: the absolute path of a folder, or an fsspec URL; by default $FEDROUNDS_BLOBS_URL or the folder
                blobs in the home.
            heartbeat_s: seconds between two signs of life of a lease's holder.
            lapse_s: seconds without one after which another process may take the run over.

        Raises:
            ConfigError: the home or one of the URLs is relative, in memory, or no URL that the store can use.
            StoreError: the home cannot be written to, or the database is not a store that this version can use.
            Unreachable: the database's server does not answer.
            NotInstalled: PostgreSQL's driver is missing.
        """
        folder = home_folder(home)
        in_home = URL.create("sqlite", database=str(folder / "fedrounds.db"))
        blobs = Blobs(blobs_url or os.environ.get("FEDROUNDS_BLOBS_URL") or str(folder / "blobs"))
        database = open_database(database_url or os.environ.get("FEDROUNDS_DATABASE_URL") or in_home)
        store = cls(folder, database, blobs, heartbeat_s=heartbeat_s, lapse_s=lapse_s)
        try:
            store.finish_erasures()
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- runs ---

    def create_run(
        self,
        *,
        run_id: str,
        name: str,
        population: str,
        rounds: int,
        config: dict[str, Any],
        config_digest: str,
        initial_state: bytes,
        params_digest: str,
        ancestor: str | None,
        engine: dict[str, Any],
        source_folder: str,
        sweep_id: str | None = None,
        secret_id: str | None = None,
        secret_home: str | None = None,
    ) -> RunRecord:
        """Make a run, pending at round 0, perhaps as a cell of a sweep.

        One that is there already with an equal `config_digest` is returned, with the secret that it began with.

        Raises `RunConflict`, naming the fields that differ, when the run id belongs to another configuration.
        """
        check_run_id(run_id)
        existing = self.find_run(run_id)
        if existing is None:
            if self.find_sweep(run_id) is not None:
                raise _taken(run_id, "sweep", "run")
            initial_state_key = self._blobs.write(run_id, 0, initial_state)
            with self._transaction() as connection:
                journal_.lock(connection)  # so that of two processes that create it only one does
                existing = _find_run(connection, run_id)
                if existing is None:
                    content = {
                        "name": name,
                        "population": population,
                        "rounds": rounds,
                        "config_digest": config_digest,
                        "params_digest": params_digest,
                        "ancestor": ancestor,
                        "sweep_id": sweep_id,
                        "source_folder": source_folder,
                        "secret_id": secret_id,
                        "secret_home": secret_home,
                    }
                    digested = {"config": config, "engine": engine, "initial_state_key": initial_state_key}
                    key = new_digest_key()
                    digests = {column: column_digest(key, column, value) for column, value in digested.items()}
                    row = self._append(connection, run_id, "run.created", {**content, "digests": digests})
                    connection.execute(
                        insert(runs).values(
                            run_id=run_id,
                            journal_sequence=row.sequence,
                            state=RunState.PENDING,
                            committed_round=0,
                            attempt=0,
                            created_at=row.at,
                            updated_at=row.at,
                            tracked_round=0,
                            prefect_flow_runs=[],
                            digest_key=key,
                            **content,
                            **digested,
                        )
                    )
                    connection.execute(insert(leases).values(run_id=run_id, fence=0))
        return self.check_same(existing, config, config_digest, sweep_id) if existing is not None else self.run(run_id)

    def check_same(
        self, run: RunRecord, config: dict[str, Any], config_digest: str, sweep_id: str | None = None
    ) -> RunRecord:
        """Returns the run, where it has this configuration and is a cell of that sweep, if one is given.

        Raises `RunConflict`.
        """
        if run.state == RunState.DELETED:
            raise RunConflict(f"run {run.run_id!r} was deleted, and its charges stay", hint="give the run another id")
        if run.config_digest != config_digest:
            raise _conflict(f"run {run.run_id!r}", "run id", run.config, config)
        if sweep_id not in (None, run.sweep_id):
            raise RunConflict(
                f"run {run.run_id!r} is there already, and is no cell of the sweep {sweep_id!r}",
                hint="give another sweep id",
            )
        return run

    def run(self, run_id: str) -> RunRecord:
        """Raises `RunNotFound`."""
        record = self.find_run(run_id)
        if record is None:
            raise RunNotFound(f"there is no run {run_id!r} in this store", hint="`fedrounds runs` lists them")
        return record

    def find_run(self, run_id: str) -> RunRecord | None:
        with self._database.snapshot() as connection:
            return _find_run(connection, run_id)

    def runs(
        self,
        *,
        name: str | None = None,
        sweep_id: str | None = None,
        unfinished: bool = False,
        deleted: bool = False,
        limit: int | None = None,
    ) -> list[RunRecord]:
        """Runs, the newest first; of a name, of a sweep, or only those that a resume has something to do for.

        Those that were deleted are among them only where `deleted` says so.
        """
        most = None if limit is None else min(limit, _MAX_ROWS)
        query = select(*_RUN_COLUMNS).order_by(runs.c.journal_sequence.desc()).limit(most)
        if not deleted:
            query = query.where(runs.c.state != RunState.DELETED)
        if name is not None:
            query = query.where(runs.c.name == name)
        if sweep_id is not None:
            query = query.where(runs.c.sweep_id == sweep_id)
        if unfinished:
            query = query.join(leases, leases.c.run_id == runs.c.run_id).where(_UNFINISHED)
        return [RunRecord(*row) for row in self._rows(query)]

    def is_held(self, run_id: str) -> bool:
        """Whether a process works on the run, as far as can be told from here."""
        return lease_.is_held(self, run_id)

    def latest_unfinished(self) -> RunRecord | None:
        """The run worked on last among those that a resume has something to do for.

        These are the runs with rounds to go (Cancelled ones too, and Failed ones but for those that would fail again in
        the same way), and those whose process was killed after the last round, before it gave its lease back: what
        MLflow and Prefect show of them is not complete.
        """
        query = select(*_RUN_COLUMNS).join(leases, leases.c.run_id == runs.c.run_id).where(_UNFINISHED)
        return self._latest(query.where(or_(runs.c.error.is_(None), _MAY_GO_WELL)))

    def latest_model(self, name: str) -> RunRecord | None:
        """The run of that name whose last round was committed last, among those that came to their end."""
        query = (
            select(*_RUN_COLUMNS)
            .join(rounds, and_(rounds.c.run_id == runs.c.run_id, rounds.c.round == runs.c.committed_round))
            .where(runs.c.name == name, runs.c.state.in_(FINISHED_STATES))
            .order_by(rounds.c.committed_at.desc())
        )
        return self._latest(query)

    def acquire(self, run_id: str, *, say: Callable[[str], None] | None = None) -> lease_.Lease:
        """Takes the run's lease, to be used as a context manager.

        A holder that is dead on this host is superseded at once. One that lives here raises `LeaseHeld`. One that is
        stopped or silent, or on another host, is waited for: `say` (by default a log line) gets a sentence, and when
        the lease lapses it is superseded, when the holder is heard of `LeaseHeld` is raised.

        Raises `RunNotFound`, also of a run that was deleted, and `LeaseHeld`.
        """
        if self.run(run_id).state == RunState.DELETED:
            raise RunNotFound(
                f"run {run_id!r} was deleted", hint=f"its charges stay: `fedrounds privacy statement {run_id}`"
            )
        return lease_.acquire(self, run_id, say)

    def delete_run(self, run_id: str, *, by: str) -> None:
        """Delete a run (`Lease.delete`), by the account `by`.

        Raises `RunNotFound`, and `LeaseHeld` where a process works on it.
        """
        with lease_.acquire(self, run_id, _refuse_to_wait) as lease:
            lease.delete(by=by)

    def compact(self) -> None:
        """Give the space of deleted rows back (`Database.compact`)."""
        self._database.compact()

    @property
    def secrets_folder(self) -> Path:
        """Where this home keeps the secrets of runs under a privacy claim."""
        return self.home / "secrets" / "runs"

    def secret_file(self, run: RunRecord | AnyRow) -> Path:
        """The file of a run's secret, which exists in the home that created it."""
        return secret_file(self.secrets_folder, run.run_id, run.secret_id or "")

    def destroy_secrets(self, run_id: str) -> None:
        """Overwrite and remove all secrets of a run in this home: also one that a fresh collection has replaced."""
        destroy_secret(self.secret_file(self.run(run_id)))
        destroy_secrets(self.secrets_folder, run_id, database=self.identity())

    def finish_erasures(self) -> None:
        """Erase what a process that was killed, or a place that could not be written, left of runs that are deleted or
        can never continue, and the keys of committed rounds. A run that another process holds is left to it."""
        diverged = and_(runs.c.state == RunState.FAILED, cast(runs.c.error, Text).like(f'%"code":"{Diverged.code}"%'))
        with_secrets = {file.name.partition("@")[0] for file in self.secrets_folder.glob("*@*")}
        sealed = {row.run_id for row in self._rows(select(seals.c.run_id).distinct())}
        for run in self._rows(select(runs).where(or_(runs.c.state == RunState.DELETED, diverged))):
            left = run.state == RunState.DELETED and run.initial_state_key
            if left or run.run_id in sealed or run.run_id in with_secrets:
                try:
                    with lease_.acquire(self, run.run_id, _refuse_to_wait) as lease:
                        lease.erase()
                except (StoreError, RunNotFound) as problem:
                    _logger.warning("what is left of run %s could not be erased: %s", run.run_id, problem.message)
        if with_secrets:
            query = select(runs.c.run_id, runs.c.secret_id, runs.c.committed_round)
            for row in self._rows(query.where(runs.c.secret_id.is_not(None), runs.c.state != RunState.DELETED)):
                if row.run_id in with_secrets:
                    with suppress(StoreError):  # another process commits its round, or resumes it
                        self._forget_committed_rounds(row)

    def _forget_committed_rounds(self, run: AnyRow) -> None:
        """Advance a run's secret past its committed rounds, and collect their seals."""
        secret = RunSecret.open(self.secrets_folder, run.run_id, run.secret_id)
        if secret.round <= run.committed_round:
            with lease_.acquire(self, run.run_id, _refuse_to_wait) as lease:
                secret.advance(self.run(run.run_id).committed_round + 1)
                lease.collect_garbage()

    # --- sweeps ---

    def create_sweep(
        self,
        *,
        sweep_id: str,
        name: str,
        config: dict[str, Any],
        over: Sequence[tuple[str, Sequence[Any]]],
        source_folder: str,
    ) -> SweepRecord:
        """Makes a sweep; its cells become runs as they begin. One that is there already and is equal is returned.

        Raises `RunConflict` when the id belongs to another sweep or to a run.
        """
        check_sweep_id(sweep_id)
        content = {"name": name, "config": config, "over": [[field, list(values)] for field, values in over]}
        with self._transaction() as connection:
            journal_.lock(connection)  # so that of two processes that create it only one does
            existing = _find_sweep(connection, sweep_id)
            if existing is None:
                if _find_run(connection, sweep_id) is not None:
                    raise _taken(sweep_id, "run", "sweep")
                values = {"sweep_id": sweep_id, "source_folder": source_folder, **content}
                row = self._append(connection, None, "sweep.created", values)
                connection.execute(insert(sweeps).values(journal_sequence=row.sequence, created_at=row.at, **values))
        if existing is not None:
            before = {"name": existing.name, "config": existing.config, "over": existing.over}
            if canonical_json(before) != canonical_json(content):
                raise _conflict(f"sweep {sweep_id!r}", "sweep id", before, content)
        return existing or self.sweep(sweep_id)

    def sweep(self, sweep_id: str) -> SweepRecord:
        """Raises `RunNotFound`."""
        record = self.find_sweep(sweep_id)
        if record is None:
            raise RunNotFound(f"there is no sweep {sweep_id!r} in this store", hint="`fedrounds runs` lists its cells")
        return record

    def find_sweep(self, sweep_id: str) -> SweepRecord | None:
        with self._database.snapshot() as connection:
            return _find_sweep(connection, sweep_id)

    # --- rounds ---

    def rounds(self, run_id: str, after: int = 0) -> list[RoundRecord]:
        """The committed rounds past round `after`, in order."""
        query = (
            select(*lease_.ROUND_COLUMNS)
            .where(rounds.c.run_id == run_id, rounds.c.round > after)
            .order_by(rounds.c.round)
        )
        return [RoundRecord(*row) for row in self._rows(query)]

    def round(self, run_id: str, n: int) -> RoundRecord | None:
        rows = self._rows(select(*lease_.ROUND_COLUMNS).where(rounds.c.run_id == run_id, rounds.c.round == n))
        return RoundRecord(*rows[0]) if rows else None

    def participations(self, run_id: str, clients: Sequence[int]) -> list[int]:
        """In how many committed rounds each of these clients (rows of the table of clients) took part."""
        counts: dict[int, int] = {}
        for start in range(0, len(clients), _PAGE):
            query = select(participations.c.client, participations.c.rounds).where(
                participations.c.run_id == run_id, participations.c.client.in_(clients[start : start + _PAGE])
            )
            counts |= {row.client: row.rounds for row in self._rows(query)}
        return [counts.get(client, 0) for client in clients]

    # --- blobs ---

    def read_blob(self, key: str) -> bytes:
        """Raises `CorruptBlob` when the blob is missing or its content does not match its name."""
        return self._blobs.read(key)

    def client_states(self, run_id: str, clients: Sequence[str]) -> dict[str, bytes]:
        """Return what these clients keep, as of the last committed round, for those that keep something.

        Raises `CorruptBlob`.
        """
        keys: dict[str, str] = {}
        for start in range(0, len(clients), _PAGE):
            query = (
                select(client_states.c.client, client_states.c.blob_key)
                .join(runs, runs.c.run_id == client_states.c.run_id)
                .where(
                    client_states.c.run_id == run_id,
                    client_states.c.round <= runs.c.committed_round,
                    client_states.c.client.in_(clients[start : start + _PAGE]),
                )
                .order_by(client_states.c.round)
            )
            keys |= {row.client: row.blob_key for row in self._rows(query)}
        return {client: self._blobs.read(key) for client, key in keys.items()}

    def state_blob(self, run_id: str) -> bytes:
        """The state of the last committed round, or the initial one. Raises `RunNotFound`, `CorruptBlob`."""
        state_key = (
            select(rounds.c.state_key)
            .where(rounds.c.run_id == run_id, rounds.c.round == runs.c.committed_round)
            .scalar_subquery()
        )
        query = select(runs.c.initial_state_key, state_key).where(runs.c.run_id == run_id)

        def current() -> str:
            rows = self._rows(query)
            return str(rows[0][1] or rows[0][0]) if rows else self.run(run_id).initial_state_key

        key = current()
        while True:
            try:
                return self._blobs.read(key)
            except CorruptBlob:
                newer = current()
                if newer == key:
                    raise
                key = newer  # the run has moved on meanwhile, and its older states are pruned

    def sealed(self, run_id: str, round: int) -> Seal | None:
        """The round's seal, or None when it has none, which is also so once it has committed."""
        query = select(seals.c.collection, seals.c.blob_key).where(seals.c.run_id == run_id, seals.c.round == round)
        rows = self._rows(query)
        if not rows:
            return None
        try:
            return Seal(rows[0].collection, self._blobs.read(rows[0].blob_key))
        except CorruptBlob:
            if self._rows(query):
                raise
            return None  # the round has committed meanwhile

    # --- the journal ---

    def journal(self, run_id: str | None = None) -> Iterator[JournalRow]:
        """The journal's rows, of one run or all, in order."""
        after = 0
        while True:
            with self._database.snapshot() as connection:  # a page at a time: a slow reader holds no transaction open
                page = journal_.read(connection, run_id, after, _PAGE)
            yield from page
            if len(page) < _PAGE:
                return
            after = page[-1].sequence

    def verify_journal(self, anchors: Sequence[Anchor] = ()) -> JournalReport:
        """Checks every row of the journal, its signatures, that it goes on from each anchor (this home's own and those
        that are given), that the other tables are what it says (`reconciliation`), and that the blobs that they name
        are there and whole.

        An anchor that a fresh collection took for lost is left out: the journal itself says what was lost. Raises
        `JournalBroken`, naming the first that is wrong.
        """
        with self._database.snapshot() as connection:
            lost = journal_.acknowledged(connection)
            expected = [each for each in (*self.own_anchors(), *anchors) if (each.rows, each.head) not in lost]
            report = journal_.verify(connection, self.keys.trusted, expected)
            reconcile(connection)
            blobs = blobs_in_use(connection)
        for owner, key in blobs.items():
            try:
                self._blobs.read(key)
            except CorruptBlob as error:
                with self._database.snapshot() as connection:
                    if blobs_in_use(connection).get(owner) == key:  # else a training has pruned it meanwhile
                        raise JournalBroken(f"the {owner} is not what was committed: {error.message}") from error
        return report

    def journal_head(self) -> JournalReport:
        """How many rows the journal has, and the last one's hash; nothing is checked."""
        with self._database.snapshot() as connection:
            return journal_.head(connection)

    def anchor(self) -> JournalReport:
        """Remembers the journal's head in this home, outside the database, and returns it.

        An earlier one that is no row of the journal stays: `verify_journal` and a resume are to find it.
        """
        report = self.journal_head()
        if not self.lost(self.own_anchors()):
            write_durably(self._anchor_file, json.dumps(asdict(report)).encode(), private=True)
        return report

    def lost(self, anchors: Iterable[Anchor], run_id: str | None = None) -> list[Anchor]:
        """Which of these anchors are no rows of the journal: it is older than they are, or another one.

        Those that a fresh collection of the run (by default: of any) took for lost are left out.
        """
        with self._database.snapshot() as connection:
            known = journal_.acknowledged(connection, run_id)
            return [
                each
                for each in anchors
                if (each.rows, each.head) not in known and journal_.hash_of(connection, each.rows) != each.head
            ]

    def fresh_collections(self, run_id: str) -> list[dict[str, Any]]:
        """What the journal says of each fresh collection of a run, in order."""
        with self._database.snapshot() as connection:
            return journal_.read_kind(connection, run_id, journal_.SECRET_REPLACED)

    def identity(self) -> str:
        """The hash of the journal's first row, which a backup of the database has, too; empty before there is one."""
        with self._database.snapshot() as connection:
            return journal_.hash_of(connection, 1) or ""

    def uncharged_releases(self, run_id: str, *, of_any_database: bool = False) -> int:
        """How many releases of a run its secrets in this home count that are not charged: the database was restored.

        Secrets of a run of this id in another database count only where that is asked for: it may be this one, which
        was lost.
        """
        releases, _ = last_seen(self.secrets_folder, run_id, None if of_any_database else self.identity())
        return max(0, releases - self.ledger.num_spent(run_id))

    def own_anchors(self) -> list[Anchor]:
        """The anchor that this home keeps, if it has one yet."""
        if not self._anchor_file.exists():
            return []
        fields = json.loads(self._anchor_file.read_text())
        return [Anchor(fields["rows"], fields["head"], f"this home ({self._anchor_file.name})")]

    # --- inside ---

    def _transaction(self) -> AbstractContextManager[Connection]:
        """Every change of the database is made in one of these."""
        return self._database.transaction()

    def _append(self, connection: Connection, run_id: str | None, kind: str, content: dict[str, Any]) -> journal_.Link:
        return journal_.append(connection, self._signing(connection), run_id, kind, content)

    def _signing(self, connection: Connection) -> SigningKey:
        """The hub's key.

        Raises `StoreError` where the journal was begun by a key that this home neither has nor trusts: the home lost
        its own, or joins another hub's database.
        """
        key = self.keys.signing
        if not self._may_sign:
            begun_by = journal_.begun_by(connection)
            if begun_by is not None and begun_by not in self.keys.trusted:
                raise StoreError(
                    f"the journal of this database was begun by the hub key {begun_by}, and this home has the key "
                    f"{key.id} and does not trust that one: nothing is written",
                    hint=f"if {self.home / 'secrets' / 'hub.key'} was lost, restore it from a backup; if another hub "
                    "shares this database, `fedrounds journal trust KEY` here, with what `fedrounds journal key` "
                    "prints there",
                )
            self._may_sign = begun_by is not None
        return key

    def _rows(self, query: Select[*tuple[Any, ...]]) -> list[AnyRow]:
        with self._database.snapshot() as connection:
            return list(connection.execute(query))

    def _latest(self, query: Select[*tuple[Any, ...]]) -> RunRecord | None:
        rows = self._rows(query.order_by(runs.c.updated_at.desc(), runs.c.journal_sequence.desc()).limit(1))
        return RunRecord(*rows[0]) if rows else None


def _refuse_to_wait(waiting: str) -> None:
    """Instead of waiting for a lease to lapse."""
    raise LeaseHeld(waiting, hint="try again when that process has ended")


def check_run_id(run_id: str) -> None:
    """Raises `ConfigError` for what cannot be a run's id, which is also a file's name."""
    if not _RUN_ID.fullmatch(run_id):
        raise ConfigError(
            f"{run_id!r} cannot be a run id",
            hint="use up to 128 letters, digits, dots, dashes and underscores, the first a letter or digit",
        )


def check_sweep_id(sweep_id: str) -> None:
    """Raise `ConfigError` for what cannot be a sweep's id, which its cells' run ids begin with."""
    if not _RUN_ID.fullmatch(f"{sweep_id}-001"):
        raise ConfigError(
            f"{sweep_id!r} cannot be a sweep id",
            hint="use up to 124 letters, digits, dots, dashes and underscores, the first a letter or digit",
        )


def _find_run(connection: Connection, run_id: str) -> RunRecord | None:
    row = connection.execute(select(*_RUN_COLUMNS).where(runs.c.run_id == run_id)).one_or_none()
    return None if row is None else RunRecord(*row)


def _find_sweep(connection: Connection, sweep_id: str) -> SweepRecord | None:
    row = connection.execute(select(*_SWEEP_COLUMNS).where(sweeps.c.sweep_id == sweep_id)).one_or_none()
    return None if row is None else SweepRecord(*row)


def _taken(name: str, owner: str, wanted: str) -> RunConflict:
    return RunConflict(f"{name!r} is the id of a {owner} in this store", hint=f"give the {wanted} another id")


def _conflict(owner: str, what: str, config_before: dict[str, Any], config: dict[str, Any]) -> RunConflict:
    before, after = dict(_leaves(config_before)), dict(_leaves(json.loads(canonical_json(config))))
    missing = object()
    changed = [
        f"{field} ({_shown(before.get(field, missing), missing)}, now {_shown(after.get(field, missing), missing)})"
        for field in sorted(before.keys() | after.keys())
        if before.get(field, missing) != after.get(field, missing)
    ]
    differences = ", ".join(changed) or "its digest, though no field differs: another version of fedrounds made it"
    return RunConflict(
        f"{owner} belongs to another configuration; what differs: {differences}",
        hint=f"give another {what}, or the configuration that it began with",
    )


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, child in value.items():
            yield from _leaves(child, f"{path}.{name}" if path else str(name))
    else:
        yield path, value


def _shown(value: Any, missing: object) -> str:
    return "not set" if value is missing else canonical_json(value)
