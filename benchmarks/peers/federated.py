"""The workloads as fedrounds trains them: a configuration, and the function that its data is read by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.peers.measure import Task


def clients(workload: str, definition: str) -> dict[str, tuple[Any, ...]]:
    """Each client's rows. The test rows, which are nobody's, are the first client's: they are evaluated together."""
    task = Task(workload, Path(definition))
    shape = (-1, 28, 28) if task.model == "cnn" else (-1, 784)
    x_train, y_train, x_test, y_test = task.images
    x_train, x_test = x_train.reshape(shape), x_test.reshape(shape)
    found = {f"{client:04d}": (x_train[rows], y_train[rows]) for client, rows in enumerate(task.rows)}
    first = next(iter(found))
    return {**found, first: (*found[first], x_test, y_test)}


def configuration(task: Task, rounds: int) -> dict[str, Any]:
    """The fields of a configuration: cohorts and shuffles are drawn by fedrounds itself, from the same laws."""
    return {
        "name": task.name,
        "rounds": rounds,
        "data": {
            "kind": "function",
            "path": f"{__name__}:clients",
            "arguments": {"workload": task.name, "definition": str(task.definition)},
            "public": True,
        },
        "model": {"kind": task.model},
        "training": {"learning_rate": task.learning_rate, "batch_size": task.batch_size, "epochs": 1},
        "selection": {"kind": "uniform", "cohort_size": task.cohort_size},
        "evaluation": {"every": rounds, "per_client": False},
    }
