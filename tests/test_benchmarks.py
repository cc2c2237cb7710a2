"""The benchmarks still run, and reach what the documentation says."""

from __future__ import annotations

import gzip
import importlib.util
import json
import runpy
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest

from benchmarks import codecs
from fedrounds.fl_components.config import load_config
from fedrounds.fl_components.simulate import simulate
from fedrounds.fl_components.wire import Update, encode_update
from tests.support import missing, public_data

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.mark.slow
def test_the_heart_disease_example_reaches_its_accuracy() -> None:
    benchmark = runpy.run_path(str(BENCHMARKS / "heart_disease_fedavg.py"))
    accuracies = [benchmark["pooled_accuracy"](seed) for seed in range(benchmark["SEEDS"])]
    assert mean(accuracies) >= 0.785, accuracies


@pytest.mark.slow
def test_the_2nn_reaches_97_percent_in_the_rounds_that_are_allowed() -> None:
    """McMahan et al. 2017, table 2: 87 rounds; the example has 1.4 times as many."""
    config = load_config(ROOT / "examples" / "mnist_2nn_iid.yaml")
    with public_data():
        reached = next(step.round for step in simulate(config) if step.metrics["eval/accuracy"] >= 0.97)
    assert reached <= 1.4 * 87


@pytest.fixture(scope="module")
def digits_like_mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with MNIST's four files in the shape of the real ones: images in which a bright row is the label."""
    folder = tmp_path_factory.mktemp("mnist")
    rng = np.random.default_rng(0)
    for part, rows in (("train", 60_000), ("t10k", 10_000)):
        labels = rng.integers(10, size=rows, dtype=np.uint8)
        images = np.zeros((rows, 28, 28), np.uint8)
        images[np.arange(rows), 2 * labels] = rng.integers(100, 256, size=(rows, 28), dtype=np.uint8)
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
            content = gzip.compress(header + values.tobytes(), compresslevel=1)
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(content)
    return folder


@pytest.mark.slow
def test_the_peer_benchmark_prints_its_table(digits_like_mnist: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.peers.bench", "--quick", "--mnist", str(digits_like_mnist)]
    command += ["--peers", "limit", "engine", "pipeline", "lean", "plain", "--cache", str(tmp_path / "cache")]
    command += ["--workload", str(BENCHMARKS / "peers" / "workload.py"), "--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {row["title"]: row for row in json.loads((tmp_path / "found.json").read_text())["rows"]}
    for title, row in rows.items():
        assert row["error"] is None, (title, row["error"])
        assert [len(each) for each in row["seconds"]] == [3]
        assert any(line.startswith(f"| {title} ") for line in done.stdout.splitlines()), done.stdout
    lean, plain = rows["lean PyTorch loop"], rows["plain PyTorch loop"]
    assert lean["accuracy"] == pytest.approx(plain["accuracy"], abs=1e-3) and plain["accuracy"] > 0.1
    assert rows["fedrounds: whole pipeline"]["accuracy"] == rows["fedrounds: training stage"]["accuracy"] > 0.1


@pytest.mark.ci
def test_the_benchmark_of_codecs_counts_real_frames(tmp_path: Path) -> None:
    rules = ["top_k 1 %, signs", "eden, 1 bit"]
    command = [sys.executable, "-m", "benchmarks.codecs", "--quick", "--input", "normal", "--peers", "--bad-input"]
    command += ["--rules", *rules, "--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = {cells[1].strip(): cells[2:-1] for line in done.stdout.splitlines() if (cells := line.split("|"))[1:]}
    assert all(float(cell) > 0 for rule in rules for cell in table[rule][:3])
    rows = {row["title"]: row for row in json.loads((tmp_path / "found.json").read_text())["rows"]}
    assert rows[codecs.COPY]["num_bytes"] == 4 * 199_210
    updates = codecs.updates_of("normal", codecs.FEW)
    for rule in rules:
        codec = updates.codec(codecs.RULES[rule])
        payloads = codec.rule.compress(updates.deltas_ND, codec.context(updates.tasks))
        frames = [
            encode_update(Update(task.client_id, updates.plan.base_digest, ("delta",), payload))
            for task, payload in zip(updates.tasks, payloads, strict=True)
        ]
        assert rows[rule]["num_bytes"] == mean(map(len, frames))
    refused = {what: [int(cell) for cell in cells[:2]] for what, cells in table.items() if cells[-1].strip() == "yes"}
    assert len(refused) == 15, done.stdout
    assert all(count == tried or "checksum right" in what for what, (tried, count) in refused.items()), done.stdout


@pytest.mark.slow
def test_the_workload_is_the_shared_one(
    digits_like_mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = ROOT.parent / "shared" / "bench" / "workload.py"
    if not shared.exists():
        missing("there is no shared definition of the workloads beside this repository")
    monkeypatch.setenv("FLDATA", str(digits_like_mnist))

    def loaded(file: Path, name: str) -> Any:
        monkeypatch.setenv("FLCACHE", str(tmp_path / name))
        spec = importlib.util.spec_from_file_location(f"workload_{name}", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    theirs, ours = loaded(shared, "theirs"), loaded(BENCHMARKS / "peers" / "workload.py", "ours")
    for a, b in zip(theirs.data(), ours.data(), strict=True):
        np.testing.assert_array_equal(a, b, strict=True)
    np.testing.assert_array_equal(theirs.partition(), ours.partition(), strict=True)
    for a, b in zip(theirs.partition_u(), ours.partition_u(), strict=True):
        np.testing.assert_array_equal(a, b, strict=True)
    for model in ("mlp", "cnn"):
        for a, b in zip(theirs.init(model), ours.init(model), strict=True):
            np.testing.assert_array_equal(a, b, strict=True)
    for workload, size in ours.COHORT.items():
        assert size == theirs.COHORT[workload]
        np.testing.assert_array_equal(theirs.cohort(3, size), ours.cohort(3, size))
    np.testing.assert_array_equal(theirs.perm(3, 17, 42), ours.perm(3, 17, 42))
    assert (theirs.LR, theirs.BATCH, theirs.NCLIENTS) == (ours.LR, ours.BATCH, ours.NCLIENTS)
