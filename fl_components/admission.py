"""Admission: which updates of a round count, and how long they may be."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pydantic import Field

from fedrounds.fl_components.rejections import Rejection, RejectionCode
from fedrounds.fl_components.rules import Rule


class Admission(Rule):
    """The limits of the section `admission`.

    An update counts if it is finite and its L2 norm is at most `max_update_norm`.

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


@dataclass(frozen=True, slots=True)
class Clip:
    """How long a contribution may be: `norm` over all coordinates.

    With `per_layer` each of L tensors is clipped by itself, to norm / sqrt(L) (McMahan et al. 2018,
    https://arxiv.org/abs/1710.06963, section 3).
    """

    norm: float
    per_layer: bool = False


@dataclass(frozen=True, slots=True)
class RoundAdmission:
    """What decides in one round which updates count, wherever updates are first seen.

    With `clip`, under a claim about clients, an update is clipped (privacy/clipping.py) and none is rejected for its
    norm; one that is not finite contributes zeros. Otherwise `limits` decide.
    """

    limits: Admission
    clip: Clip | None = None

    def rejection(self, norm: float) -> Rejection | None:
        """Return why an update of this L2 norm does not count, or None; then none of a smaller norm is rejected."""
        return None if self.clip is not None else self.limits.rejection(norm)
