"""What the server asks of every update before it counts."""

from __future__ import annotations

import math

from pydantic import Field

from fedrounds.fl_components.rejections import Rejection, RejectionCode
from fedrounds.fl_components.rules import Rule


class Admission(Rule):
    """An update counts if it is finite and its L2 norm is not above `max_update_norm`.

    >>> str(Admission(max_update_norm=10).rejection(12.5))
    'norm_too_large: 12.5 is above admission.max_update_norm 10'
    """

    max_update_norm: float = Field(default=1000.0, gt=0)

    def rejection(self, norm: float) -> Rejection | None:
        """Return why an update of this L2 norm does not count, or None; then none of a smaller norm is rejected.

        An update that is not finite has no finite norm.
        """
        if not math.isfinite(norm):
            return Rejection(RejectionCode.NOT_FINITE, "the update holds NaN or infinity")
        if norm > self.max_update_norm:
            detail = f"{norm:.4g} is above admission.max_update_norm {self.max_update_norm:g}"
            return Rejection(RejectionCode.NORM_TOO_LARGE, detail)
        return None
