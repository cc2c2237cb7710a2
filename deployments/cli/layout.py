"""The four packages must stand beside each other: another `flows/` on the path would be imported instead of ours."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

PACKAGES = ("flows", "tasks", "fl_components", "deployments")


class Misplaced(NamedTuple):
    message: str
    hint: str


def misplaced_package() -> Misplaced | None:
    """The first package that is missing or comes from another folder, in words; None when all is well.

    Nothing is imported: the packages are only located.
    """
    root = Path(__file__).resolve().parents[2]
    for name in PACKAGES:
        spec = find_spec(name)
        if spec is None:
            return Misplaced(
                f"the package {name!r} is missing beside {root / 'deployments'}", "install fedrounds again, whole"
            )
        folders = [Path(folder).resolve() for folder in spec.submodule_search_locations or ()]
        if root / name not in folders:
            found = folders[0] if folders else spec.origin
            return Misplaced(
                f"{found} hides fedrounds' own package {name!r}, which is {root / name}",
                f"run from another folder, take {found} off PYTHONPATH, or give it another name",
            )
    return None
