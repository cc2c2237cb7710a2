"""Who acts: the account under which this process runs."""

from __future__ import annotations

import getpass
import os


def account_name() -> str:
    """Return the account's name, or its number where the system has no name for it (a container's own user id)."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # OSError: Python 3.13 and later
        return f"uid {os.getuid()}"
