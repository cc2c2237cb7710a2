"""Masked arrays: refuse values that are marked as missing."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedrounds.fl_components.errors import DataError


def check_unmasked(values: Any, where: str) -> None:
    """Raise `DataError` when an element of a masked array, or of one in a list, is masked: beneath it lies no value.

    >>> check_unmasked(np.ma.masked_equal([[1, 2], [3, -9]], -9), "client 'a', x")
    Traceback (most recent call last):
    fedrounds.fl_components.errors.DataError: client 'a', x: row 1 (from 0), column 1 is masked: its value is missing
    """
    masked = _first_masked(values)
    if masked is not None:
        row, *position = masked or (0,)
        column = f", column {position[0] if len(position) == 1 else position}" if position else ""
        raise DataError(
            f"{where}: row {row} (from 0){column} is masked: its value is missing",
            hint="fill in missing values (numpy: filled), or leave these rows out",
        )


def _first_masked(values: Any) -> tuple[int, ...] | None:
    """Return the index of the first masked element of an array, or of arrays in nested lists."""
    if isinstance(values, np.ma.MaskedArray):
        masked = np.argwhere(np.ma.getmaskarray(values))
        return tuple(masked[0].tolist()) if len(masked) else None
    for row, part in enumerate(values if isinstance(values, list | tuple) else ()):
        within = _first_masked(part) if isinstance(part, list | tuple | np.ma.MaskedArray) else None
        if within is not None:
            return (row, *within)
    return None
