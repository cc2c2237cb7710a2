"""A client's update as a frame."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedrounds.fl_components.arrays import Float32
from fedrounds.fl_components.compression import CodecContext, CompressionRule
from fedrounds.fl_components.values import Weighted
from fedrounds.fl_components.wire import Update, encode_update


def encode_updates(
    rule: CompressionRule,
    client_ids: Sequence[str],
    channels: Sequence[str],
    base_digest: str,
    updates_NM: Float32,
    context: CodecContext,
    *,
    num_measured: int = 0,
    keep_residuals: bool = False,
) -> tuple[list[bytes], list[Weighted]]:
    """Return the frames of N updates, and what compression lost.

    Args:
      channels: the names of the channels of an update.
      base_digest: of the broadcast that the updates start from.
      updates_NM: float32. With `keep_residuals`, what was lost of each update takes its place.
      context: what both ends know of these updates.
      num_measured: of how many updates, the first ones, the loss is measured; all of them with `keep_residuals`. The
        loss is the squared norm of the difference over that of the updates.
    """
    payloads = rule.compress(updates_NM, context)
    num_measured = len(payloads) if keep_residuals else num_measured
    lost: list[Weighted] = []
    if num_measured:
        decoded_NM = rule.decompress(payloads[:num_measured], context.of(range(num_measured)))
        loss_NM = updates_NM[:num_measured] - decoded_NM
        lost.append(Weighted(squared_norm(loss_NM), squared_norm(updates_NM[:num_measured])))
        if keep_residuals:
            updates_NM[:] = loss_NM
    frames = [
        encode_update(Update(client_id, base_digest, tuple(channels), payload))
        for client_id, payload in zip(client_ids, payloads, strict=True)
    ]
    return frames, lost


def squared_norm(values: Float32) -> float:
    """Return the sum of the squares, added up in float64.

    >>> squared_norm(np.array([3, 4], np.float32))
    25.0
    """
    return float(np.square(values, dtype=np.float64).sum())
