"""The server's parameters as they travel to the clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedrounds.fl_components.arrays import Float32, Tensors, params_digest
from fedrounds.fl_components.client import decode_broadcast
from fedrounds.fl_components.compression import Broadcast, CodecContext
from fedrounds.fl_components.wire import Download, encode_params


@dataclass(frozen=True, slots=True, eq=False)
class EncodedBroadcast:
    """What the server sends in a round.

    Args:
      frame: the bytes that travel.
      base_M: what every client decodes, float32 [M], bit for bit the same: the base of the updates.
      digest: of `base_M`.
      held: what the clients hold after the round, for the next broadcast.
    """

    frame: bytes
    base_M: Float32
    digest: str
    held: Tensors


def encode_broadcast(
    rule: Broadcast, channels: Sequence[str], values_M: Float32, held: Tensors, context: CodecContext
) -> EncodedBroadcast:
    """Return the broadcast of `values_M`, the server's channels, to clients that hold `held`."""
    held_M = rule.base(held.get("base"))
    payload = rule.compress(values_M, held_M, context)
    digest = params_digest(rule.decompress(payload, held_M, context))
    against = params_digest(held_M) if held_M is not None else None
    frame = encode_params(Download(digest, against, tuple(channels), payload))
    base_M = decode_broadcast(rule, channels, frame, held_M, context)
    return EncodedBroadcast(frame, base_M, digest, {"base": base_M} if rule.mode == "delta" else {})
