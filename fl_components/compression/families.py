"""All compression rules: one more is a file, and a name here (or an entry point of another package)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedrounds.fl_components.compression.base import CompressionRule
from fedrounds.fl_components.compression.byte_budget import ByteBudget
from fedrounds.fl_components.compression.dead_zone import DeadZone
from fedrounds.fl_components.compression.dithered import Dithered
from fedrounds.fl_components.compression.eden import Eden
from fedrounds.fl_components.compression.levels import Qsgd, Ternary, UniformQuantiser
from fedrounds.fl_components.compression.low_rank import LowRank
from fedrounds.fl_components.compression.none import NoCompression
from fedrounds.fl_components.compression.sign import Sign
from fedrounds.fl_components.compression.sparse import RandomK, Threshold, TopK
from fedrounds.fl_components.rules import union

if TYPE_CHECKING:
    Compression = CompressionRule
else:
    Compression = union(
        "compression",
        *(NoCompression, TopK, RandomK, Threshold, Qsgd, UniformQuantiser, Sign, Ternary, Eden, Dithered, DeadZone),
        *(LowRank, ByteBudget),
    )
