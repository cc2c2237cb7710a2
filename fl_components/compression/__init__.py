"""How an update gets smaller before it travels."""

from __future__ import annotations

from fedrounds.fl_components.compression.base import CodecContext, CompressionRule, Quantiser
from fedrounds.fl_components.compression.broadcast import Broadcast
from fedrounds.fl_components.compression.byte_budget import ByteBudget
from fedrounds.fl_components.compression.dead_zone import DeadZone
from fedrounds.fl_components.compression.dithered import Dithered
from fedrounds.fl_components.compression.eden import Eden
from fedrounds.fl_components.compression.families import Compression
from fedrounds.fl_components.compression.levels import Qsgd, Ternary, UniformQuantiser
from fedrounds.fl_components.compression.low_rank import LowRank
from fedrounds.fl_components.compression.none import NoCompression
from fedrounds.fl_components.compression.sign import Sign
from fedrounds.fl_components.compression.sparse import RandomK, Threshold, TopK

__all__ = [
    "Broadcast",
    "ByteBudget",
    "CodecContext",
    "Compression",
    "CompressionRule",
    "DeadZone",
    "Dithered",
    "Eden",
    "LowRank",
    "NoCompression",
    "Qsgd",
    "Quantiser",
    "RandomK",
    "Sign",
    "Ternary",
    "Threshold",
    "TopK",
    "UniformQuantiser",
]
