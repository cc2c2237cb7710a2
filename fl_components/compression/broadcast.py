"""How the server's parameters travel to the clients."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import Field, field_validator, model_validator

from fedrounds.fl_components.arrays import Float32, Payload
from fedrounds.fl_components.compression.base import CodecContext, CompressionRule, check_contraction, without_memory
from fedrounds.fl_components.compression.families import Compression
from fedrounds.fl_components.compression.none import NoCompression
from fedrounds.fl_components.compression.sparse import Sparsifier
from fedrounds.fl_components.rules import Rule

DELTA_MODE: Final = "broadcast.mode is delta"


class Broadcast(Rule):
    """What the clients decode is the base of their updates, the same for all of them.

    The server keeps its own parameters exact.

    In mode `delta` the difference from what the clients hold travels, so the next difference contains what one round's
    compression lost (error feedback at the server; Philippenko and Dieuleveut 2021,
    https://arxiv.org/abs/2006.14591). The first broadcast is whole. Every client must have received every broadcast:
    this is for silos that are always there. In mode `full` a client needs no past.

    >>> import numpy as np
    >>> from fedrounds.fl_components.compression import UniformQuantiser
    >>> rule, context = Broadcast(values=UniformQuantiser(bits=8), mode="delta"), CodecContext([0], 0, [(2,)])
    >>> held_D = np.array([0.5, 1.0], np.float32)
    >>> payload = rule.compress(np.array([0.75, 1.0], np.float32), held_D, context)
    >>> rule.decompress(payload, held_D, context)
    array([0.75, 1.  ], dtype=float32)
    """

    values: Compression = Field(default=NoCompression(), description="how the numbers are written")
    mode: Literal["full", "delta"] = "full"

    @field_validator("values")
    @classmethod
    def _keeps_nothing(cls, values: CompressionRule) -> CompressionRule:
        return without_memory(values)

    @model_validator(mode="after")
    def _something_arrives(self) -> Broadcast:
        if self.mode == "delta":
            check_contraction(self.values, "broadcast.values", DELTA_MODE)
        elif isinstance(self.values, Sparsifier):
            raise ValueError(
                f"broadcast.mode is full but broadcast.values.kind {self.values.kind} writes some of the "
                "numbers: clients would begin with zeros in the place of all other parameters; set broadcast.mode "
                "to delta, or use a rule that writes every number (uniform, eden, dithered)"
            )
        return self

    def check_size(self, num_parameters: int) -> None:
        """Raises ValueError when this many parameters cannot be encoded, or when clients' would diverge from the
        server's."""
        self.values.check_size(num_parameters, "broadcast.values")
        if self.mode == "delta":
            check_contraction(self.values, "broadcast.values", DELTA_MODE, num_parameters)

    def base(self, held_D: Float32 | None) -> Float32 | None:
        """What the next difference is from, where clients hold `held_D`; None where the parameters travel whole."""
        return held_D if self.mode == "delta" and not self.values.is_identity else None

    def compress(self, params_D: Float32, held_D: Float32 | None, context: CodecContext) -> Payload:
        """`params_D`, float32 [D], for clients that hold `held_D`."""
        if self._whole(held_D):
            return NoCompression().compress(params_D[None], context)[0]
        return self.values.compress(params_D[None] if held_D is None else (params_D - held_D)[None], context)[0]

    def decompress(self, payload: Payload, held_D: Float32 | None, context: CodecContext) -> Float32:
        """What a client makes of it. Raises `UpdateRejected` when it stands for no parameters."""
        rule = NoCompression() if self._whole(held_D) else self.values
        rule.check(payload, context)
        decoded_D: Float32 = rule.decompress([payload], context)[0]
        return decoded_D if self._whole(held_D) or held_D is None else held_D + decoded_D

    def _whole(self, held_D: Float32 | None) -> bool:
        return self.values.is_identity or (self.mode == "delta" and held_D is None)
