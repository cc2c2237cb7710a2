"""How updates and parameters travel: as frames (docs/wire-format.md), decoded without running any code."""

from fedrounds.fl_components.wire.assembly import Assembly, frame_digest
from fedrounds.fl_components.wire.frames import (
    Download,
    Update,
    decode_frame,
    decode_params,
    decode_update,
    encode_frame,
    encode_params,
    encode_update,
    max_update_bytes,
    raw_update_bytes,
    read_frame,
)

__all__ = [
    "Assembly",
    "Download",
    "Update",
    "decode_frame",
    "decode_params",
    "decode_update",
    "encode_frame",
    "encode_params",
    "encode_update",
    "frame_digest",
    "max_update_bytes",
    "raw_update_bytes",
    "read_frame",
]
