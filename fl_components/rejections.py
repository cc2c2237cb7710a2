"""Why an update of a client does not count."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class RejectionCode(StrEnum):
    """The kinds of rejection.

    Of a frame that is no update of the round, of an update that breaks a limit, of a client that sent none, and of an
    update that the aggregator excluded.
    """

    TOO_LARGE = "too_large"
    UNDECODABLE = "undecodable"
    WRONG_CLIENT = "wrong_client"
    STALE_BASE = "stale_base"
    WRONG_TENSORS = "wrong_tensors"
    WRONG_SHAPE = "wrong_shape"
    NOT_FINITE = "not_finite"
    NORM_TOO_LARGE = "norm_too_large"
    STRAGGLER = "straggler"
    BUDGET_EXHAUSTED = "budget_exhausted"
    EXCLUDED = "excluded"


@dataclass(frozen=True, slots=True)
class Rejection:
    """A rejection with its code, which is counted and shown, and a detail, which may tell of the client's data.

    >>> str(Rejection(RejectionCode.TOO_LARGE, "120 bytes, at most 100"))
    'too_large: 120 bytes, at most 100'
    """

    code: RejectionCode
    detail: str

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}"
