"""Seals: nothing is read without the key, changed in any place, or taken for another chunk."""

from __future__ import annotations

import os

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedrounds.fl_components.errors import StoreError
from fedrounds.fl_components.store.sealing import SALT_BYTES, closed, opened

KEY = b"k" * 32


@given(st.binary(max_size=100), st.integers(1, 40), st.integers(1, 40))
def test_what_was_closed_is_opened(data: bytes, multiple: int, chunk_bytes: int) -> None:
    sealed = closed(KEY, data, multiple=multiple, chunk_bytes=chunk_bytes)
    assert opened(KEY, sealed, chunk_bytes=chunk_bytes) == data


@given(st.binary(min_size=1, max_size=60), st.data())
def test_no_byte_can_be_changed_removed_or_added(data: bytes, draw: st.DataObject) -> None:
    sealed = closed(KEY, data, chunk_bytes=16)
    place = draw.draw(st.integers(0, len(sealed) - 1))
    flipped = sealed[:place] + bytes([sealed[place] ^ 1]) + sealed[place + 1 :]
    for other in (flipped, sealed[:place], sealed + b"\0"):
        with pytest.raises(StoreError, match="cannot be opened"):
            opened(KEY, other, chunk_bytes=16)


def test_chunks_cannot_change_places_or_come_from_another_seal() -> None:
    size = 16 + 16
    one, other = (closed(KEY, bytes(100), chunk_bytes=16) for _ in range(2))
    chunks = [one[start : start + size] for start in range(SALT_BYTES, len(one), size)]
    exchanged = [chunks[1], chunks[0], *chunks[2:]]
    from_other = [other[SALT_BYTES : SALT_BYTES + size], *chunks[1:]]
    for wrong in (exchanged, from_other, chunks[:-1], [*chunks, chunks[-1]], chunks[1:]):
        with pytest.raises(StoreError, match="cannot be opened"):
            opened(KEY, one[:SALT_BYTES] + b"".join(wrong), chunk_bytes=16)
    with pytest.raises(StoreError, match="cannot be opened"):
        opened(b"j" * 32, one, chunk_bytes=16)


def test_two_seals_of_one_plaintext_differ_in_every_chunk() -> None:
    one, other = (closed(KEY, bytes(64), chunk_bytes=16) for _ in range(2))
    assert all(one[start : start + 16] != other[start : start + 16] for start in range(0, len(one), 16))


@pytest.mark.parametrize("size", [0, 1, 92, 93, 1000])
def test_the_length_tells_no_more_than_the_multiple(size: int) -> None:
    sealed = closed(KEY, bytes(size), multiple=1000)
    assert len(sealed) == SALT_BYTES + 16 + (1000 if size <= 992 else 2000)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_seal_larger_than_the_cipher_takes_at_once() -> None:
    """A sum of 268 million parameters: 2^31 bytes, one more than ChaCha20-Poly1305 takes in a call."""
    if psutil.virtual_memory().available < 12 << 30:
        pytest.skip("not enough memory")
    data = bytes(2**31 - 3) + os.urandom(3 + 8)
    assert opened(KEY, closed(KEY, data)) == data
