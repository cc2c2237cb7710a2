"""The lease: one process at a time works on a run, and one that was superseded changes nothing any more.

The holder renews its heartbeat; whoever takes the lease over raises the fencing number; every transaction of a holder
checks that number first, in the transaction itself (Burrows 2006, "The Chubby lock service", on sequencers). Whether a
lease has lapsed is judged by the database's clock alone.
"""

from __future__ import annotations

import logging
import platform
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import BigInteger, Connection, bindparam, delete, exists, func, insert, literal, select, update

from fedrounds.fl_components.account import Account
from fedrounds.fl_components.errors import FedroundsError, LeaseHeld, LeaseLost, RunNotFound, StoreError
from fedrounds.fl_components.run_state import RunState
from fedrounds.fl_components.store import journal, ledger
from fedrounds.fl_components.store.durable_files import erase
from fedrounds.fl_components.store.records import (
    Charges,
    RoundRecord,
    Sighting,
    can_never_continue,
)
from fedrounds.fl_components.store.schema import (
    AnyRow,
    client_states,
    collections,
    column_digest,
    database_clock,
    leases,
    new_digest_key,
    participations,
    rounds,
    runs,
    seals,
)

if TYPE_CHECKING:
    from fedrounds.fl_components.store.store import Store

_logger = logging.getLogger(__name__)

ROUND_COLUMNS: Final = [rounds.c[name] for name in RoundRecord.__slots__]

_PAGE: Final = 1000

_POLL_S: Final = 0.25  # how often a waiting process looks whether the lease has lapsed


@dataclass(frozen=True, slots=True)
class Holder:
    """A process, named so that no other one is ever taken for it."""

    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    process_started_s: float

    @staticmethod
    def this_process() -> Holder:
        import psutil

        process = psutil.Process()
        return Holder(*_machine(), process.pid, _started_s(process))

    @property
    def is_here(self) -> bool:
        """Whether it runs where this process can see its pid."""
        return (self.host, self.boot_id, self.pid_namespace) == _machine()

    def status(self) -> str:
        """Of a holder that `is_here`: "dead", "stopped" or "alive"."""
        import psutil

        try:
            process = psutil.Process(self.pid)
            if abs(_started_s(process) - self.process_started_s) > 2:  # the pid now belongs to another process
                return "dead"
            status = process.status()
        except psutil.NoSuchProcess:
            return "dead"
        except psutil.AccessDenied:
            return "alive"
        if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return "dead"
        return "stopped" if status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP) else "alive"


@cache
def _machine() -> tuple[str, str, str]:
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        pid_namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:  # not Linux
        import psutil

        boot_id, pid_namespace = str(round(psutil.boot_time())), ""
    return platform.node(), boot_id, pid_namespace


def _started_s(process: Any) -> float:
    import psutil

    return float(process.create_time() - psutil.boot_time())


def acquire(store: Store, run_id: str, say: Callable[[str], None] | None = None) -> Lease:
    """See `Store.acquire`."""
    say = say or _logger.warning
    first_heartbeat: float | None = None
    while True:
        with store._transaction() as connection:
            row = connection.execute(
                select(leases, database_clock().label("now")).where(leases.c.run_id == run_id).with_for_update()
            ).one_or_none()
            if row is None:
                raise RunNotFound(f"there is no run {run_id!r} in this store", hint="`fedrounds runs` lists them")
            holder = _holder(row)
            if holder is None or _may_be_taken(row, holder):
                connection.execute(
                    update(leases)
                    .where(leases.c.run_id == run_id)
                    .values(
                        fence=row.fence + 1,
                        heartbeat_at=database_clock(),
                        lapse_s=store.lapse_s,
                        **asdict(Holder.this_process()),
                    )
                )
                fence: int = row.fence + 1
                break
        silent_s = row.now - row.heartbeat_at
        if first_heartbeat is None:
            first_heartbeat = row.heartbeat_at
            # Half of the lapse without a heartbeat is several beats missed: no longer "fresh".
            if holder.is_here and holder.status() == "alive" and silent_s < row.lapse_s / 2:
                raise _held(run_id, holder)
            say(
                f"run {run_id} is held by process {holder.pid} on host {holder.host}, last heard of "
                f"{max(silent_s, 0):.0f} s ago; waiting {max(row.lapse_s - silent_s, 0):.0f} s for its lease to lapse"
            )
        elif row.heartbeat_at != first_heartbeat:  # it has been heard of meanwhile
            raise _held(run_id, holder)
        time.sleep(min(_POLL_S, max(row.lapse_s - silent_s, 0.001)))
    return Lease(store, run_id, fence)


def is_held(store: Store, run_id: str) -> bool:
    """See `Store.is_held`."""
    rows = store._rows(select(leases, database_clock().label("now")).where(leases.c.run_id == run_id))
    holder = _holder(rows[0]) if rows else None
    return holder is not None and not _may_be_taken(rows[0], holder)


def _holder(row: AnyRow) -> Holder | None:
    if row.pid is None:
        return None
    return Holder(row.host, row.boot_id, row.pid_namespace, row.pid, row.process_started_s)


def _may_be_taken(row: AnyRow, holder: Holder) -> bool:
    lapsed = bool(row.now - row.heartbeat_at >= row.lapse_s)
    return lapsed or (holder.is_here and holder.status() == "dead")


def _held(run_id: str, holder: Holder) -> LeaseHeld:
    return LeaseHeld(
        f"process {holder.pid} on host {holder.host} is working on run {run_id}",
        hint=f"wait for it, or end it there (kill {holder.pid}), then resume the run",
    )


def fresh_collection(run_id: str, instead: str) -> str:
    """Return the hint that names the command which starts a fresh collection; `instead` is what else can be done."""
    return (
        f"{instead}; or `fedrounds resume {run_id} --fresh-collection`, which counts what may have been released as "
        "spent, and collects again with a new secret at a further charge"
    )


def _granted(*_: object) -> None:
    """Refuse no charge."""


def _pay_themselves(paid: Iterable[Account]) -> bool:
    """Return whether clients pay for a round themselves: an update that one of them sends is what is paid for."""
    return any(account.client is not None for account in paid)


class Lease:
    """The right to change one run, held until the `with` block ends. Made by `Store.acquire`.

    Each method is one transaction that checks the fencing number first, raising `LeaseLost` when another process has
    taken the run over, and that appends its journal row. All may be called from several threads, and again with the
    same arguments after a crash.
    """

    def __init__(self, store: Store, run_id: str, fence: int) -> None:
        self.run_id = run_id
        self.fence = fence
        self._store = store
        self._lost = False
        self._writing = threading.RLock()  # between a blob and its row: it must not look like garbage
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, name=f"lease {run_id}", daemon=True)
        self._heart.start()

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Lets the next process have the run at once. What cannot be released lapses by itself."""
        self._ended.set()
        self._heart.join()
        try:
            with self._fenced() as connection:
                connection.execute(
                    update(leases)
                    .where(leases.c.run_id == self.run_id)
                    .values({name: None for name in Holder.__dataclass_fields__})
                )
        except FedroundsError as problem:
            _logger.debug("the lease of run %s was not released: %s", self.run_id, problem)

    @property
    def lost(self) -> bool:
        """Whether this process has learnt that another one has taken the run over."""
        return self._lost

    def begin_attempt(self) -> int:
        """Sets the run running, clears its error and returns the number of this attempt (1 for the first)."""
        with self._fenced() as connection:
            attempt = connection.execute(select(runs.c.attempt).where(runs.c.run_id == self.run_id)).scalar_one() + 1
            row = self._append(connection, "attempt.begun", {"attempt": attempt})
            self._update_run(connection, state=RunState.RUNNING, attempt=attempt, error=None, updated_at=row.at)
        return int(attempt)

    def reserve(self, round: int, charges: Sequence[Charges] = (), training: str | None = None) -> int:
        """Write down what a round will cost, before anything that it pays for happens.

        Returns the number of the collection, 1 for the round's first.

        The charges are counted against the budgets of their accounts, where their guards allow it; `paying` returns the
        accounts that pay. An error (`BudgetExhausted` where too few can pay) leaves nothing written. An open
        reservation of the round is returned, not made again.

        Args:
          charges: what the round costs under each claim; nothing without one.
          training: the digest of what determines the clients' updates besides their rows and keys, where clients pay.

        Raises:
          BudgetExhausted: too few accounts can pay.
          BudgetNotSet: an account has no budget.
          StoreError: the open reservation is for other events, since either could be the larger; or its clients may
            have sent updates that differ from those that they would send now.
        """
        with self._fenced() as connection:
            self._check_next(self._run(connection), round)
            reserved = ledger.open_collection(connection, self.run_id, round)
            if reserved is None:
                paid = ledger.charge(connection, self.run_id, charges)
                return self._enter(connection, round, paid, training)
            where = f"round {round} of run {self.run_id}"
            paid = ledger.paid_by(connection, reserved)
            ledger.check_same(paid, charges, where)
            row = journal.contents(connection, [reserved.journal_sequence])[reserved.journal_sequence]
            if _pay_themselves(paid) and row.get("training") != training:
                raise StoreError(
                    f"{where} is reserved, clients may have sent their updates, and updates computed now would differ: "
                    "the model's code, the releases of fedrounds, torch or numpy, or the processor are not those of "
                    "the attempt that reserved it",
                    hint=fresh_collection(self.run_id, "resume it as it was"),
                )
            return int(reserved.collection)

    def _enter(
        self, connection: Connection, round: int, paid: Mapping[Account, Mapping[str, Any]], training: str | None
    ) -> int:
        """Write down a reservation whose events are counted already, and return its collection."""
        mine = (collections.c.run_id == self.run_id, collections.c.round == round)
        collection = connection.execute(select(func.count()).select_from(collections).where(*mine)).scalar_one() + 1
        content = {"round": round, "collection": collection, "charges": ledger.as_groups(paid)}
        of_clients = {"training": training} if _pay_themselves(paid) else {}
        row = self._append(connection, "charge.reserved", content | of_clients)
        ledger.enter(connection, self.run_id, round, collection, row, paid)
        return int(collection)

    def start_afresh(
        self,
        *,
        secret_id: str,
        secret_home: str,
        reason: str,
        charges: Sequence[Charges] = (),
        lost: int = 0,
        released: int = 0,
        sightings: Sequence[Sighting] = (),
    ) -> int:
        """Settles whatever may have been released of the round in hand as spent, and gives the run a new secret.

        The next reservation is then another collection, at a charge of its own, which draws from other keys.

        Args:
          charges: what a round costs under each claim.
          lost: of how many rounds something may have been released whose charges the journal lacks, the round in hand
            included. They are written down again, whatever the budgets say: they are spent.
          released: the last of these rounds.
          sightings: what was seen of the run outside the database; their anchors count as lost from now on.

        Returns how many charges were settled.
        """
        with self._writing, self._fenced() as connection:
            run = self._run(connection)
            round = run.committed_round + 1
            reserved = ledger.open_collection(connection, self.run_id, round)
            lost = max(0, lost - (reserved is not None))
            unlimited = [replace(each, guard=_granted, least=0) for each in charges]
            # All charges come before the journal's head is locked.
            lost_charges = [ledger.charge(connection, self.run_id, unlimited) for _ in range(lost)]
            if reserved is not None:
                self._spend(connection, round)
            for paid in lost_charges:
                self._enter(connection, round, paid, None)
                self._spend(connection, round)
            seal = self._seal_key(connection, round)
            connection.execute(delete(seals).where(seals.c.run_id == self.run_id, seals.c.round == round))
            content = {
                "round": round,
                "secret_id": secret_id,
                "secret_home": secret_home,
                "was": run.secret_id,
                "reason": reason,
                "released": released,
                "anchors": [[each.anchor.rows, each.anchor.head] for each in sightings if each.anchor is not None],
            }
            row = self._append(connection, journal.SECRET_REPLACED, content)
            self._update_run(connection, secret_id=secret_id, secret_home=secret_home, updated_at=row.at)
        if seal is not None:
            self._store._blobs.delete([seal])
        return int(lost + (reserved is not None))

    def _spend(self, connection: Connection, round: int) -> None:
        """Settle what is reserved for a round as spent, though the round is not committed."""
        reserved = self._check_reserved(connection, round)
        row = self._append(connection, "charge.spent", {"round": round, "collection": reserved.collection})
        ledger.settle(connection, reserved, "spent", row.at)

    def accept_data(self, facts: Mapping[str, Any]) -> None:
        """Let the run continue with other rows than it began with; `facts` describe these in its `engine`."""
        with self._fenced() as connection:
            run = self._run(connection)
            engine = run.engine | facts
            content = {
                "round": run.committed_round + 1,
                "data_digest": facts["data_digest"],
                "digests": {"engine": column_digest(run.digest_key, "engine", engine)},
            }
            row = self._append(connection, "data.accepted", content)
            self._update_run(connection, engine=engine, updated_at=row.at)

    def paying(self, round: int) -> set[Account]:
        """Return the accounts that pay for the round as it is reserved."""
        with self._fenced() as connection:
            return set(ledger.paid_by(connection, self._check_reserved(connection, round)))

    def void(self, reason: str, *, by: str) -> int | None:
        """Take what is reserved for the round in hand off the budgets again: an act of an administrator, journalled
        with its reason. Returns the round; None when nothing is reserved.

        Raises `StoreError` where something may have come of the reservation: the round is sealed, so that noise may
        have been drawn; the run has failed in it, which is seen; or clients pay for it themselves, and some may have
        sent an update. A later attempt reserves afresh.
        """
        released = self._was_released()
        with self._fenced() as connection:
            round = self._run(connection).committed_round + 1
            reserved = ledger.open_collection(connection, self.run_id, round)
            if reserved is None:
                return None
            paid, why = ledger.paid_by(connection, reserved), None
            if released is not None:
                why = f"may have been released: {released}"
            elif self._seal_key(connection, round) is not None:
                why = "is sealed: something of it may be known"
            elif ledger.failed_since(connection, reserved):
                why = "has failed: something of it may be known"
            elif _pay_themselves(paid):
                why = "is paid for by clients themselves: some may have sent an update"
            if why is not None:
                raise StoreError(
                    f"round {round} of run {self.run_id} {why}, so its charge stays",
                    hint=f"`fedrounds resume {self.run_id}` makes use of what is paid for",
                )
            if paid:
                ledger.give_back(connection, self.run_id, paid)
            content = {"round": round, "collection": reserved.collection, "reason": reason, "by": by}
            row = self._append(connection, "charge.voided", content)
            ledger.settle(connection, reserved, "voided", row.at)
        return int(round)

    def _was_released(self) -> str | None:
        """Why the round in hand may have been released although the database shows nothing of it."""
        store, run = self._store, self._store.run(self.run_id)
        if run.secret_id is None:
            return None
        if not store.secret_file(run).exists():
            return f"the run's secret, which counts its releases, is not in this home but in {run.secret_home}"
        if store.uncharged_releases(self.run_id) or store.lost(store.own_anchors(), self.run_id):
            return "the database is older than what this home has seen of the run"
        return None

    def write_client_state(self, data: bytes) -> str:
        """Make what a client keeps for its next round durable.

        Returns the key of the blob, which is garbage unless the round is sealed with it.
        """
        with self._writing:
            return self._write_blob(data)

    def seal(
        self, round: int, collection: int, data: bytes, client_state_keys: Mapping[str, str] | None = None
    ) -> None:
        """Make what the round admitted durable. A round that is sealed already keeps its first seal.

        Args:
          client_state_keys: the keys of what clients keep for their next round, by client. They count once the round is
            committed.
        """
        with self._writing:
            with self._fenced() as connection:
                if self._seal_key(connection, round) is not None:
                    return
                self._check_next(self._run(connection), round)
                self._check_reserved(connection, round, collection)
            key = self._write_blob(data)
            with self._fenced() as connection:
                if self._seal_key(connection, round) is not None:
                    return
                if client_state_keys:
                    connection.execute(
                        insert(client_states),
                        [
                            {"run_id": self.run_id, "client": client, "round": round, "blob_key": blob_key}
                            for client, blob_key in client_state_keys.items()
                        ],
                    )
                # No plain digest of `data` here: it is private, and a hash would confirm a guess.
                digests = {"blob_key": column_digest(self._run(connection).digest_key, "blob_key", key)}
                content = {"round": round, "collection": collection, "digests": digests}
                self._append(connection, "round.sealed", content)
                connection.execute(
                    insert(seals).values(run_id=self.run_id, round=round, collection=collection, blob_key=key)
                )

    def commit(
        self,
        round: int,
        *,
        state: bytes,
        params_digest: str,
        result: dict[str, Any],
        withheld: Mapping[str, Any] | None = None,
        participants: Sequence[int] = (),
    ) -> RoundRecord:
        """Ends a round: its state, its result, the run's pointer and the spent charge become visible at once.

        `withheld` is what a privacy claim keeps from all views: for those who may read the store.
        `participants` are the distinct clients (rows of the table of clients) whose participation is to be counted.

        A round that is committed already is returned as it is; `StoreError` if it came to other parameters. The last
        two states and the initial one are kept, older ones are pruned.
        """
        with self._writing:
            with self._fenced() as connection:
                committed = self._committed(connection, round, params_digest)
                if committed is not None:
                    return committed
                self._check_next(self._run(connection), round)
                self._check_reserved(connection, round)
            key = self._write_blob(state)
            with self._fenced() as connection:
                committed = self._committed(connection, round, params_digest)
                if committed is not None:
                    return committed
                reserved = self._check_reserved(connection, round)
                run = self._run(connection)
                self._count(connection, round, participants)  # before the journal's head is locked against all runs
                superseded = self._supersede_client_states(connection, round)
                digested = {"state_key": key, "result": result, "withheld": dict(withheld or {})}
                digest_key = new_digest_key()
                digests = {column: column_digest(digest_key, column, value) for column, value in digested.items()}
                content = {"round": round, "collection": reserved.collection, "params_digest": params_digest}
                row = self._append(connection, "round.committed", {**content, "digests": digests})
                values = {"run_id": self.run_id, "committed_at": row.at, **content, **digested}
                record = RoundRecord(**values)
                connection.execute(insert(rounds).values(digest_key=digest_key, **values))
                ledger.settle(connection, reserved, "spent", row.at)
                self._update_run(connection, committed_round=round, params_digest=params_digest, updated_at=row.at)
                unused = {self._seal_key(connection, round), self._state_key(connection, round - 2)}
                unused -= {key, self._state_key(connection, round - 1), run.initial_state_key, None}
                unused |= superseded
                connection.execute(delete(seals).where(seals.c.run_id == self.run_id, seals.c.round == round))
                connection.execute(
                    update(rounds)
                    .where(rounds.c.run_id == self.run_id, rounds.c.round == round - 2)
                    .values(state_key=None)
                )
            try:
                self._store._blobs.delete(key for key in unused if key)
            except StoreError as problem:  # the round is committed all the same
                _logger.warning("%s; `collect_garbage` will try again", problem)
        return record

    def finish(self, state: RunState, error: dict[str, Any] | None = None) -> None:
        """Set the run's final state and its error ({"code", "message", "hint"}).

        A run that can never continue loses its seal and its secret: nothing un-noised outlives its round.
        """
        if not state.is_final:
            raise ValueError(f"{state} is not a final state")
        with self._fenced() as connection:
            run = self._run(connection)
            if (run.state, run.error) != (state, error):
                content = {
                    "state": state,
                    "error": error and error.get("code"),
                    "committed_round": run.committed_round,
                    "digests": {"error": column_digest(run.digest_key, "error", error)},
                }
                row = self._append(connection, "run.finished", content)
                self._update_run(connection, state=state, error=error, updated_at=row.at)
        if can_never_continue(state, error):
            try:
                self.erase()
            except StoreError as problem:  # the end is written down all the same
                _logger.warning("%s; it is erased when the store is opened next", problem.message)

    def delete(self, *, by: str) -> None:
        """Delete the run: its rounds, its blobs, its secret and what it withheld.

        The row stays, in the state `DELETED`, with the configuration and what the run has spent; so do its charges, and
        the journal. A second call finishes what the first one was kept from finishing.
        """
        with self._writing:
            with self._fenced() as connection:
                run = self._run(connection)
                if run.state != RunState.DELETED:
                    for table in (rounds, seals, participations, client_states):
                        connection.execute(delete(table).where(table.c.run_id == self.run_id))
                    content = {"by": by, "state": run.state, "committed_round": run.committed_round}
                    row = self._append(connection, "run.deleted", content)
                    self._update_run(
                        connection,
                        state=RunState.DELETED,
                        error=None,
                        updated_at=row.at,
                        mlflow_run_id=None,
                        model_uri=None,
                        tracked_round=0,
                        prefect_flow_runs=[],
                    )
            self.erase()

    def erase(self) -> None:
        """Erase what may not outlive a run that is deleted, or that can never continue: its secret and its seals; of
        one that is deleted all its blobs and what it withheld, too. Of any other run nothing. It may be called again
        after a crash: the rows that say what there is to erase are changed last.
        """
        store = self._store
        with self._writing:
            with self._fenced() as connection:
                run = self._run(connection)
                query = select(seals.c.round, seals.c.collection, seals.c.blob_key)
                sealed = connection.execute(query.where(seals.c.run_id == self.run_id)).all()
            if run.state == RunState.DELETED:
                store.destroy_secrets(self.run_id)
                erase(store.home / "withheld" / f"{self.run_id}.log")
                store._blobs.erase_run(self.run_id)
                with self._fenced() as connection:
                    self._update_run(connection, initial_state_key="")
            elif can_never_continue(run.state, run.error):
                store.destroy_secrets(self.run_id)
                store._blobs.erase(row.blob_key for row in sealed)
                with self._fenced() as connection:
                    for row in sealed:
                        self._append(connection, "seal.erased", {"round": row.round, "collection": row.collection})
                    connection.execute(delete(seals).where(seals.c.run_id == self.run_id))
                self.collect_garbage()

    def note(
        self,
        *,
        mlflow_run_id: str | None = None,
        tracked_round: int | None = None,
        model_uri: str | None = None,
        prefect_flow_run: dict[str, Any] | None = None,
    ) -> None:
        """Remembers how far a view has followed the run; what is None stays as it is. Not journalled."""
        given = {"mlflow_run_id": mlflow_run_id, "tracked_round": tracked_round, "model_uri": model_uri}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        with self._fenced() as connection:
            if prefect_flow_run is not None:
                known = self._run(connection).prefect_flow_runs
                if prefect_flow_run not in known:
                    changes["prefect_flow_runs"] = [*known, prefect_flow_run]
            if changes:
                self._update_run(connection, **changes)

    def collect_garbage(self) -> int:
        """Delete the run's blobs that no row refers to, and return how many.

        Kept are the initial state, the last two committed states, an open seal, the newest states of clients, and
        whatever a later holder has written.
        """
        with self._writing:
            with self._fenced() as connection:
                run = self._run(connection)
                last_states = select(rounds.c.state_key).where(
                    rounds.c.run_id == self.run_id, rounds.c.round > run.committed_round - 2
                )
                open_seals = select(seals.c.blob_key).where(seals.c.run_id == self.run_id)
                of_clients = select(client_states.c.blob_key).where(client_states.c.run_id == self.run_id)
                used = {run.initial_state_key}
                for query in (last_states, open_seals, of_clients):
                    used |= {*connection.scalars(query)}
            blobs = self._store._blobs
            return blobs.delete(key for key in blobs.keys(self.run_id, self.fence) if key not in used)

    def _write_blob(self, data: bytes) -> str:
        try:
            return self._store._blobs.write(self.run_id, self.fence, data)
        except StoreError:
            self.note()  # the fence first: a successor may have collected the half-written blob as garbage
            raise

    # --- the transaction and what it looks at ---

    @contextmanager
    def _fenced(self) -> Iterator[Connection]:
        """A transaction of the holder. The lease's row is its first lock (`database` has the order)."""
        with self._store._transaction() as connection:
            row = self._lock(connection)
            if row.fence != self.fence:
                self._lost = True
                raise LeaseLost(
                    f"another process has taken run {self.run_id} over; this one has changed nothing since",
                    hint="let the other one finish, or resume the run when it has ended",
                )
            if row.pid is None:
                raise LeaseLost(f"the lease of run {self.run_id} has been released", hint="acquire it again")
            yield connection

    def _lock(self, connection: Connection) -> AnyRow:
        query = select(leases.c.fence, leases.c.pid).where(leases.c.run_id == self.run_id)
        return connection.execute(query.with_for_update()).one()

    def _beat(self) -> None:
        while not self._ended.wait(self._store.heartbeat_s):
            try:
                with self._fenced() as connection:
                    connection.execute(
                        update(leases).where(leases.c.run_id == self.run_id).values(heartbeat_at=database_clock())
                    )
            except LeaseLost:
                return
            except Exception as problem:  # it may pass; if not, the next transaction of the run's work says so
                _logger.warning("the heartbeat of run %s failed: %s", self.run_id, problem)

    def _append(self, connection: Connection, kind: str, content: dict[str, Any]) -> journal.Link:
        return self._store._append(connection, self.run_id, kind, {"fence": self.fence, **content})

    def _run(self, connection: Connection) -> AnyRow:
        return connection.execute(select(runs).where(runs.c.run_id == self.run_id)).one()

    def _update_run(self, connection: Connection, **values: Any) -> None:
        connection.execute(update(runs).where(runs.c.run_id == self.run_id).values(**values))

    def _count(self, connection: Connection, round: int, clients: Sequence[int]) -> None:
        """One participation more for each of these distinct clients; those that have a row first, then the new ones."""
        if not clients:
            return
        known = participations.c.run_id == self.run_id
        connection.execute(
            update(participations)
            .where(known, participations.c.client == bindparam("row"))
            .values(rounds=participations.c.rounds + 1, last_round=round),
            [{"row": client} for client in clients],
        )
        connection.execute(
            insert(participations).from_select(
                ["run_id", "client", "rounds", "last_round"],
                select(literal(self.run_id), bindparam("row", type_=BigInteger), literal(1), literal(round)).where(
                    ~exists().where(known, participations.c.client == bindparam("row", type_=BigInteger))
                ),
            ),
            [{"row": client} for client in clients],
        )

    def _supersede_client_states(self, connection: Connection, round: int) -> set[str]:
        """Delete the rows of client states that the round has replaced. Returns the keys that no row has any more."""
        table, newer = client_states, client_states.alias()
        of_run = table.c.run_id == self.run_id
        is_newer = (newer.c.run_id == self.run_id) & (newer.c.client == table.c.client) & (newer.c.round == round)
        replaced = of_run & (table.c.round < round) & exists().where(is_newer)
        keys = {*connection.scalars(select(table.c.blob_key).where(replaced))}
        if not keys:
            return keys
        connection.execute(delete(table).where(replaced))
        in_order = sorted(keys)
        for start in range(0, len(in_order), _PAGE):  # clients that keep the same share a blob
            page = in_order[start : start + _PAGE]
            keys -= {*connection.scalars(select(table.c.blob_key).where(of_run, table.c.blob_key.in_(page)))}
        return keys

    def _check_next(self, run: AnyRow, round: int) -> None:
        if round != run.committed_round + 1:
            raise StoreError(
                f"round {round} of run {self.run_id} cannot be worked on: the last committed one is "
                f"{run.committed_round}",
                hint=f"go on with round {run.committed_round + 1}",
            )

    def _check_reserved(self, connection: Connection, round: int, collection: int | None = None) -> AnyRow:
        reserved = ledger.open_collection(connection, self.run_id, round)
        if reserved is None or collection not in (None, reserved.collection):
            which = "" if collection is None else f" for collection {collection}"
            raise StoreError(
                f"nothing is reserved{which} of round {round} of run {self.run_id}", hint="reserve the charge first"
            )
        return reserved

    def _committed(self, connection: Connection, round: int, params_digest: str) -> RoundRecord | None:
        row = connection.execute(
            select(*ROUND_COLUMNS).where(rounds.c.run_id == self.run_id, rounds.c.round == round)
        ).one_or_none()
        if row is not None and row.params_digest != params_digest:
            raise StoreError(
                f"round {round} of run {self.run_id} is already committed with other parameters "
                f"({row.params_digest[:12]}, now {params_digest[:12]})",
                hint="resume the run: it goes on from the committed round",
            )
        return None if row is None else RoundRecord(*row)

    def _seal_key(self, connection: Connection, round: int) -> str | None:
        return connection.execute(
            select(seals.c.blob_key).where(seals.c.run_id == self.run_id, seals.c.round == round)
        ).scalar()

    def _state_key(self, connection: Connection, round: int) -> str | None:
        return connection.execute(
            select(rounds.c.state_key).where(rounds.c.run_id == self.run_id, rounds.c.round == round)
        ).scalar()
