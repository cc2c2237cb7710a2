"""The example of small updates, by the command."""

from __future__ import annotations

from typing import Any

import pytest

from fedrounds.fl_components.data.folders import find_folder
from tests.support import ROOT, Fedrounds, data_of, public_data

EXAMPLE = ROOT / "examples" / "compressed.yaml"
PLAIN = ("--set", "compression={kind: none}", "--set", "broadcast={}")


@pytest.mark.slow
def test_the_upload_is_at_least_32_times_smaller_than_without_compression(fedrounds: Fedrounds) -> None:
    """And what comes back is, from the second round on, at least 8 times smaller. The bytes are those of two rounds."""

    with public_data():
        folder = find_folder("mnist", ["train-images-idx3-ubyte"], None).resolve()

    def train(*changes: str) -> dict[str, Any]:
        always = ("--set", "rounds=2", "--set", f"data.folder={folder}")
        found: dict[str, Any] = data_of(fedrounds("train", EXAMPLE, *always, *changes, "--json"))["communication"]
        return found

    small, plain = train(), train(*PLAIN)
    assert 32 * small["upload_bytes"] < plain["upload_bytes"] == pytest.approx(2 * 20 * 4 * 199_210, rel=0.001)
    whole = plain["download_bytes"] / 2
    assert 8 * (small["download_bytes"] - whole) < whole
    assert small["simulated_s"] < plain["simulated_s"]
