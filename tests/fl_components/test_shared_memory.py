"""Memory that several processes see."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from typing import Any

import numpy as np
import psutil
import pytest

from fedrounds.fl_components import shared_memory
from fedrounds.fl_components.shared_memory import SharedMemory, give_back_memory


@pytest.fixture(params=["memfd", "file"])
def kind(request: Any, monkeypatch: Any) -> str:
    if request.param == "file":
        monkeypatch.delattr(os, "memfd_create", raising=False)
    return str(request.param)


def test_arrays_are_kept_as_they_were(kind: str) -> None:
    arrays = {"x": np.arange(7, dtype=np.int64), "y": np.ones((3, 5), np.float32), "none": np.empty((0, 4), np.float32)}
    memory = SharedMemory.from_arrays(arrays)
    for name, array in arrays.items():
        held = memory[name]
        assert (held.dtype, held.shape) == (array.dtype, array.shape)
        assert held.tobytes() == array.tobytes()
        assert held.size == 0 or held.ctypes.data % 64 == 0


def test_another_process_sees_and_writes_the_same(kind: str) -> None:
    memory = SharedMemory.from_arrays({"x": np.arange(4.0)})
    code = (
        "import sys\n"
        f"sys.path[:] = {sys.path!r}\n"
        "from fedrounds.fl_components.shared_memory import ArraySpec, SharedMemory\n"
        f"memory = SharedMemory({memory.fd}, {memory.layout!r})\n"
        "memory['x'][:] *= 2\n"
    )
    subprocess.run([sys.executable, "-c", code], pass_fds=[memory.fd], check=True)
    assert memory["x"].tolist() == [0, 2, 4, 6]


def test_no_file_stays_open_and_arrays_outlive_it(kind: str) -> None:
    gc.collect()  # what earlier tests left
    gc.disable()  # no more is needed: nothing refers to itself
    try:
        before = psutil.Process().num_fds()
        memory = SharedMemory.create({"x": (np.float32, (2, 3))})
        held = memory["x"]
        held[:] = 5
        assert psutil.Process().num_fds() > before
        del memory
        assert held.tolist() == [[5, 5, 5]] * 2
        del held
        assert psutil.Process().num_fds() == before
    finally:
        gc.enable()


def test_a_hundred_gigabytes_cost_nothing_until_they_are_used() -> None:
    """Slots for results are made for the largest shard that there can be."""
    before = psutil.Process().memory_info().rss
    memory = SharedMemory.create({"slot": (np.float32, (25, 10**9))})
    memory["slot"][3, :10] = 1
    assert psutil.Process().memory_info().rss - before < 50e6


def test_temporary_files_have_no_name(kind: str, tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(shared_memory.tempfile, "tempdir", str(tmp_path))
    memory = SharedMemory.from_arrays({"x": np.arange(3)})
    assert list(tmp_path.iterdir()) == []
    assert memory["x"].sum() == 3


def test_memory_that_is_not_used_is_given_back() -> None:
    pieces = [bytes(50_000) for _ in range(4_000)]  # small enough for the heap
    last = bytes(50_000)  # keeps the heap's top where it is
    full = psutil.Process().memory_info().rss
    del pieces
    give_back_memory()
    assert full - psutil.Process().memory_info().rss > 100e6
    assert len(last) == 50_000
