"""Keyed digests of a federation's rows: by these a resume sees whether it has the data that the run began with.

They are made under a key of the store (HMAC, RFC 2104), so that they tell whoever lacks it nothing of the data: not
even whether a guess is right.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedrounds.fl_components.data import FederatedData
from fedrounds.fl_components.data.client_ids import NumberedIds
from fedrounds.fl_components.store import Store

MAX_NAMED: Final = 1000
"""The most clients of which each has a digest of its own, so that an error can name those whose rows have changed."""

_DIGITS: Final = 8  # of a client's own digest: it only names, the digest of all data decides
_PIECE_BYTES: Final = 8 << 20


def digest_key(store: Store) -> bytes:
    """Return the key of the digests, which no database or log holds. All hubs of one database share it."""
    return hmac.digest(store.memberships.fingerprint_key(), b"rows of a run", "sha256")


def data_facts(data: FederatedData, key: bytes) -> dict[str, str]:
    """Return what a run remembers of its data.

    A digest of all rows, labels, client ids and their order, and up to `MAX_NAMED` clients one of each, 8 hexadecimal
    digits of it.

    >>> rows = (np.zeros((3, 2), np.float32), np.array([0, 1, 1]), np.zeros((1, 2), np.float32), np.array([1]))
    >>> from fedrounds.fl_components.data.federated import ClientExamples
    >>> clients = {name: ClientExamples(*rows) for name in ("a", "b")}
    >>> data = FederatedData.from_clients(clients, num_classes=2, public=True)
    >>> facts = data_facts(data, bytes(32))
    >>> {name: len(value) for name, value in facts.items()}
    {'data_digest': 64, 'client_digests': 16}
    """
    clients = range(data.num_clients if data.num_clients <= MAX_NAMED else 0)
    return {
        "data_digest": hmac.digest(key, digest_of_data(data), "sha256").hex(),
        "client_digests": "".join(
            hmac.digest(key, digest_of_client(data, client, test=True), "sha256").hex()[:_DIGITS] for client in clients
        ),
    }


def changed_clients(data: FederatedData, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the ids of the clients whose rows differ, by what a run remembered and what there is now.

    None where that is not known.
    """
    old, new = (
        [digests[start : start + _DIGITS] for start in range(0, len(digests), _DIGITS)]
        for digests in (str(before["client_digests"]), str(now["client_digests"]))
    )
    both = zip(old, new, strict=True) if len(old) == len(new) else ()
    return [data.client_ids[client] for client, (one, other) in enumerate(both) if one != other]


def digest_of_client(data: FederatedData, client: int, *, test: bool = False) -> bytes:
    """Return the sha256 over one client's id and training rows, in their order, and its test rows if asked.

    It is private: it would confirm a guess.
    """
    parts = [*data.train(client), *(data.test(client) if test else ())]
    digest = hashlib.sha256(_header(data.client_ids[client], *parts))
    for part in parts:
        digest.update(np.ascontiguousarray(part).data)
    return digest.digest()


def digest_of_data(data: FederatedData) -> bytes:
    """Return the sha256 over all that a run learns and evaluates from: rows, labels, whose they are, and the clients'
    ids, attributes and order. It is private as well."""
    train, test = data.train_rows, data.test_rows
    arrays = [data.x_train, data.y_train, train.starts, train.stops, data.x_test, data.y_test, test.starts, test.stops]
    attributes = [np.asarray(data.attributes[name]) for name in sorted(data.attributes)]
    numbers = [each for each in attributes if not each.dtype.hasobject]
    words = [str(each.tolist()) for each in attributes if each.dtype.hasobject]
    ids = str(data.client_ids[0:1]) if isinstance(data.client_ids, NumberedIds) else "\n".join(data.client_ids)
    digest = hashlib.sha256(_header(ids, *arrays, *numbers))
    digest.update(repr([data.num_clients, sorted(data.attributes), words]).encode())
    for piece in _digests([each for array in (*arrays, *numbers) for each in _pieces(array)]):
        digest.update(piece)
    return digest.digest()


def _header(text: str, *arrays: NDArray[Any]) -> bytes:
    return repr([text, *((each.dtype.str, each.shape) for each in arrays)]).encode()


def _pieces(array: NDArray[Any]) -> Iterator[memoryview]:
    whole = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return (whole[start : start + _PIECE_BYTES] for start in range(0, len(whole), _PIECE_BYTES))


def _digests(pieces: Sequence[memoryview]) -> list[bytes]:
    """Return the pieces' digests, in order, computed by several threads where there is much to do."""

    def of(piece: memoryview) -> bytes:
        return hashlib.sha256(piece).digest()

    if sum(map(len, pieces)) <= _PIECE_BYTES:
        return list(map(of, pieces))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return list(threads.map(of, pieces))
