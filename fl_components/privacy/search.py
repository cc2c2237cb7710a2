"""The search for the place where an answer changes."""

from __future__ import annotations

from collections.abc import Callable


def bisect(holds: Callable[[float], bool], true: float, false: float, *, rtol: float = 0.0, atol: float = 0.0) -> float:
    """Return the last number, from `true` towards `false`, at which `holds` is known to hold.

    `holds` must hold at `true`, not hold at `false`, and change once between them; it is called at neither. The search
    ends when the two ends are within `rtol` of the larger one, or within `atol`.

    >>> round(bisect(lambda x: x * x <= 2, 1.0, 2.0, rtol=1e-9), 6)
    1.414214
    """
    while abs(false - true) > max(rtol * max(true, false), atol):
        middle = (true + false) / 2
        if holds(middle):
            true = middle
        else:
            false = middle
    return true
