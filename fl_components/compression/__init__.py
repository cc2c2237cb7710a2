"""How an update gets smaller before it travels."""

from fl_components.compression.base import CompressionRule
from fl_components.compression.none import NoCompression

Compression = NoCompression

__all__ = ["Compression", "CompressionRule", "NoCompression"]
