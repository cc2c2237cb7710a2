"""What every compression rule does."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from fl_components.rules import Rule
from fl_components.values import Float32, Tensors


class CompressionRule(Rule):
    """An update of D parameters to named tensors, and back."""

    transparent: ClassVar[bool] = False
    """Whether what is decoded is what was encoded, bit for bit, and as long for every update of D parameters: then one
    update that is encoded and decoded tells what all of them cost."""

    @abstractmethod
    def compress(self, delta_D: Float32) -> Tensors:
        """The tensors that stand for `delta_D` (float32 [D])."""

    @abstractmethod
    def decompress(self, tensors: Tensors, num_parameters: int) -> Float32:
        """The update (float32 [D]) that `tensors` stand for. Raises `UpdateRejected` when they stand for none."""
