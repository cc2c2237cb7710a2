"""Bytes that only the holder of a key can read, in chunks that are encrypted one by one.

The construction is STREAM (Hoang, Reyhanitabar, Rogaway, Vizár 2015, "Online authenticated-encryption and its
nonce-reuse misuse-resistance", https://eprint.iacr.org/2015/189) over ChaCha20-Poly1305 (RFC 8439): each seal has a key
of its own, derived from the given one and a random salt; a chunk's nonce is its number and whether it is the last. So
chunks cannot be changed, removed, repeated, re-ordered or taken from another seal, and no chunk is longer than what
the cipher takes at once (2^31 - 1 bytes).
"""

from __future__ import annotations

import os
from typing import Final

from fedrounds.fl_components.errors import StoreError
from fedrounds.fl_components.randomness import hkdf

CHUNK_BYTES: Final = 64 << 20
SALT_BYTES: Final = 16
_TAG_BYTES: Final = 16
_LENGTH_BYTES: Final = 8


def closed(key: bytes, data: bytes, *, multiple: int = 1, chunk_bytes: int = CHUNK_BYTES) -> bytes:
    """Return `data` encrypted under a key of 32 bytes; other bytes each time.

    Args:
      multiple: the plaintext is padded to a multiple of this many bytes, so that its length reveals little.
      chunk_bytes: how much is encrypted at a time.

    >>> len(closed(b"k" * 32, b"sum", multiple=1000)) == len(closed(b"k" * 32, b"longer sum", multiple=1000))
    True
    """
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    salt = os.urandom(SALT_BYTES)
    cipher = ChaCha20Poly1305(_key(key, salt))
    header, view = len(data).to_bytes(_LENGTH_BYTES, "little"), memoryview(data)
    size = -(-(len(header) + len(data)) // multiple) * multiple
    parts = [salt]
    for start in range(0, size, chunk_bytes):
        stop = min(size, start + chunk_bytes)
        of_data = view[max(0, start - len(header)) : max(0, stop - len(header))]
        plain = b"".join([header[start:stop], of_data])
        plain += bytes(stop - start - len(plain))
        parts.append(cipher.encrypt(_nonce(len(parts) - 1, last=stop == size), plain, None))
    return b"".join(parts)


def opened(key: bytes, data: bytes, *, chunk_bytes: int = CHUNK_BYTES) -> bytes:
    """Return what `closed` was given. Raises `StoreError` for anything else than its result under this key.

    >>> opened(b"k" * 32, closed(b"k" * 32, b"sum"))
    b'sum'
    """
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    cipher = ChaCha20Poly1305(_key(key, data[:SALT_BYTES]))
    view, size = memoryview(data)[SALT_BYTES:], chunk_bytes + _TAG_BYTES
    try:
        parts = [
            cipher.decrypt(_nonce(start // size, last=start + size >= len(view)), view[start : start + size], None)
            for start in range(0, len(view), size) or (0,)  # what is too short to be a seal is refused as such
        ]
    except (InvalidTag, ValueError) as error:
        raise StoreError(
            "what a round had sealed cannot be opened: it is damaged, or was sealed under another secret"
        ) from error
    whole = b"".join(parts)
    return whole[_LENGTH_BYTES : _LENGTH_BYTES + int.from_bytes(whole[:_LENGTH_BYTES], "little")]


def _key(key: bytes, salt: bytes) -> bytes:
    return hkdf(key, "seal", salt.hex())


def _nonce(chunk: int, *, last: bool) -> bytes:
    return chunk.to_bytes(11, "big") + bytes([last])
