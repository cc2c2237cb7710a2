"""Every value that leaves the trusted side is public, charged, or withheld.

Under a claim about private data, views (MLflow, Prefect, `--json`, the journal) get the first two kinds only. A value
says which kind it is where it is made; there is no default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Release:
    """A value and why it may be seen.

    "public" (nothing of the clients' data is in it), "charged" (made from what the ledger has paid for), or "withheld"
    (neither).
    """

    value: Any
    kind: Literal["public", "charged", "withheld"]


def public(value: Any) -> Release:
    """Known without looking at anybody's data."""
    return Release(value, "public")


def charged(value: Any) -> Release:
    """Computed from noisy results alone."""
    return Release(value, "charged")


def withheld(value: Any) -> Release:
    """Computed from data that nobody has paid for."""
    return Release(value, "withheld")


def split_releases(values: Mapping[str, Release], *, withholds: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """What views get, and what they do not.

    >>> split_releases({"privacy/epsilon": public(1.0), "train/loss": withheld(0.3)}, withholds=True)
    ({'privacy/epsilon': 1.0}, {'train/loss': 0.3})
    """
    shown = {name: each.value for name, each in values.items() if not (withholds and each.kind == "withheld")}
    return shown, {name: each.value for name, each in values.items() if name not in shown}
