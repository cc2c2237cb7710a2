"""Kills at every write, full disks and read-only places."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedrounds.fl_components.errors import StoreError
from fedrounds.fl_components.run_state import RunState
from fedrounds.fl_components.store import RoundRecord, RunRecord, Store

# In a fresh process without threads, forks one child for each write of the last round of a small training; the child
# is killed before or after that write, another one then does the same work again and prints what came of it.
_KILLS = """
import itertools, os, shutil, signal, sys
from contextlib import contextmanager
from pathlib import Path
import fsspec.implementations.local, psutil, sqlalchemy.dialects.sqlite  # once, before forking
from fedrounds.fl_components.run_state import RunState
from fedrounds.fl_components.store import Store


def train(home, rounds):
    with Store.open(home) as store:
        for run_id in ("r", f"with {rounds} rounds".replace(" ", "-")):
            store.create_run(run_id=run_id, name="n", population="p", rounds=3, config={}, config_digest="c",
                             initial_state=b"0", params_digest="0", ancestor=None, engine={}, source_folder="")
        with store.acquire("r") as lease:
            lease.begin_attempt()
            for round in range(store.run("r").committed_round + 1, rounds + 1):
                collection = lease.reserve(round)
                if store.sealed("r", round) is None:
                    lease.seal(round, collection, store.state_blob("r") + b"+")
                state = store.sealed("r", round).data
                lease.commit(round, state=state, params_digest=state.decode(), result={"n": round})
            lease.finish(RunState.COMPLETED)
            lease.collect_garbage()
        run = store.run("r")
        used = {run.initial_state_key, *(r.state_key for r in store.rounds("r") if r.state_key)}
        found = {str(p.relative_to(home / "blobs")) for p in (home / "blobs/r").rglob("*") if p.is_file()}
        charges = [(c.round, c.collection, c.state) for c in store.ledger.collections("r")]
        store.verify_journal()
        return [run.state, run.committed_round, store.state_blob("r"), charges, found == used]

def kill_at(moment):
    from fedrounds.fl_components.store.blobs import Blobs
    moments = itertools.count(1)

    def tick():
        if next(moments) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    transaction, write, delete = Store._transaction, Blobs.write, Blobs.delete

    @contextmanager
    def killed_transaction(self):
        tick()  # after the write before
        with transaction(self) as connection:
            yield connection
            tick()  # before this one is committed

    def killed_write(self, *arguments):
        tick()
        return write(self, *arguments)

    def killed_delete(self, keys):
        tick()
        return delete(self, keys)

    Store._transaction, Blobs.write, Blobs.delete = killed_transaction, killed_write, killed_delete

def in_child(home, moment, rounds=3):
    pid = os.fork()
    if pid == 0:
        if moment:
            kill_at(moment)
        answer = train(home, rounds)
        if moment is None:
            print(answer, flush=True)
        os._exit(0)
    return os.waitpid(pid, 0)[1]

begun = Path(sys.argv[1]) / "begun"
assert in_child(begun, 0, rounds=2) == 0
for moment in itertools.count(1):
    home = Path(sys.argv[1]) / str(moment)
    shutil.copytree(begun, home)
    killed = os.WIFSIGNALED(in_child(home, moment))
    assert in_child(home, None) == 0, moment
    if not killed:
        print("moments", moment - 1)
        break
"""


@pytest.mark.ci
def test_a_kill_before_or_after_any_write_changes_nothing(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FEDROUNDS_")}
    result = subprocess.run(
        [sys.executable, "-c", _KILLS, tmp_path],
        cwd=Path(__file__).parents[3],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    *answers, last = result.stdout.splitlines()
    moments = int(last.removeprefix("moments "))
    assert moments >= 3 + 2 + 2  # at the least: what every round writes
    charges = [(1, 1, "spent"), (2, 1, "spent"), (3, 1, "spent")]
    assert answers == [str([RunState.COMPLETED, 3, b"0+++", charges, True])] * (moments + 1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m,mode=0700", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> Path:
    file = folder / "filler"
    with open(file, "wb", buffering=0) as filler:
        try:
            while filler.write(b"x" * 4096):
                pass
        except OSError:
            pass
    assert shutil.disk_usage(folder).free == 0
    return file


def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_space(
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    home: Path,
    database_url: str,
    open_store: Callable[..., Store],
    new_run: Callable[..., RunRecord],
    do_round: Callable[..., RoundRecord],
) -> None:
    store = open_store(blobs_url=str(small_disk / "blobs"))
    new_run(in_store=store)
    with store.acquire("r") as lease:
        do_round(lease, 1)
        filler = fill(small_disk)
        with pytest.raises(StoreError, match="is full") as caught:
            do_round(lease, 2, os.urandom(10_000))
        assert "free some space" in (caught.value.hint or "")
        assert store.state_blob("r") == b"state 1"
        assert not [path for path in (small_disk / "blobs").rglob(".*") if path.is_file()]
        filler.unlink()
        do_round(lease, 2)
        assert store.state_blob("r") == b"state 2"


def test_a_full_disk_under_sqlite_is_said(
    small_disk: Path, home: Path, tmp_path: Path, do_round: Callable[..., RoundRecord]
) -> None:
    database_url = f"sqlite:///{small_disk / 'fedrounds.db'}"
    with Store.open(database_url=database_url) as store:
        store.create_run(
            run_id="r",
            name="n",
            population="p",
            rounds=3,
            config={},
            config_digest="c",
            initial_state=b"0",
            params_digest="0",
            ancestor=None,
            engine={},
            source_folder="",
        )
        with store.acquire("r") as lease:
            do_round(lease, 1)
            filler = fill(small_disk)
            with pytest.raises(StoreError, match="is full") as caught:
                for _ in range(200):  # until the log has used up the space that it had left
                    lease.begin_attempt()
            assert "free some space" in (caught.value.hint or "")
            assert store.run("r").committed_round == 1
            filler.unlink()
            do_round(lease, 2)
        store.verify_journal()


def test_a_read_only_place_is_said(small_disk: Path, new_run: Callable[..., RunRecord]) -> None:
    with Store.open(small_disk) as store:
        store._blobs.write("r", 0, b"blob")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StoreError, match=r"home folder .* cannot be written to"):
        Store.open(small_disk)
    with pytest.raises(StoreError, match=r"cannot be (opened|written to)") as caught:
        Store.open(small_disk.parent, database_url=f"sqlite:///{small_disk / 'fedrounds.db'}")
    assert caught.value.hint
    with (
        Store.open(small_disk.parent, blobs_url=str(small_disk / "blobs")) as store,
        pytest.raises(StoreError, match="cannot be written") as caught,
    ):
        store._blobs.write("r", 0, b"another blob")
    assert "read-only" in (caught.value.hint or "")
