"""All compression rules: one more is a file, and a name here (or an entry point of another package)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fl_components.compression.base import CompressionRule
from fl_components.compression.byte_budget import ByteBudget
from fl_components.compression.dead_zone import DeadZone
from fl_components.compression.dithered import Dithered
from fl_components.compression.eden import Eden
from fl_components.compression.levels import Qsgd, Ternary, Uniform
from fl_components.compression.low_rank import LowRank
from fl_components.compression.none import NoCompression
from fl_components.compression.sign import Sign
from fl_components.compression.sparse import RandomK, Threshold, TopK
from fl_components.rules import union

if TYPE_CHECKING:
    Compression = CompressionRule
else:
    Compression = union(
        "compression",
        *(NoCompression, TopK, RandomK, Threshold, Qsgd, Uniform, Sign, Ternary, Eden, Dithered, DeadZone),
        *(LowRank, ByteBudget),
    )
