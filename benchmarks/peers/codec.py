"""One measurement of a peer that makes updates smaller: what it is given, and the line of JSON in which it answers.

    python -m benchmarks.peers.codec_general --updates updates.npy --shapes "[[199210]]" --threads 2

Every codec_*.py of this folder has these options; benchmarks/codecs.py starts them one after the other.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Shapes = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Way:
    """A setting of a peer. Only `encode` and `decode` are timed, each for all updates.

    Args:
      prepare: an update, float32 [D], as the peer takes it.
      encode: that to what travels.
      decode: what travels to what the peer makes of it.
      restored: that as one vector again.
      num_bytes: of what travels.
      at_once: updates that are worked on at a time; all cores where None.
    """

    title: str
    prepare: Callable[[Float32], Any]
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]
    restored: Callable[[Any], Float32]
    num_bytes: Callable[[Any], float] = len
    at_once: int | None = None


def main(packages: Mapping[str, Callable[[Shapes, int], Sequence[Way]]]) -> None:
    """Measure each of the ways of these packages once, given the shapes and the number of cores; answers a row for
    each: title, seconds (encode, decode), bytes and error."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--updates", required=True, help="a file of numpy's: float32 [N, D]")
    parser.add_argument("--shapes", type=json.loads, required=True, help="of the layers, which make up D, as JSON")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    deltas_ND: Float32 = np.load(options.updates)
    with contextlib.redirect_stdout(sys.stderr):  # peers may print
        rows = [
            {"title": f"{package} {version(package)}: {way.title}"}
            | _row(way, deltas_ND, way.at_once or options.threads)
            for package, ways in packages.items()
            for way in ways(options.shapes, options.threads)
        ]
    print(json.dumps(rows), flush=True)


def _row(way: Way, deltas_ND: Float32, threads: int) -> dict[str, Any]:
    try:
        way.decode(way.encode(way.prepare(deltas_ND[0])))  # warms up
    except (ImportError, OSError) as why:  # a library of its own is not there
        told = str(why).partition(": No such file")[0].replace(str(Path.home()), "~")
        return {"reason": f"does not run: {told}"}
    prepared = [way.prepare(delta_D) for delta_D in deltas_ND]
    with ThreadPoolExecutor(threads) as pool:
        began = time.perf_counter()
        encoded = list(pool.map(way.encode, prepared))
        encoded_at = time.perf_counter()
        sizes = [way.num_bytes(each) for each in encoded]  # before decoding, which may change it
        counted_at = time.perf_counter()
        decoded = list(pool.map(way.decode, encoded))
        ended = time.perf_counter()
    error = sum(
        squared(way.restored(each) - delta_D) for each, delta_D in zip(decoded, deltas_ND, strict=True)
    ) / squared(deltas_ND)
    seconds = encoded_at - began, ended - counted_at
    return {"seconds": seconds, "num_bytes": sum(sizes) / len(sizes), "error": error}


def squared(values: Float32) -> float:
    """The squared norm."""
    return float(np.square(values, dtype=np.float64).sum())


def layers(delta_D: Float32, shapes: Shapes) -> list[Float32]:
    """An update cut into its layers."""
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    return [each.reshape(shape) for each, shape in zip(np.split(delta_D, ends[:-1]), shapes, strict=True)]


def named(delta_D: Float32, shapes: Shapes) -> dict[str, Float32]:
    """The layers by names such as PyTorch gives them."""
    names = [f"{number // 2}.{'weight' if len(shape) > 1 else 'bias'}" for number, shape in enumerate(shapes)]
    return dict(zip(names, layers(delta_D, shapes), strict=True))


def flat(parts: Sequence[Any]) -> Float32:
    """Layers as one vector."""
    return np.concatenate([np.asarray(part, np.float32).ravel() for part in parts])
