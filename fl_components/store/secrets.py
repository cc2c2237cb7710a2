"""Secrets: what no database, log, blob or page ever holds.

Each run under a privacy claim has a chain of round keys, in one file of its own (0600). The key of the next round is
derived from this round's by a one-way function, and takes its place when the round is committed: from then on that
round's noise cannot be drawn again, nor what was sealed under it be opened (a forward-secure ratchet; Bellare and Yee
2003, "Forward-security in private-key cryptography").

The whole tree of keys; each arrow is HKDF with SHA-256 (RFC 5869), whose `info` is the canonical JSON list of the names
and values in brackets, so that different lists never give one key:

    first key: 32 bytes from the operating system
      -> [identity]: the secret's public id, recorded in the transaction that creates the run
    key of round r
      -> [the next round]: the key of round r + 1
      -> [seal, population, run]: encrypts what the round collected (sealing.py)
      -> [selection and training, population, run]: the cohort, and the seeds of shuffling, dropout and compression
      -> [noise of the sum, population, run, collection, digest of the sealed sum and the clipping norm]
      -> [noise of the count, the same]: of unclipped updates, for adaptive clipping
      -> [examples, population, run, collection, client, digest of the training, digest of the client's rows]: one
         client's key of the round
           -> batches (a Philox generator, randomness.py)
           -> [noise of the steps]: one stream of noise for all steps of the round

"Digest of the training" covers what determines a client's update besides its rows: the starting parameters, the
resolved training rule, the model (configuration, constants, code), the way of computing gradients, and the releases
and the processor on which they are computed. Equal noise keys therefore imply equal inputs: no key serves two sums.
"""

from __future__ import annotations

import json
import platform
import secrets as entropy
from contextlib import suppress
from pathlib import Path
from typing import Final

from fedrounds.fl_components.errors import StoreError
from fedrounds.fl_components.randomness import hkdf
from fedrounds.fl_components.store.durable_files import erase, remove_leftovers, write_durably

KEY_BYTES: Final = 32

ID_DIGITS: Final = 32
"""The length of a secret's id, in hexadecimal digits."""


class RunSecret:
    """The round keys of one run, the current one in a file of `folder` that is named by the run and the secret's id.

    `releases` counts the rounds that were released of the run, under this secret and those that it replaced: a database
    that has fewer charges than this was restored from a backup. `database` names the database that has the run.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     secret = RunSecret.create(Path(folder), "r")
    ...     first = secret.key(1, "seal")
    ...     same = RunSecret.open(Path(folder), "r", secret.id).key(1, "seal") == first
    ...     secret.advance(2)
    ...     other = secret.key(2, "seal") != first
    >>> same, other, len(secret.id)
    (True, True, 32)
    """

    def __init__(self, file: Path, id: str, round: int, key: bytes, releases: int, database: str) -> None:
        self._file, self.id, self._round, self._key = file, id, round, key
        self.releases, self.database = releases, database

    @classmethod
    def create(cls, folder: Path, run_id: str, database: str = "") -> RunSecret:
        """Return a new secret, from the operating system's entropy, durable before this returns.

        Its id is a commitment to the first key: it gives nothing of the key away, and no other key has it.
        """
        key = entropy.token_bytes(KEY_BYTES)
        id = _identity(key)
        file = secret_file(folder, run_id, id)
        if not file.exists():  # as it always is, unless the entropy is replaced in a test
            cls(file, id, 1, key, 0, database)._write()
        return cls.open(folder, run_id, id)

    @classmethod
    def open(cls, folder: Path, run_id: str, id: str) -> RunSecret:
        """Return the secret of this id. Raises `StoreError` when its file is missing, damaged or another's."""
        file = secret_file(folder, run_id, id)
        try:
            remove_leftovers(file)  # one day an old key would be in them
            fields = json.loads(file.read_text())
            key = bytes.fromhex(fields["key"])
            counted = int(fields["releases"]), str(fields["database"])
            secret = cls(file, str(fields["id"]), int(fields["round"]), key, *counted)
        except FileNotFoundError as error:
            raise StoreError(f"the secret of run {run_id}, {file.name}, is missing in {folder}") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"the secret of run {run_id}, {file}, cannot be read: {error}") from error
        if secret.id != id or len(secret._key) != KEY_BYTES or (secret.round == 1 and _identity(secret._key) != id):
            raise StoreError(f"the file {file} does not hold the secret with which run {run_id} began")
        return secret

    @property
    def round(self) -> int:
        """The round whose key it holds."""
        return self._round

    def advance(self, round: int) -> None:
        """Forget the keys of all rounds before `round`, which were released. A second call changes nothing."""
        if round <= self._round:
            return
        key = self._key
        for _ in range(self._round, round):
            key = hkdf(key, "the next round")
        releases = self.releases + round - self._round
        RunSecret(self._file, self.id, round, key, releases, self.database)._write()
        self._round, self._key, self.releases = round, key, releases

    def count(self, releases: int, database: str) -> None:
        """Remember that at least so many rounds were released of the run, and which database has it."""
        if releases > self.releases or database != self.database:
            self.releases, self.database = max(releases, self.releases), database
            self._write()

    def _write(self) -> None:
        fields = {"id": self.id, "round": self._round, "key": self._key.hex()}
        fields |= {"releases": self.releases, "database": self.database}
        write_durably(self._file, json.dumps(fields).encode(), private=True)

    def key(self, round: int, purpose: str, *context: str | int) -> bytes:
        """Return the key, 32 bytes, of one purpose and context in a round.

        Raises `StoreError` when the secret is at another round.
        """
        if round != self._round:
            raise StoreError(f"round {round} of this run has no key: its secret is at round {self._round}")
        return hkdf(self._key, purpose, *context)

    def destroy(self) -> None:
        """Overwrite the key on the disk, and remove its file. A second call changes nothing.

        A file system that writes elsewhere than in place (a copy-on-write one, a solid-state disk) may keep the old
        bytes for a while.
        """
        destroy_secret(self._file)


def destroy_secret(file: Path) -> None:
    """Overwrite and remove a secret's file, where it exists."""
    remove_leftovers(file)
    erase(file)


def destroy_secrets(folder: Path, run_id: str, *, database: str, but: str = "") -> None:
    """The same for all secrets that a run of a database had in this home, but for the one of this id."""
    for file in _files(folder, run_id):
        with suppress(OSError, ValueError, KeyError, TypeError):
            if file != secret_file(folder, run_id, but) and json.loads(file.read_text())["database"] == database:
                destroy_secret(file)


def last_seen(folder: Path, run_id: str, database: str | None = None) -> tuple[int, int]:
    """Return how many rounds were released of a run, and the last of them, as far as its secrets in this home tell.

    Args:
      database: the one whose run it is; None: any, since a lost database had other names for its rows.

    Secrets that the database does not name count as well: it may be older than they are.
    """
    releases, last = 0, 0
    for file in _files(folder, run_id):
        with suppress(OSError, ValueError, KeyError, TypeError):
            fields = json.loads(file.read_text())
            if database is None or fields["database"] == database:
                releases, last = max(releases, int(fields["releases"])), max(last, int(fields["round"]) - 1)
    return releases, last


def _files(folder: Path, run_id: str) -> list[Path]:
    return sorted(folder.glob(f"{run_id}@{'[0-9a-f]' * ID_DIGITS}"))


def place_of_secrets(home: Path) -> str:
    """Return how an error names the home folder that holds a run's secret: "HOST:FOLDER"."""
    return f"{platform.node()}:{home}"


def _identity(key: bytes) -> str:
    return hkdf(key, "identity").hex()[:ID_DIGITS]


def secret_file(folder: Path, run_id: str, id: str) -> Path:
    """The file of a run's secret. Its name is this run's alone: another database may hold another run of that id."""
    return folder / f"{run_id}@{id}"
