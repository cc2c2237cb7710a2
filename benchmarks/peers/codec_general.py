"""General compressors on an update: zstandard; Blosc2, which first sorts bytes or bits by their place in a number, or
rounds the mantissa to 7 bits (as many as bfloat16 has); SZ3 (Liang et al. 2022, https://arxiv.org/abs/2111.02925), the
compressor of numbers that FedSZ leans on, as its package pysz has it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np

from benchmarks.peers.codec import Float32, Shapes, Way, main


def _zstandard(shapes: Shapes, threads: int) -> list[Way]:
    import zstandard

    def way(level: int) -> Way:
        return Way(
            f"level {level}",
            prepare=lambda delta_D: delta_D,
            encode=lambda update: zstandard.ZstdCompressor(level).compress(update),
            decode=lambda data: zstandard.ZstdDecompressor().decompress(data),
            restored=_floats,
        )

    return [way(1), way(3)]


def _blosc2(shapes: Shapes, threads: int) -> list[Way]:
    import blosc2
    from blosc2 import Codec, Filter

    def way(title: str, codec: Codec, filters: list[Filter], meta: list[int]) -> Way:
        options = {"typesize": 4, "codec": codec, "clevel": 1, "filters": filters, "filters_meta": meta}
        encode: Callable[[Float32], bytes] = partial(blosc2.compress2, nthreads=threads, **options)
        decode = partial(blosc2.decompress2, nthreads=threads)
        return Way(title, lambda update: update, encode, decode, _floats, at_once=1)  # its own threads share an update

    rounded = [Filter.TRUNC_PREC, Filter.BITSHUFFLE]
    return [
        way("bitshuffle, lz4", Codec.LZ4, [Filter.BITSHUFFLE], [0]),
        way("shuffle, zstd", Codec.ZSTD, [Filter.SHUFFLE], [0]),
        way("7 bits of mantissa, bitshuffle, lz4", Codec.LZ4, rounded, [7, 0]),
    ]


def _sz3(shapes: Shapes, threads: int) -> list[Way]:
    from pysz import sz, szConfig, szErrorBoundMode

    def way(bound: float) -> Way:
        config = szConfig()
        config.errorBoundMode, config.relErrorBound = szErrorBoundMode.REL, bound
        return Way(
            f"SZ3, error within {bound:g} of the range",
            prepare=lambda delta_D: delta_D,
            encode=lambda delta_D: sz.compress(delta_D, config)[0],
            decode=lambda data: sz.decompress(data, np.float32, (sum(map(math.prod, shapes)),))[0],
            restored=lambda found: found,
            at_once=1,  # it does not let go of Python's lock
        )

    return [way(1e-3), way(1e-2)]


def _floats(data: bytes) -> Float32:
    return np.frombuffer(data, np.float32)


if __name__ == "__main__":
    main({"zstandard": _zstandard, "blosc2": _blosc2, "pysz": _sz3})
