"""Updates to compress, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedrounds.fl_components.compression import CodecContext, CompressionRule
from fedrounds.fl_components.wire import Update, decode_update, encode_update, max_update_bytes

SHAPES = ((16, 12), (16,), (10, 16), (10,))
SIZE = 378
Vector = Callable[[int, np.random.Generator], Any]

vectors = hnp.arrays(
    np.float32,
    st.integers(1, 60),
    elements=st.floats(-100, 100, width=32).filter(lambda each: not 0 < abs(each) < 1e-3),
).filter(np.any)


def context(num_updates: int = 1, *, shapes: Any = SHAPES, first_seed: int = 0) -> CodecContext:
    return CodecContext(seeds=range(first_seed, first_seed + num_updates), round_seed=first_seed, shapes=shapes)


def normal(size: int, draw: np.random.Generator) -> Any:
    return draw.standard_normal(size)


def layers(size: int, draw: np.random.Generator) -> Any:
    """Numbers of very different sizes, as a model's layers have them."""
    return draw.standard_normal(size) * np.exp(3 * np.sin(np.arange(size) / size * 6))


def sparse(count: int) -> Vector:
    def vector(size: int, draw: np.random.Generator) -> Any:
        values = np.zeros(size)
        values[draw.choice(size, min(count, size), replace=False)] = draw.uniform(0.2, 2.0, min(count, size))
        return values

    return vector


def update(vector: Vector = normal, size: int = SIZE) -> Any:
    return vector(size, np.random.default_rng(size)).astype(np.float32)


def there_and_back(rule: CompressionRule, deltas_ND: Any, what: CodecContext) -> Any:
    """Through the rule alone."""
    payloads = rule.compress(deltas_ND, what)
    for payload in payloads:
        rule.check(payload, what)
    return rule.decompress(payloads, what)


def through_frames(rule: CompressionRule, deltas_ND: Any, what: CodecContext) -> tuple[Any, list[bytes]]:
    frames = [
        encode_update(Update("client-0001", "ab" * 32, ("delta",), each)) for each in rule.compress(deltas_ND, what)
    ]
    found = [decode_update(frame, max_update_bytes(what.num_parameters)).parts for frame in frames]
    for payload in found:
        rule.check(payload, what)
    return rule.decompress(found, what), frames


def squares(values: Any) -> Any:
    return np.square(values.astype(np.float64)).sum(-1)


def mean_error(rule: CompressionRule, delta_D: Any, many: int = 400) -> float:
    """The mean squared error over that of nothing, over many draws."""
    found_ND = there_and_back(rule, np.tile(delta_D, (many, 1)), context(many, shapes=((len(delta_D),),)))
    return float(squares(found_ND - delta_D).mean() / squares(delta_D))
