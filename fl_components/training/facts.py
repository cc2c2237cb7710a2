"""What the last bits of a simulated training depend on besides the store."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import numpy as np
import torch


def engine_environment() -> dict[str, Any]:
    """Of this process: the way it trains, its releases of fedrounds, torch and numpy, and its processor."""
    return {
        "training": "cohort engine",
        "fedrounds": version("fedrounds"),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "processor": _processor(),
    }


def _processor() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        name = ""
    if not name:
        import platform

        name = platform.processor() or platform.machine()
    return f"{name} ({capability})"
