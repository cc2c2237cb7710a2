"""Paths of data, looked up so that each one that cannot be used is a `DataError`."""

from __future__ import annotations

from pathlib import Path

from fedrounds.fl_components.errors import ConfigError, DataError


def expanded(path: str | Path, field: str) -> Path:
    """Return a path with `~` replaced by the home folder of an account.

    Raises `ConfigError`, which names the field or variable that the path comes from, when there is no such account.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{field} is {str(path)!r}: {error}", hint="write the whole path") from error


def is_folder(path: Path) -> bool:
    """Return whether a path is that of a folder. Raises `DataError` when that cannot be looked up."""
    try:
        return path.is_dir()
    except OSError as error:
        raise unreadable(path, error) from error


def is_file(path: Path) -> bool:
    """Return whether a path is that of a file. Raises `DataError` when that cannot be looked up."""
    try:
        return path.is_file()
    except OSError as error:
        raise unreadable(path, error) from error


def entries_of(folder: Path) -> list[Path]:
    """Return what a folder holds, sorted by name. Raises `DataError` when it cannot be read."""
    try:
        return sorted(folder.iterdir())
    except (OSError, ValueError) as error:
        raise unreadable(folder, error) from error


def unreadable(path: Path, error: OSError | ValueError) -> DataError:
    """Return the error for a path that the operating system refuses.

    >>> print(unreadable(Path("wards"), PermissionError(13, "Permission denied")))
    wards cannot be read: Permission denied
    """
    reason = error.strerror if isinstance(error, OSError) else None
    hint = (
        "check its permissions, and those of the folders above it"
        if isinstance(error, PermissionError)
        else "check the path"
    )
    name = str(path) if str(path).isprintable() else ascii(str(path))
    return DataError(f"{name} cannot be read: {reason or error}", hint=hint)
