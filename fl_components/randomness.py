"""Every random draw: (source, round, purpose, client) -> an independent generator.

The four are hashed into the key of a counter-based generator (Philox; Salmon et al. 2011, "Parallel random numbers:
as easy as 1, 2, 3"), so a draw depends on what it is for and never on what was drawn before it. That is what makes a
round that is run again draw the same numbers.
"""

from __future__ import annotations

import hashlib

import numpy as np

from fedrounds.fl_components.canonical import canonical_json


def derive_key(source: int | bytes, round: int, purpose: str, client: str = "") -> int:
    """A 128-bit key for one draw. `source` is the configuration's seed, or a secret.

    >>> derive_key(0, 1, "selection") == derive_key(0, 1, "selection")
    True
    >>> derive_key(0, 1, "selection") == derive_key(0, 2, "selection")
    False
    """
    # A secret never makes the keys of a seed, whatever its bytes.
    source_bytes = b"secret:" + source if isinstance(source, bytes) else str(source).encode()
    digest = hashlib.sha256()
    for part in (b"fedrounds", source_bytes, str(round).encode(), purpose.encode(), client.encode()):
        digest.update(len(part).to_bytes(8, "little"))  # so that ("a", "bc") and ("ab", "c") differ
        digest.update(part)
    return int.from_bytes(digest.digest()[:16], "little")


def generator(source: int | bytes, round: int, purpose: str, client: str = "") -> np.random.Generator:
    """The generator of one draw.

    >>> int(generator(7, 3, "selection").integers(100)) == int(generator(7, 3, "selection").integers(100))
    True
    """
    return np.random.Generator(np.random.Philox(key=derive_key(source, round, purpose, client)))


def hkdf(key: bytes, purpose: str, *context: str | int) -> bytes:
    """Return the key (32 bytes) of one purpose and context under another key, by HKDF with SHA-256 (RFC 5869).

    >>> hkdf(bytes(32), "noise", "a b", "c") == hkdf(bytes(32), "noise", "a", "b c")
    False
    """
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    info = b"fedrounds " + canonical_json([purpose, *context]).encode()
    return HKDF(SHA256(), 32, salt=None, info=info).derive(key)
