"""Layout: which coordinates of an update, and of what the server sends, belong to which channel."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedrounds.fl_components.arrays import Float32

DELTA: Final = "delta"
"""The first channel of every update: w_local - w_global."""

PARAMS: Final = "params"
"""The first channel of what the server sends: w_global."""

Shape = tuple[int, ...]

CHANNELS: Final = re.compile(r"[a-z_]{1,40}(,[a-z_]{1,40}){0,9}")
"""The names of channels as they travel: at most ten, of small letters and underscores, separated by commas."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Named channels, one after the other in a vector of M coordinates; each has the shapes of the model's parameters.

    An update is clipped, compressed and summed as one vector; whoever needs one channel gets a view of it.

    Args:
      channels: the names, the first of which is `delta` in an update and `params` in a broadcast.
      parameter_shapes: of the model's trainable parameters, in the order of D.

    Raises:
      ValueError: the names cannot travel, or one of them occurs twice.

    >>> layout = Layout(("delta", "control"), ((2, 3), (3,)))
    >>> layout.num_parameters, layout.size, layout.slices["control"]
    (9, 18, slice(9, 18, None))
    """

    channels: tuple[str, ...]
    parameter_shapes: tuple[Shape, ...]

    def __post_init__(self) -> None:
        if not CHANNELS.fullmatch(",".join(self.channels)) or len(set(self.channels)) < len(self.channels):
            raise ValueError(
                "channels are at most ten different names of up to 40 small letters and underscores, not "
                f"{', '.join(self.channels)!a:.200}"
            )

    @property
    def num_parameters(self) -> int:
        """D, the coordinates of one channel."""
        return sum(math.prod(shape) for shape in self.parameter_shapes)

    @property
    def size(self) -> int:
        """M, the coordinates of all channels."""
        return len(self.channels) * self.num_parameters

    @property
    def shapes(self) -> Sequence[Shape]:
        """The shapes of all tensors of all channels, in the order of M."""
        return self.parameter_shapes * len(self.channels)

    @property
    def slices(self) -> Mapping[str, slice]:
        """The coordinates of each channel."""
        length = self.num_parameters
        return {name: slice(place * length, (place + 1) * length) for place, name in enumerate(self.channels)}

    def split(self, vectors: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Return a view of each channel of a vector [M], or of vectors [..., M]."""
        return {name: vectors[..., coordinates] for name, coordinates in self.slices.items()}

    def join(self, channels: Mapping[str, Float32]) -> Float32:
        """Return the channels, float32 [D] each, as one new vector [M]; the inverse of `split`."""
        return np.concatenate([channels[name] for name in self.channels], dtype=np.float32)
