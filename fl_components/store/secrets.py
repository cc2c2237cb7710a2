"""Secrets: what no database, log, blob or page ever holds.

Each run under a privacy claim has a chain of round keys, in one file of its own (0600). The key of the next round is
made from this round's by a one-way function, and takes its place when the round is committed: from then on nobody can
make that round's noise again, or open what was sealed under it (a forward-secure ratchet; Bellare and Yee 2003,
"Forward-security in private-key cryptography"). What a round draws for one purpose has a key of its own (HKDF, RFC
5869).
"""

from __future__ import annotations

import json
import secrets as entropy
from pathlib import Path
from typing import Final

from fl_components.errors import StoreError
from fl_components.store.durable_files import remove_leftovers, write_durably

KEY_BYTES: Final = 32


class RunSecret:
    """The round keys of one run, the one in use in the file `file`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     secret = RunSecret.create(Path(folder) / "run")
    ...     first = secret.key(1, "noise of the sum")
    ...     same = RunSecret.open(Path(folder) / "run").key(1, "noise of the sum") == first
    ...     secret.advance(2)
    ...     other = secret.key(2, "noise of the sum") != first
    >>> same, other
    (True, True)
    """

    def __init__(self, file: Path, round: int, key: bytes) -> None:
        self._file, self._round, self._key = file, round, key

    @classmethod
    def create(cls, file: Path) -> RunSecret:
        """A new chain, from the operating system's entropy. The file of an earlier attempt to make the run is kept."""
        if not file.exists():
            _write(file, 1, entropy.token_bytes(KEY_BYTES))
        return cls.open(file)

    @classmethod
    def open(cls, file: Path) -> RunSecret:
        """Raises `StoreError` when the file is not there or not whole."""
        try:
            remove_leftovers(file)  # one day an old key would be in them
            fields = json.loads(file.read_text())
            return cls(file, int(fields["round"]), bytes.fromhex(fields["key"]))
        except FileNotFoundError as error:
            raise StoreError(
                f"the secret of this run, {file}, is not here: what it has sealed cannot be opened, nor its "
                "noise drawn",
                hint="resume the run in the home folder that began it, or begin another run",
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"the secret of this run, {file}, cannot be read: {error}", hint="begin another run"
            ) from error

    def advance(self, round: int) -> None:
        """Forget the keys of all rounds before `round`. Again, it changes nothing."""
        if round <= self._round:
            return
        key = self._key
        for _ in range(self._round, round):
            key = derived_key(key, "the next round")
        _write(self._file, round, key)
        self._round, self._key = round, key

    def key(self, round: int, purpose: str) -> bytes:
        """The key, 32 bytes, of one purpose in a round.

        Raises `StoreError` when the secret is at another round: the database then is older than it.
        """
        if round != self._round:
            raise StoreError(
                f"round {round} of this run has no key: its secret is at round {self._round}",
                hint="the database was restored from a backup; what came after it was released all the same. "
                "Begin another run, and verify the journal",
            )
        return derived_key(self._key, purpose)


def derived_key(key: bytes, purpose: str) -> bytes:
    """The key of one purpose, made from another one by a one-way function (HKDF with SHA-256)."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(SHA256(), KEY_BYTES, salt=None, info=b"fedrounds " + purpose.encode()).derive(key)


def _write(file: Path, round: int, key: bytes) -> None:
    write_durably(file, json.dumps({"round": round, "key": key.hex()}).encode(), private=True)
