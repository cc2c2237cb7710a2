"""An environment for each peer that cannot share ours: made once, and kept in a folder that the user may name."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("requirements")


class NotInstalled(Exception):
    """A peer's environment could not be made; says why."""


def python_of(name: str | None, cache: Path) -> Path:
    """The Python of an environment; this one's where `name` is None. Raises `NotInstalled`."""
    if name is None:
        return Path(sys.executable)
    requirements = REQUIREMENTS / f"{name}.txt"
    digest = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()
    folder = cache / f"{name}-{digest[:12]}"
    python, made = folder / "bin" / "python", folder / "made"
    if not made.exists():
        print(f"installing {name} into {folder}", flush=True)
        _run([sys.executable, "-m", "venv", "--clear", str(folder)])
        _run([str(python), "-m", "pip", "install", "--quiet", "--no-input", "-r", str(requirements)])
        made.touch()
    return python


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        said = [line for line in done.stdout.splitlines() if line.startswith("ERROR")] or done.stdout.splitlines()
        raise NotInstalled(said[-1] if said else f"{command[0]} ended with {done.returncode}")
