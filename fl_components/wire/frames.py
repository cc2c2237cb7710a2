"""One frame is one safetensors file: tensors and a small JSON header, never a pickle."""

from __future__ import annotations

from dataclasses import dataclass

from fl_components.errors import StoreError, UpdateRejected
from fl_components.values import Float32, Tensors, pack, unpack

HEADER_ALLOWANCE_BYTES = 4096


def max_update_bytes(num_parameters: int) -> int:
    """The longest frame that the server reads: four bytes a parameter and room for a header."""
    return 4 * num_parameters + HEADER_ALLOWANCE_BYTES


@dataclass(frozen=True, slots=True)
class Update:
    """What a client sends: its compressed update, and the digest of the parameters that it started from."""

    client_id: str
    base_digest: str
    tensors: Tensors


def encode_update(update: Update) -> bytes:
    """The frame of one update. Its length is what `communication/upload_bytes` counts."""
    return pack(update.tensors, {"client_id": update.client_id, "base_digest": update.base_digest})


def decode_update(frame: bytes, max_bytes: int) -> Update:
    """The update in a frame. Raises `UpdateRejected` when it is longer than `max_bytes` or is no such frame.

    >>> import numpy as np
    >>> frame = encode_update(Update("a", "00", {"delta": np.zeros(2, np.float32)}))
    >>> decode_update(frame, max_bytes=1000).client_id
    'a'
    >>> decode_update(frame[:-1], max_bytes=1000)
    Traceback (most recent call last):
    fl_components.errors.UpdateRejected: undecodable: not a frame
    """
    if len(frame) > max_bytes:
        raise UpdateRejected(f"too_large: {len(frame)} bytes, at most {max_bytes}")
    try:
        tensors, header = unpack(frame)
        client_id, base_digest = header["client_id"], header["base_digest"]
    except (StoreError, KeyError) as error:
        raise UpdateRejected("undecodable: not a frame") from error
    if not isinstance(client_id, str) or not isinstance(base_digest, str):
        raise UpdateRejected("undecodable: client_id and base_digest must be text")
    return Update(client_id, base_digest, tensors)


def encode_params(params_D: Float32) -> bytes:
    """The frame in which the server sends its parameters; its length is what `communication/download_bytes` counts."""
    return pack({"params": params_D}, {})


def decode_params(frame: bytes) -> Float32:
    """The parameters in a frame of `encode_params`, float32 [D]: every client's base, bit for bit the same."""
    params_D: Float32 = unpack(frame)[0]["params"]
    return params_D
