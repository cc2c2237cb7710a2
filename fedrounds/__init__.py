"""Federated learning as a durable MLOps pipeline: every round is a Prefect flow run, MLflow holds models and metrics.

The packages below this one stand at the top of the repository; the links beside this file put them under one name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedrounds.deployments.api import resume, runs, show, train

__all__ = ["resume", "runs", "show", "train"]


def __getattr__(name: str) -> Any:
    """Import the functions of `fedrounds.deployments.api` when they are used: they need PyTorch, Prefect and MLflow."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fedrounds.deployments import api

    return getattr(api, name)
