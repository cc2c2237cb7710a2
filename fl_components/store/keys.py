"""The keys of a home.

The hub's own, with which it signs the journal, those of other hubs that it trusts, and the key of fingerprints, which
all hubs of one database share.
"""

from __future__ import annotations

import hashlib
import os
from functools import cached_property
from pathlib import Path

from fedrounds.fl_components.errors import ConfigError, StoreError
from fedrounds.fl_components.store.durable_files import make_folder, sync_folder, write_durably

PUBLIC_KEY_BYTES = 32


class SigningKey:
    """An Ed25519 key (RFC 8032).

    >>> key = SigningKey(bytes(32))
    >>> is_signed("head", key.sign("head"), key.public), is_signed("other", key.sign("head"), key.public)
    (True, False)
    """

    def __init__(self, private: bytes) -> None:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        self._key = Ed25519PrivateKey.from_private_bytes(private)

    @cached_property
    def public(self) -> bytes:
        return self._key.public_key().public_bytes_raw()

    @cached_property
    def id(self) -> str:
        return key_id(self.public)

    def sign(self, text: str) -> str:
        """The signature of a text, in hex."""
        return self._key.sign(text.encode()).hex()


def key_id(public: bytes) -> str:
    """A key's name: the beginning of its hash."""
    return hashlib.sha256(public).hexdigest()[:16]


def is_signed(text: str, signature: str, public: bytes) -> bool:
    """Whether `signature` is that of `text` by this key."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(public).verify(bytes.fromhex(signature), text.encode())
    except (InvalidSignature, ValueError):
        return False
    return True


class KeyRing:
    """The keys in a folder.

    The hub's own in `hub.key` (0600, made when it is not there), trusted ones in `trusted_keys`, one a line in hex, and
    keys of fingerprints in `fingerprints-ID.key` (0600).
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._own, self._trusted = folder / "hub.key", folder / "trusted_keys"

    @cached_property
    def signing(self) -> SigningKey:
        """Raises `StoreError` when the file is damaged, or missing from a home that has signed before."""
        try:
            make_folder(self._own.parent, 0o700)
            temporary = self._own.with_name(f"hub.key.{os.getpid()}")
            if not self._own.exists():
                self._check_never_signed()
                with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
                    out.write(os.urandom(32))
                    out.flush()
                    os.fsync(out.fileno())
                try:
                    os.link(temporary, self._own)  # of two processes that begin, one wins
                except FileExistsError:
                    pass
                finally:
                    temporary.unlink()
            sync_folder(self._own.parent)  # also where another process has linked it and may not have come so far
            private = self._own.read_bytes()
        except OSError as error:
            raise StoreError(
                f"the hub's key {self._own} cannot be read or made: {error.strerror or error}",
                hint="give this account the right to write there, or set FEDROUNDS_HOME to another folder",
            ) from error
        if len(private) != 32:
            raise StoreError(f"the hub's key {self._own} is damaged", hint="restore it from a backup")
        return SigningKey(private)

    @property
    def trusted(self) -> dict[str, bytes]:
        """The public keys whose rows count, by their id: the hub's own, and those that `trust` has added."""
        lines = self._trusted.read_text().split() if self._trusted.exists() else []
        keys = [self.signing.public, *map(bytes.fromhex, lines)]
        return {key_id(public): public for public in keys}

    def trust(self, public: str) -> str:
        """Trust another hub's public key, given in hex; returns its id. Raises `ConfigError` when it is none."""
        try:
            key = bytes.fromhex(public)
        except ValueError:
            key = b""
        if len(key) != PUBLIC_KEY_BYTES:
            raise ConfigError(
                f"{public!r} is not a public key", hint="give the 64 hexadecimal digits that `journal key` prints there"
            )
        if key_id(key) not in self.trusted:
            lines = self._trusted.read_text() if self._trusted.exists() else ""
            write_durably(self._trusted, f"{lines}{key.hex()}\n".encode(), private=True)
        return key_id(key)

    def _check_never_signed(self) -> None:
        """Raises `StoreError` where the home holds an anchor: it had a key."""
        if (self._folder / "journal.anchor").exists():
            raise StoreError(
                f"the hub's key {self._own} is missing, and this home has signed rows of the journal with it",
                hint=f"restore {self._own} from a backup; the journal takes no row that another key signs here",
            )

    def create_fingerprint_key(self) -> str:
        """Make a key of fingerprints, 32 random bytes, and return its id. It is durable when this returns."""
        key = os.urandom(32)
        write_durably(self.fingerprint_file(key_id(key)), key, private=True)
        return key_id(key)

    def remove_fingerprint_key(self, id: str) -> None:
        """Remove a key that no database has recorded."""
        self.fingerprint_file(id).unlink(missing_ok=True)

    def fingerprint_key(self, id: str) -> bytes | None:
        """The key of fingerprints with this id, 32 bytes; None where this home lacks it.

        Raises `StoreError` when the file holds another key, or cannot be read.
        """
        file = self.fingerprint_file(id)
        try:
            key = file.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(
                f"the key of fingerprints {file} cannot be read: {error.strerror or error}",
                hint="give this account the right to read it",
            ) from error
        if key_id(key) != id:
            raise StoreError(
                f"the key of fingerprints {file} is damaged: its id is not {id}", hint="restore it from a backup"
            )
        return key

    def fingerprint_file(self, id: str) -> Path:
        return self._folder / f"fingerprints-{id}.key"
