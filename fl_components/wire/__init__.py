"""How updates and parameters travel: framed as safetensors, decoded without running any code."""

from fl_components.wire.frames import (
    Update,
    decode_params,
    decode_update,
    encode_params,
    encode_update,
    max_update_bytes,
)

__all__ = ["Update", "decode_params", "decode_update", "encode_params", "encode_update", "max_update_bytes"]
