"""Bytes that only the holder of a key can read: ChaCha20-Poly1305 (RFC 8439), with a random nonce before them."""

from __future__ import annotations

import os

from fl_components.errors import StoreError

_NONCE_BYTES = 12


def closed(key: bytes, data: bytes) -> bytes:
    """`data` under a key of 32 bytes; other bytes each time."""
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    nonce = os.urandom(_NONCE_BYTES)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, data, None)


def opened(key: bytes, data: bytes) -> bytes:
    """The inverse. Raises `StoreError` when it is not what was closed under this key.

    >>> opened(b"k" * 32, closed(b"k" * 32, b"sum"))
    b'sum'
    """
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    try:
        return ChaCha20Poly1305(key).decrypt(data[:_NONCE_BYTES], data[_NONCE_BYTES:], None)
    except (InvalidTag, ValueError) as error:
        raise StoreError(
            "what a round had sealed cannot be opened: it is damaged, or the run's secret is another",
            hint="begin another run",
        ) from error
