"""What a client makes of the server's broadcast."""

from __future__ import annotations

from collections.abc import Sequence

from fedrounds.fl_components.arrays import Float32, params_digest
from fedrounds.fl_components.compression import Broadcast, CodecContext
from fedrounds.fl_components.errors import WireError
from fedrounds.fl_components.wire import decode_params


def decode_broadcast(
    rule: Broadcast, channels: Sequence[str], frame: bytes, held_M: Float32 | None, context: CodecContext
) -> Float32:
    """Return the base of a client's update: the channels that the server sent, float32 [M].

    Args:
      channels: the names of the channels that the client expects.
      held_M: the base of the round before, which the client holds; None where it holds none.
      context: of public numbers.

    Raises:
      WireError: it is no frame of parameters, is a difference from others than the client holds, or does not decode to
        the parameters that it names: then the client fetches them whole.
      UpdateRejected: its parts stand for no parameters.
    """
    download = decode_params(frame, context.num_parameters)
    if download.channels != tuple(channels):
        raise WireError(
            f"the broadcast has the channels {', '.join(download.channels)}, and {', '.join(channels)} are expected"
        )
    if download.against is None:
        held_M = None
    elif held_M is None or not params_digest(held_M).startswith(download.against):
        raise WireError(f"the parameters are a difference from {download.against}, which is not held")
    base_M = rule.decompress(download.parts, held_M, context)
    digest = params_digest(base_M)
    if not digest.startswith(download.digest):
        raise WireError(f"the parameters should decode to {download.digest}, and decode to {digest[:16]}")
    return base_M
