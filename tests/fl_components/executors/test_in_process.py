"""The executor without workers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fedrounds.fl_components.executors import Executor, InProcessExecutor, Workload
from tests.fl_components.executors.contract import ExecutorContract


class TestInProcess(ExecutorContract):
    blocks = False

    @contextmanager
    def executor(self, work: Workload, **_: Any) -> Iterator[tuple[Executor, list[str]]]:
        messages: list[str] = []
        yield InProcessExecutor(work, messages.append), messages
