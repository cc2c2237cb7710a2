"""What the server asks of every update, by its norm; server/test_admission.py has it on real frames."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from fedrounds.fl_components.admission import Admission
from fedrounds.fl_components.rejections import RejectionCode


@pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf")])
def test_there_is_always_a_limit(limit: float) -> None:
    assert Admission().max_update_norm == 1000
    with pytest.raises(ValidationError, match="max_update_norm"):
        Admission(max_update_norm=limit)


@pytest.mark.parametrize(
    ("norm", "code"),
    [
        (0.0, None),
        (1000.0, None),
        (1000.1, RejectionCode.NORM_TOO_LARGE),
        (float("inf"), RejectionCode.NOT_FINITE),
        (float("nan"), RejectionCode.NOT_FINITE),
    ],
)
def test_a_norm(norm: float, code: RejectionCode | None) -> None:
    rejection = Admission().rejection(norm)
    assert (rejection and rejection.code) == code
