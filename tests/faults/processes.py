"""Trainings in processes that a signal stops at a chosen write of the store.

`python processes.py kills|double-kills|stops FOLDER` imports everything once and then forks: a child is a fresh process
without the seconds that imports take. The parent never opens a store, starts no thread and does nothing with torch, so
that a fork copies nothing that is under way. It prints one JSON object for each case.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# What a store and the data import when they are first used is imported here, once for all children.
import fsspec.implementations.local
import psutil  # noqa: F401
import psycopg
import sklearn.model_selection  # noqa: F401
import sqlalchemy.dialects.postgresql.psycopg
import sqlalchemy.dialects.sqlite  # noqa: F401

from fl_components.config import load_config
from fl_components.errors import FedroundsError
from fl_components.server import stages
from fl_components.server.hub import open_hub
from fl_components.store import Store, blobs
from flows.round import walk

CONFIG = Path(__file__).with_name("federation.yaml")
RUN_ID = "run"
LEASE_LOST, OTHER_ERROR = 3, 4  # exit statuses


class Place:
    """Where a store is: a home folder, and a PostgreSQL database or the SQLite file in that folder."""

    def __init__(self, home: Path, database_url: str | None, heartbeat_s: float, lapse_s: float) -> None:
        self.home, self._database_url = home, database_url
        self._heartbeat_s, self._lapse_s = heartbeat_s, lapse_s

    def open(self) -> Store:
        return Store.open(
            self.home, database_url=self._database_url, heartbeat_s=self._heartbeat_s, lapse_s=self._lapse_s
        )


class Places:
    """Copies of one empty store."""

    def __init__(self, folder: Path, server_url: str | None, heartbeat_s: float, lapse_s: float) -> None:
        self._folder, self._server_url, self._beat = folder, server_url, (heartbeat_s, lapse_s)
        self._names = (f"faults_{os.getpid()}_{number}" for number in itertools.count())
        self._template = next(self._names)
        if server_url is not None:
            self._sql(f"CREATE DATABASE {self._template}")
        place = Place(folder / self._template, self._url(self._template), *self._beat)
        assert in_child(lambda: place.open().close()) == 0

    @contextmanager
    def new(self) -> Iterator[Place]:
        name = next(self._names)
        shutil.copytree(self._folder / self._template, self._folder / name)
        if self._server_url is not None:
            self._sql(f"CREATE DATABASE {name} TEMPLATE {self._template}")
        yield Place(self._folder / name, self._url(name), *self._beat)
        shutil.rmtree(self._folder / name)
        if self._server_url is not None:
            self._sql(f"DROP DATABASE {name} WITH (FORCE)")

    def _url(self, name: str) -> str | None:
        return None if self._server_url is None else f"{self._server_url.rpartition('/')[0]}/{name}"

    def _sql(self, statement: str) -> None:
        assert self._server_url is not None
        with psycopg.connect(self._server_url, autocommit=True) as connection:
            connection.execute(statement)


# --- in a child ---


def train(place: Place) -> None:
    """The whole training, or what an earlier process left of it."""
    config = load_config(CONFIG)
    with place.open() as store, open_hub(store, RUN_ID, config=config) as hub:
        hub.lease.begin_attempt()
        for round in range(hub.refresh().committed_round + 1, config.rounds + 1):
            walk(stages, hub, round)
        hub.lease.finish("Completed")


def outcome(place: Place) -> dict[str, Any]:
    """All that a training leaves in its store, but for clock times and the number of attempts."""
    with place.open() as store:
        store.verify_journal()
        run, rounds, journal = store.run(RUN_ID), store.rounds(RUN_ID), list(store.journal(RUN_ID))
        used = {run.initial_state_key, *(each.state_key for each in rounds if each.state_key)}
        return {
            "state": [run.state, run.error, run.committed_round, run.params_digest],
            "checkpoint": hashlib.sha256(store.state_blob(RUN_ID)).hexdigest(),
            "rounds": [
                [each.round, each.collection, each.params_digest]
                + [{name: value for name, value in each.result["metrics"].items() if not name.startswith("time/")}]
                for each in rounds
            ],
            "charges": [[each.round, each.collection, each.state] for each in store.charges(run_id=RUN_ID)],
            "seals": [each.round for each in rounds if store.sealed(RUN_ID, each.round)],
            "journal": {
                kind: [row.content.get("round") for row in journal if row.kind == kind]
                for kind in ("run.created", "charge.reserved", "round.sealed", "round.committed")
            },
            "states kept": sum(each.state_key is not None for each in rounds),
            "blobs nobody needs": len(blob_files(place) - used),
            "blobs missing": sorted(used - blob_files(place)),
        }


def blob_files(place: Place) -> set[str]:
    folder = place.home / "blobs"
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


class Instants:
    """Counts the instants around the writes of this process's store, and sends it a signal at one of them.

    Of a transaction: just before its commit, and after. Of a blob: before its temporary file, when half of it is
    written, when all is, after each fsync, after the rename. Of a deletion: after it.
    """

    def __init__(self, number: int | None, signal_number: int = signal.SIGKILL) -> None:
        self.names: list[str] = []
        self._number, self._signal = number, signal_number

    def reach(self, what: str) -> None:
        self.names.append(f"{_method()}: {what}")
        if len(self.names) == self._number:
            os.kill(os.getpid(), self._signal)

    def watch(self) -> None:
        """Wraps every function that writes, for the rest of this process's life."""
        transaction = Store._transaction

        @contextmanager
        def watched_transaction(store: Store) -> Iterator[Any]:
            with transaction(store) as connection:
                yield connection
                self.reach("before the commit")
            self.reach("after the commit")

        def then(function: Callable[..., Any], what: str) -> Callable[..., Any]:
            def watched(*arguments: Any, **options: Any) -> Any:
                result = function(*arguments, **options)
                self.reach(what)
                return result

            return watched

        write_durably = blobs._write_durably

        def watched_write(path: Path, data: bytes) -> None:
            self.reach("before the blob")
            write_durably(path, data)

        instants = self

        class WatchedFile:
            def __init__(self, *arguments: Any) -> None:
                self._file = open(*arguments)

            def __enter__(self) -> WatchedFile:
                return self

            def __exit__(self, *_: object) -> None:
                self._file.close()

            def __getattr__(self, name: str) -> Any:
                return getattr(self._file, name)

            def write(self, data: bytes) -> None:
                self._file.write(data[: len(data) // 2])
                self._file.flush()
                instants.reach("half of the temporary file")
                self._file.write(data[len(data) // 2 :])
                self._file.flush()
                instants.reach("the temporary file")

        patched: Any = blobs
        patched.open = WatchedFile
        patched._write_durably = watched_write
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


# --- in the parent ---


def in_child(work: Callable[[], object], wait: bool = True) -> int:
    """Does `work` in a forked process, and returns how that ended (as `subprocess` counts), or its pid."""
    assert threading.active_count() == 1, threading.enumerate()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = OTHER_ERROR
        try:
            work()
            status = 0
        except FedroundsError as error:
            print(f"{error.code}: {error}", file=sys.stderr)
            status = LEASE_LOST if error.code == "lease_lost" else OTHER_ERROR
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return ended(pid) if wait else pid


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def train_and_tell(place: Place) -> dict[str, Any]:
    """The training without a fault in a child, and what came of it."""
    file = place.home / "outcome.json"

    def work() -> None:
        train(place)
        file.write_text(json.dumps(outcome(place)))

    status = in_child(work)
    return json.loads(file.read_text()) if status == 0 else {"exit status of the resume": status}


def train_with_signal(place: Place, number: int | None, signal_number: int = signal.SIGKILL) -> list[str]:
    """In the child: trains until the signal, or to the end; returns the names of the instants that were reached."""
    instants = Instants(number, signal_number)
    instants.watch()
    train(place)
    return instants.names


def instants_of_a_training(places: Places) -> list[str]:
    with places.new() as place:
        file = place.home / "instants.json"
        assert in_child(lambda: file.write_text(json.dumps(train_with_signal(place, None)))) == 0
        names: list[str] = json.loads(file.read_text())
        return names


def tell(case: str, **found: Any) -> None:
    print(json.dumps({"case": case, **found}), flush=True)


def kills(places: Places, every: int) -> None:
    """SIGKILL at every instant (or every so many), then the same training again."""
    with places.new() as place:
        tell("undisturbed", outcome=train_and_tell(place))
    for number, name in list(enumerate(instants_of_a_training(places), 1))[::every]:
        with places.new() as place:
            killed = in_child(lambda: train_with_signal(place, number)) == -signal.SIGKILL  # noqa: B023
            tell(f"{number} {name}", killed=killed, outcome=train_and_tell(place))


def double_kills(places: Places, every: int) -> None:
    """SIGKILL, and again while it is resumed."""
    with places.new() as place:
        tell("undisturbed", outcome=train_and_tell(place))
    names = instants_of_a_training(places)
    for number, name in list(enumerate(names, 1))[every // 2 :: every]:
        again = 1 + number * 7 % (len(names) - number + 4)  # anywhere in what is left, the attempt's beginning too
        with places.new() as place:
            killed = in_child(lambda: train_with_signal(place, number)) == -signal.SIGKILL  # noqa: B023
            killed_again = in_child(lambda: train_with_signal(place, again)) == -signal.SIGKILL  # noqa: B023
            tell(f"{number} {name}, then {again}", killed=killed and killed_again, outcome=train_and_tell(place))


def stops(places: Places) -> None:
    """SIGSTOP where the store is not locked, another process finishes the training, SIGCONT."""
    with places.new() as place:
        tell("undisturbed", outcome=train_and_tell(place))
    names = instants_of_a_training(places)
    chosen = [
        "reserve: after the commit",
        "seal: before the blob",
        "seal: half of the temporary file",
        "seal: after the rename",
        "seal: after the commit",
        "commit: before the blob",
        "commit: after the rename",
        "commit: after the commit",
    ]
    for name in chosen:
        number = [number for number, each in enumerate(names, 1) if each == name][-1]  # in the last round
        with places.new() as place:
            stopped = in_child(lambda: train_with_signal(place, number, signal.SIGSTOP), wait=False)  # noqa: B023
            assert os.WIFSTOPPED(os.waitpid(stopped, os.WUNTRACED)[1]), name
            finished = train_and_tell(place)
            os.kill(stopped, signal.SIGCONT)
            status = ended(stopped)
            file = place.home / "later.json"
            assert in_child(lambda: file.write_text(json.dumps(outcome(place)))) == 0  # noqa: B023
            later = json.loads(file.read_text())
            tell(name, status=status, outcome=finished, later=later)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=["kills", "double-kills", "stops"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--postgres-url")
    options = parser.parse_args()
    # Beats of the heart are writes too: here none falls due, so that the instants are the same ones each time.
    beat = (0.2, 1.0) if options.mode == "stops" else (100.0, 1000.0)
    places = Places(options.folder, options.postgres_url, *beat)
    if options.mode == "kills":
        kills(places, options.every)
    elif options.mode == "double-kills":
        double_kills(places, options.every)
    else:
        stops(places)


if __name__ == "__main__":
    main()
