"""Trainings in processes that a signal stops at a chosen write of the store.

`python processes.py kills|double-kills|stops FOLDER` imports everything once and then forks: a child is a fresh process
without the seconds that imports take. The parent never opens a store, starts no thread and does nothing with torch, so
that a fork copies nothing that is under way. It prints one JSON object for each case, a few cases at a time.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# What a store, the data and torch import when they are first used is imported here, once for all children.
import fsspec.implementations.local
import psutil  # noqa: F401
import psycopg
import sklearn.model_selection  # noqa: F401
import sqlalchemy.dialects.postgresql.psycopg
import sqlalchemy.dialects.sqlite  # noqa: F401
import torch.fx.experimental.symbolic_shapes  # noqa: F401  # at the first gradient, with all of sympy
from sqlalchemy import select

from fedrounds.fl_components.config import load_config
from fedrounds.fl_components.errors import FedroundsError
from fedrounds.fl_components.privacy import CentralPrivacy, neighbouring_of
from fedrounds.fl_components.privacy.accountants import renyi_divergences
from fedrounds.fl_components.privacy.example_level import NEIGHBOURING
from fedrounds.fl_components.run_state import RunState
from fedrounds.fl_components.server import stages
from fedrounds.fl_components.server.opening import open_run
from fedrounds.fl_components.store import Store, blobs, durable_files
from fedrounds.fl_components.store.schema import client_states
from fedrounds.fl_components.store.secrets import entropy
from fedrounds.flows.round import walk

CONFIG = load_config(Path(__file__).with_name(os.environ.get("FAULTS_CONFIG", "federation.yaml")))
RUN_ID = "run"
SECRET = b"5e" * 16  # of the run under a claim: a training draws one, and no two were the same
FRESH_SECRET = b"f5" * 16  # of a fresh collection
LEASE_LOST, OTHER_ERROR = 3, 4  # exit statuses


class Place:
    """Where a store is: a home folder, and a PostgreSQL database or the SQLite file in that folder."""

    def __init__(
        self, home: Path, database_url: str | None, heartbeat_s: float, lapse_s: float, blobs_url: str | None = None
    ) -> None:
        self.home, self.database_url, self.blobs_url = home, database_url, blobs_url
        self.beat = heartbeat_s, lapse_s

    def copy(self, home: Path) -> Place:
        """What is in it now, in another home."""
        shutil.copytree(self.home, home)
        return Place(home, self.database_url, *self.beat)

    def rounds_of_secrets(self) -> list[int]:
        """Of the run's secret: none where nothing is claimed."""
        files = (self.home / "secrets" / "runs").glob(f"{RUN_ID}@*")
        return [json.loads(file.read_text())["round"] for file in files]

    def open(self) -> Store:
        heartbeat_s, lapse_s = self.beat
        return Store.open(
            self.home,
            database_url=self.database_url,
            blobs_url=self.blobs_url,
            heartbeat_s=heartbeat_s,
            lapse_s=lapse_s,
        )


class Places:
    """Copies of one empty store, made and removed by whichever process wants one."""

    def __init__(self, folder: Path, server_url: str | None, heartbeat_s: float, lapse_s: float) -> None:
        self._folder, self._server_url, self._beat = folder, server_url, (heartbeat_s, lapse_s)
        self._template = f"faults_{os.getpid()}"
        if server_url is not None:
            self._sql(f"CREATE DATABASE {self._template}")
        place = self._place(self._template)
        assert in_child(lambda: place.open().close()) == 0

    @contextmanager
    def new(self) -> Iterator[Place]:
        name = f"{self._template}_{os.getpid()}"
        shutil.copytree(self._folder / self._template, self._folder / name)
        if self._server_url is not None:
            self._sql(f"CREATE DATABASE {name} TEMPLATE {self._template}")
        yield self._place(name)
        shutil.rmtree(self._folder / name)
        if self._server_url is not None:
            self._sql(f"DROP DATABASE {name} WITH (FORCE)")

    def _place(self, name: str) -> Place:
        url = None if self._server_url is None else f"{self._server_url.rpartition('/')[0]}/{name}"
        return Place(self._folder / name, url, *self._beat)

    def _sql(self, statement: str) -> None:
        assert self._server_url is not None
        with psycopg.connect(self._server_url, autocommit=True) as connection:
            connection.execute(statement)


# --- in a child ---


def train(place: Place, *, fresh_collection: bool = False, until: int = CONFIG.rounds) -> None:
    """The whole training, or what an earlier process left of it; or no more than some rounds."""
    secret = FRESH_SECRET if fresh_collection else SECRET
    entropy.token_bytes = lambda _: secret  # type: ignore[assignment,misc]  # in this process alone
    options = {"config": CONFIG, "fresh_collection": fresh_collection}
    with place.open() as store, open_run(store, RUN_ID, **options) as run:  # type: ignore[arg-type]
        run.lease.begin_attempt()
        for round in range(run.refresh().committed_round + 1, until + 1):
            walk(stages, run, round)
        if until == CONFIG.rounds:
            run.lease.finish(RunState.COMPLETED)


def outcome(place: Place) -> dict[str, Any]:
    """All that a training leaves in its store, but for clock times and the number of attempts."""
    with place.open() as store:
        store.verify_journal()
        run, rounds, journal = store.run(RUN_ID), store.rounds(RUN_ID), list(store.journal(RUN_ID))
        used = {run.initial_state_key, *(each.state_key for each in rounds if each.state_key)}
        kept = store._rows(select(client_states.c.client, client_states.c.blob_key, client_states.c.round))
        used |= {row.blob_key for row in kept}
        return {
            "state": [run.state, run.error, run.committed_round, run.params_digest],
            "checkpoint": hashlib.sha256(store.state_blob(RUN_ID)).hexdigest(),
            "client states": sorted(
                [row.client, row.round, hashlib.sha256(store.read_blob(row.blob_key)).hexdigest()] for row in kept
            ),
            "rounds": [
                [each.round, each.collection, each.params_digest, without_times(each.result["metrics"])]
                for each in rounds
            ],
            "charges": [[each.round, each.collection, each.state] for each in store.ledger.collections(run_id=RUN_ID)],
            "spent": {str(account): dict(spent) for account, spent in store.ledger.spent(RUN_ID).items()},
            "spent in all": {str(account): dict(each.spent) for account, each in store.ledger.budgets().items()},
            "rounds of secrets": place.rounds_of_secrets(),
            "seals": [each.round for each in rounds if store.sealed(RUN_ID, each.round)],
            "journal": {
                kind: [row.content.get("round") for row in journal if row.kind == kind]
                for kind in ("run.created", "charge.reserved", "round.sealed", "round.committed")
            },
            "states kept": sum(each.state_key is not None for each in rounds),
            "blobs nobody needs": len(blob_files(place) - used),
            "blobs missing": sorted(used - blob_files(place)),
        }


def without_times(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith(("time/", "memory/"))}


def blob_files(place: Place) -> set[str]:
    folder = Path(place.blobs_url or place.home / "blobs")
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


class Instants:
    """Counts the instants around the writes of this process's store, and sends it a signal at one of them.

    Of a transaction: just before its commit, and after. Of a blob: before its temporary file, when half of it is
    written, when all is, after each fsync, after the rename. Of a deletion: after it. Heartbeats, which come when they
    come, are not counted, and none is in the middle of its transaction when the signal is sent.
    """

    def __init__(self, number: int | None, signal_number: int = signal.SIGKILL) -> None:
        self.names: list[str] = []
        self._number, self._signal = number, signal_number
        self._transacting = threading.RLock()

    def reach(self, what: str) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self.names.append(f"{_method()}: {what}")
        if len(self.names) == self._number:
            with self._transacting:
                os.kill(os.getpid(), self._signal)

    def watch(self) -> None:
        """Wraps every function that writes, for the rest of this process's life."""
        transaction = Store._transaction

        @contextmanager
        def watched_transaction(store: Store) -> Iterator[Any]:
            with self._transacting, transaction(store) as connection:
                yield connection
                self.reach("before the commit")
            self.reach("after the commit")

        def then(function: Callable[..., Any], what: str) -> Callable[..., Any]:
            def watched(*arguments: Any, **options: Any) -> Any:
                result = function(*arguments, **options)
                self.reach(what)
                return result

            return watched

        write_durably = durable_files.write_durably

        def watched_write(path: Path, data: bytes, **options: Any) -> None:
            self.reach("before the blob")
            write_durably(path, data, **options)

        instants = self

        class WatchedFile:
            def __init__(self, *arguments: Any, **options: Any) -> None:
                self._file = open(*arguments, **options)  # noqa: SIM115

            def __enter__(self) -> WatchedFile:
                return self

            def __exit__(self, *_: object) -> None:
                self._file.close()

            def __getattr__(self, name: str) -> Any:
                return getattr(self._file, name)

            def write(self, data: bytes) -> int:
                self._file.write(data[: len(data) // 2])
                self._file.flush()
                instants.reach("half of the temporary file")
                self._file.write(data[len(data) // 2 :])
                self._file.flush()
                instants.reach("the temporary file")
                return len(data)

        files: Any = durable_files
        files.open = WatchedFile
        blobs.write_durably = watched_write  # type: ignore[assignment]
        Store._transaction = watched_transaction  # type: ignore[method-assign, assignment]
        os.fsync = then(os.fsync, "after an fsync")
        os.replace = then(os.replace, "after the rename")
        local: Any = fsspec.implementations.local.LocalFileSystem
        local.rm_file = then(local.rm_file, "after a deletion")


def _method() -> str:
    """The method of the lease or the store that is at work."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        name = frame.f_code.co_name
        if frame.f_code.co_filename.endswith(("store/lease.py", "store/store.py")) and not name.startswith("_"):
            return name
        frame = frame.f_back
    return "?"


# --- in the parent, and in the process of a case ---


def in_child(work: Callable[[], object]) -> int:
    """Does `work` in a forked process, and returns how that ended: its exit status, or minus the signal."""
    return ended(fork(work))


def fork(work: Callable[[], object]) -> int:
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be forked safely"
    pid = os.fork()
    if pid != 0:
        return pid
    status = OTHER_ERROR
    try:
        work()
        status = 0
    except FedroundsError as error:
        status = LEASE_LOST if error.code == "lease_lost" else OTHER_ERROR
        print(f"{error.code}: {error}", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_child_with_answer(place: Place, work: Callable[[], Any]) -> Any:
    """What `work` returned in a child, or the child's exit status."""
    file = place.home / "answer.json"
    file.unlink(missing_ok=True)
    status = in_child(lambda: file.write_text(json.dumps(work())))
    return json.loads(file.read_text()) if status == 0 else f"exit status {status}"


def train_and_tell(place: Place) -> Any:
    def work() -> dict[str, Any]:
        train(place)
        return outcome(place)

    return in_child_with_answer(place, work)


def train_with_signal(place: Place, number: int | None, signal_number: int = signal.SIGKILL) -> list[str]:
    """Trains until the signal, or to the end; returns the names of the instants that were reached."""
    instants = Instants(number, signal_number)
    instants.watch()
    train(place)
    return instants.names


Case = Callable[[Place], dict[str, Any]]


def undisturbed(place: Place) -> dict[str, Any]:
    return {"outcome": train_and_tell(place)}


def killed_at(*numbers: int) -> Case:
    """SIGKILL at that instant, at the second number's while it is resumed, and so on; then no fault."""

    def case(place: Place) -> dict[str, Any]:
        ends = [in_child(lambda number=number: train_with_signal(place, number)) for number in numbers]
        return {"ends": ends, "outcome": train_and_tell(place)}

    return case


Mishap = Callable[[Place, Place], tuple[Place, Callable[[], object]]]
"""What happens to a place, of which there is a backup after round 1, while nothing runs: where the training is resumed,
and what its process does first."""


def lost_secret(place: Place, _: Place) -> tuple[Place, Callable[[], object]]:
    for file in (place.home / "secrets" / "runs").iterdir():
        file.unlink()
    return place, lambda: None


def restored_database(place: Place, backup: Place) -> tuple[Place, Callable[[], object]]:
    """The database and its blobs, while the secrets stay where they are."""
    for file in place.home.glob("fedrounds.db*"):
        file.unlink()
    for file in backup.home.glob("fedrounds.db*"):
        shutil.copy(file, place.home)
    shutil.copytree(backup.home / "blobs", place.home / "blobs", dirs_exist_ok=True)
    return place, lambda: None


def edited_row(place: Place, _: Place) -> tuple[Place, Callable[[], object]]:
    """One label of one client."""

    def edit() -> None:
        data = CONFIG.data.load(CONFIG.seed)
        y_train = data.y_train.copy()
        y_train[5] = (y_train[5] + 1) % data.num_classes
        other = dataclasses.replace(data, y_train=y_train)
        type(CONFIG.data).load = lambda *_: other  # type: ignore[method-assign, assignment]

    return place, edit


def second_hub(place: Place, _: Place) -> tuple[Place, Callable[[], object]]:
    """Another home on the same database, which has all keys of the first but the run's secret."""
    other = place.home / "other"
    other.mkdir(mode=0o700)
    shutil.copytree(place.home / "secrets", other / "secrets", ignore=shutil.ignore_patterns("runs"))
    url = place.database_url or f"sqlite:///{place.home}/fedrounds.db"
    return Place(other, url, *place.beat, blobs_url=str(place.home / "blobs")), lambda: None


MISHAPS: dict[str, Mishap] = {each.__name__: each for each in (lost_secret, restored_database, edited_row, second_hub)}


def mishap_after(number: int, mishap: Mishap) -> Case:
    """SIGKILL at that instant, then the mishap; a resume, one with a fresh collection, and the outcome of both."""

    def case(place: Place) -> dict[str, Any]:
        assert in_child(lambda: train(place, until=1)) == 0
        backup = place.copy(place.home.with_name(place.home.name + "-backup"))
        end = in_child(lambda: train_with_signal(place, number))
        where, first = mishap(place, backup)

        def resume(*, fresh_collection: bool) -> Any:
            def work() -> Any:
                first()
                try:
                    train(where, fresh_collection=fresh_collection)
                except FedroundsError as error:
                    return {"refused": error.message, "hint": error.hint}
                return outcome(where)

            return in_child_with_answer(where, work)

        return {"end": end, "resumed": resume(fresh_collection=False), "afresh": resume(fresh_collection=True)}

    return case


def stopped_at(number: int) -> Case:
    """SIGSTOP at that instant; another process finishes the training; SIGCONT."""

    def case(place: Place) -> dict[str, Any]:
        stopped = fork(lambda: train_with_signal(place, number, signal.SIGSTOP))
        assert os.WIFSTOPPED(os.waitpid(stopped, os.WUNTRACED)[1])
        finished = train_and_tell(place)
        os.kill(stopped, signal.SIGCONT)
        return {
            "end": ended(stopped),
            "outcome": finished,
            "later": in_child_with_answer(place, lambda: outcome(place)),
        }

    return case


def run(places: Places, cases: Iterable[tuple[str, Case]], at_once: int) -> bool:
    """Each case in a process of its own, `at_once` of them at a time. Whether all could be told."""

    def tell(name: str, case: Case) -> None:
        with places.new() as place:
            line = json.dumps({"case": name, **case(place)}) + "\n"
        os.write(1, line.encode())  # in one piece, also where several processes write

    under_way, good = set[int](), True
    for name, case in cases:
        if len(under_way) == at_once:
            pid, status = os.wait()
            under_way.remove(pid)
            good &= status == 0
        under_way.add(fork(lambda name=name, case=case: tell(name, case)))
    return all([ended(pid) == 0 for pid in under_way]) and good


STOPS = (
    "reserve: after the commit",
    "seal: before the blob",
    "seal: half of the temporary file",
    "seal: after the rename",
    "seal: after the commit",
    "commit: before the blob",
    "commit: after the rename",
    "commit: after the commit",
)  # where the database is not locked: behind a process stopped inside a transaction of SQLite everybody waits


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=["kills", "double-kills", "stops", "mishaps"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--each-kind", action="store_true", help="kill once at each name of an instant, the last time")
    parser.add_argument("--postgres-url")
    options = parser.parse_args()
    data = CONFIG.data.load(CONFIG.seed)
    type(CONFIG.data).load = lambda *_: data  # type: ignore[method-assign, assignment]  # the same for all: read once
    if isinstance(CONFIG.privacy, CentralPrivacy):  # what an event costs is computed once
        sampling = CONFIG.sampling(data.num_clients)
        renyi_divergences(CONFIG.privacy.event(sampling), neighbouring_of(sampling))
    if (rule := CONFIG.training.example_level) is not None:
        steps = CONFIG.training.private_steps
        renyi_divergences(rule.event(1, steps, rule.noise(CONFIG.rounds * steps)), NEIGHBOURING)
    gc.freeze()  # or the first collection of each child copies all of the parent's memory
    beat = (0.2, 1.0) if options.mode == "stops" else (5.0, 30.0)
    places = Places(options.folder, options.postgres_url, *beat)
    with places.new() as place:
        if options.mode == "mishaps":
            assert in_child(lambda: train(place, until=1)) == 0
        names: list[str] = in_child_with_answer(place, lambda: train_with_signal(place, None))
    assert isinstance(names, list), names
    instants = list(enumerate(names, 1))
    cases: list[tuple[str, Case]]
    if options.mode == "kills":
        last = {name: number for number, name in instants}
        # A kill before a transaction's commit leaves what the write before it left: one method stands for all.
        kinds = [name for name in last if name.startswith("commit: ") or not name.endswith("before the commit")]
        chosen = [(last[name], name) for name in kinds] if options.each_kind else instants[:: options.every]
        cases = [(f"{number} {name}", killed_at(number)) for number, name in chosen]
    elif options.mode == "double-kills":
        cases = [
            (f"{number} {name}, then {again}", killed_at(number, again))
            for number, name in instants[options.every // 2 :: options.every]
            for again in (3, max(8, len(names) - number - 1))  # as the resume begins, and far into it
        ]
    elif options.mode == "mishaps":
        cases = [
            (f"{mishap} after {number} {name}", mishap_after(number, MISHAPS[mishap]))
            for number, name in instants[options.every // 2 :: options.every]
            for mishap in MISHAPS
        ]
    else:
        last = {name: number for number, name in instants}  # in the last round, where a name comes more than once
        cases = [(name, stopped_at(last[name])) for name in STOPS]
    return 0 if run(places, [("undisturbed", undisturbed), *cases], at_once=2) else 1


if __name__ == "__main__":
    sys.exit(main())
