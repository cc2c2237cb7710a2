"""Which rules are contractions, that error feedback around these stays bounded, and that others are refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from fedrounds.fl_components.arrays import Float32, Payload
from fedrounds.fl_components.compression import (
    Broadcast,
    ByteBudget,
    CodecContext,
    CompressionRule,
    DeadZone,
    Dithered,
    Eden,
    LowRank,
    NoCompression,
    Qsgd,
    Quantiser,
    RandomK,
    Sign,
    Ternary,
    Threshold,
    TopK,
    UniformQuantiser,
)
from fedrounds.fl_components.compression.base import check_contraction
from tests.fl_components.compression.samples import context, squares

ROUNDS = 60
SHAPES: dict[int, Any] = {
    1: [(1,)],
    2: [(2,)],
    3: [(3,)],
    28: [(7, 4)],
    650: [(10, 64), (10,)],
    5000: [(100, 50)],
}

QUANTISERS: list[Quantiser] = [
    NoCompression(),
    *(Qsgd(bits=bits) for bits in (2, 4, 6, 8)),
    *(UniformQuantiser(bits=bits) for bits in (1, 2, 4, 8)),
    Sign(),
    Ternary(),
    Ternary(bucket=8),
    Eden(),
    Eden(bits=4),
    Eden(scale="least_error"),
    Dithered(),
    Dithered(step=3.4),
    Dithered(step=3.5),
    *(DeadZone(step=step) for step in (0.01, 2.0, 9.0)),
]
RULES: list[CompressionRule] = [
    *QUANTISERS,
    LowRank(rank=1),
    LowRank(rank=2, steps=1),
    ByteBudget(update_bytes=800),
    ByteBudget(update_bytes=150, error_feedback=True),
    *(
        rule
        for values in QUANTISERS
        for rule in (TopK(fraction=0.1, values=values), Threshold(threshold=1.0, values=values))
    ),
    *(RandomK(fraction=fraction, values=values) for values in QUANTISERS for fraction in (0.1, 0.9)),
    RandomK(fraction=0.1, error_feedback=True),
    RandomK(fraction=0.1, values=Sign(), error_feedback=True),
    RandomK(fraction=0.1, values=Eden(), error_feedback=True),
    RandomK(fraction=0.1, values=DeadZone(), error_feedback=True),
]
FEW: list[CompressionRule] = [
    UniformQuantiser(bits=2),
    UniformQuantiser(bits=4),
    Qsgd(bits=8),
    Sign(),
    Eden(),
    Dithered(step=3.4),
    DeadZone(step=4.0),
    DeadZone(step=9.0),
    LowRank(rank=1),
    ByteBudget(update_bytes=150, error_feedback=True),
    TopK(fraction=0.1),
    TopK(fraction=0.1, values=Sign()),
    TopK(fraction=0.02, values=Eden()),
    Threshold(threshold=1.0, values=Dithered()),
    RandomK(fraction=0.02, values=Eden(), error_feedback=True),
    RandomK(fraction=0.9, values=Eden(bits=2)),
]


def what(size: int, seeds: Sequence[int]) -> CodecContext:
    return CodecContext(seeds=seeds, round_seed=seeds[0], shapes=SHAPES[size])


def vectors(size: int, seed: int = 0) -> Any:
    """Normal numbers, equal ones, a single one, two opposite ones among zeros, one that dwarfs all others."""
    found_ND = np.zeros((5, size), np.float32)
    found_ND[0] = np.random.default_rng(seed).standard_normal(size)
    found_ND[1] = 1
    found_ND[2, size // 2] = 1
    found_ND[3, 0], found_ND[3, -1] = -1, 1
    found_ND[4], found_ND[4, size // 3] = 0.01, 1
    return found_ND


def lost(rule: CompressionRule, deltas_ND: Any, context: CodecContext) -> Any:
    return deltas_ND - rule.decompress(rule.compress(deltas_ND, context), context)


def check_feedback(rule: CompressionRule, size: int) -> None:
    """What is kept of 60 updates is at most what the declared factor comes to, q + q^2 + ... + q^60 of the largest."""
    memory_ND = np.zeros((5, size), np.float32)
    largest_N, norm_N = np.zeros(5), np.zeros(5)
    for round in range(ROUNDS):
        deltas_ND = vectors(size, round)
        largest_N = np.maximum(largest_N, np.abs(deltas_ND).max(1))
        norm_N = np.maximum(norm_N, np.sqrt(squares(deltas_ND)))
        memory_ND = lost(rule, deltas_ND + memory_ND, what(size, range(5 * round, 5 * round + 5)))
    assert np.isfinite(memory_ND).all()
    powers = np.arange(1, ROUNDS + 1)
    in_norm = float((rule.error_bound(size) ** (powers / 2)).sum())
    by_number = float((rule.largest_error_bound(size) ** powers).sum())
    fits_N = np.zeros(5, bool)
    if rule.error_bound(size) < 1:
        fits_N |= np.sqrt(squares(memory_ND)) <= 2 * in_norm * norm_N + 1e-4 * norm_N  # twice: it is a mean over draws
    if rule.largest_error_bound(size) < 1:
        fits_N |= np.abs(memory_ND).max(1) <= by_number * largest_N * (1 + 1e-4)
    assert fits_N.all(), (np.sqrt(squares(memory_ND)) / norm_N, in_norm, by_number)


def check_bounds(rule: CompressionRule, size: int, many: int) -> None:
    """The mean squared error over draws, with four standard errors' room, and the largest error of all."""
    for delta_D in vectors(size):
        deltas_ND = np.tile(delta_D, (many, 1))
        losses = [lost(rule, deltas_ND, what(size, range(many)))]
        if isinstance(rule, LowRank):  # whose draws all clients of a round share
            losses = [lost(rule, delta_D[None], what(size, [seed])) for seed in range(many)]
        loss_ND = np.concatenate(losses)
        errors_N = squares(loss_ND) / squares(delta_D)
        room = 4 * errors_N.std() / len(errors_N) ** 0.5 + 1e-5
        if isinstance(rule, RandomK):  # which may never draw the one place that counts (Hoeffding 1963)
            room += max(1, errors_N.max()) * (7 / len(errors_N)) ** 0.5
        assert errors_N.mean() <= rule.error_bound(size) + room, (delta_D[:4], errors_N.mean())
        assert np.abs(loss_ND).max() <= rule.largest_error_bound(size) * np.abs(delta_D).max() * (1 + 1e-4)


class TestContractions:
    @pytest.mark.parametrize("rule", FEW, ids=repr)
    @pytest.mark.parametrize("size", [3, 650])
    def test_error_feedback_stays_bounded(self, rule: CompressionRule, size: int) -> None:
        assert rule.is_contraction(size)
        check_feedback(rule, size)

    @pytest.mark.parametrize("rule", FEW, ids=repr)
    def test_the_declared_bounds_hold(self, rule: CompressionRule) -> None:
        for size in (3, 28, 650):
            check_bounds(rule, size, many=40)

    @pytest.mark.slow
    @pytest.mark.parametrize("rule", RULES, ids=repr)
    @pytest.mark.parametrize("size", SHAPES)
    def test_every_rule_at_every_size(self, rule: CompressionRule, size: int) -> None:
        check_bounds(rule, size, many=100)
        if rule.is_contraction(size):
            check_feedback(rule, size)

    @pytest.mark.parametrize("size", SHAPES)
    def test_what_is_none_is_refused_by_both_fields(self, size: int) -> None:
        """And what is one is accepted by both: as it is, or with error feedback where it is biased."""
        for rule in RULES:
            for fields in ({"error_feedback": True}, {}):
                try:
                    again = type(rule).model_validate(rule.model_dump() | fields)
                except ValidationError as error:
                    assert fields, error  # refused for having no sense with feedback, whatever the size
                    continue
                if again.error_feedback:
                    accepted(again.is_contraction(size), again.check_size, size, "compression.error_feedback is true")
                elif not isinstance(again, ByteBudget):
                    accepted(again.is_contraction(size), previous(again), size, "broadcast.mode is delta")

    def test_a_rule_that_diverges_does(self) -> None:
        """The loop above would show it: QSGD at 2 bits on the largest tenth of 5,000 normal numbers."""
        rule = TopK(fraction=0.1, values=Qsgd(bits=2))
        assert rule.error_bound(5000) == pytest.approx(500**0.5) and not rule.is_contraction(5000)
        memory_1D, norms = np.zeros((1, 5000), np.float32), []
        for round in range(40):
            delta_1D = np.random.default_rng(round).standard_normal((1, 5000)).astype(np.float32)
            memory_1D = lost(rule, delta_1D + memory_1D, what(5000, [round]))
            norms.append(float(np.linalg.norm(memory_1D)))
        assert norms[-1] > 100 * norms[0]

    @pytest.mark.parametrize(
        "rule", [RandomK(fraction=0.1), RandomK(fraction=0.01, values=Eden()), Dithered(step=4)], ids=repr
    )
    def test_what_is_a_contraction_at_no_size_is_refused_before_the_size_is_known(self, rule: CompressionRule) -> None:
        with pytest.raises(ValidationError, match=r"broadcast\.mode is delta but broadcast\.values\.kind"):
            Broadcast(values=rule, mode="delta")

    def test_the_sentence(self) -> None:
        rule = TopK(fraction=0.1, values=Qsgd(bits=2), error_feedback=True)
        with pytest.raises(ValueError) as caught:
            rule.check_size(5000)
        assert str(caught.value) == (
            "compression.error_feedback is true but compression.kind top_k with compression.values.kind qsgd is not a "
            "contraction: its mean squared error can be 22.4 squared norms of 5000 numbers, where less than 1 is "
            "needed, so what one round leaves out would grow from round to round; use more bits, a smaller bucket or "
            "step, or a rule that is one (dead_zone, top_k, sign, low_rank), or leave compression.error_feedback out"
        )


def previous(rule: CompressionRule) -> Any:
    def check(size: int) -> None:
        Broadcast(values=rule, mode="delta").check_size(size)

    return check


def accepted(expected: bool, check: Any, size: int, words: str) -> None:
    if expected and size > 1:
        check(size)
    elif not expected:
        with pytest.raises(ValueError, match=words):
            check(size)


class Undeclared(Quantiser):
    """A rule as another package may have it: it says nothing of its error."""

    kind: str = "undeclared"

    @property
    def unbiased(self) -> bool:
        return False

    def compress(self, deltas_ND: Float32, context: CodecContext) -> list[Payload]:
        return NoCompression().compress(deltas_ND, context)

    def check(self, payload: Payload, context: CodecContext) -> None:
        NoCompression().check(payload, context)

    def decompress(self, payloads: Sequence[Payload], context: CodecContext) -> Float32:
        return NoCompression().decompress(payloads, context)


def test_a_rule_that_declares_nothing_is_none() -> None:
    assert Undeclared().error_bound(10) == math.inf
    with pytest.raises(ValidationError, match="undeclared is not a contraction: it declares no bound of its error"):
        Undeclared(error_feedback=True)
    with pytest.raises(ValueError, match="not a contraction"):
        check_contraction(Undeclared(), "broadcast.values", "broadcast.mode is delta")


@pytest.mark.parametrize("rule", [TopK(), Threshold(threshold=1), RandomK(fraction=0.9)], ids=repr)
def test_a_broadcast_of_some_of_the_parameters_against_nothing(rule: CompressionRule) -> None:
    with pytest.raises(
        ValidationError, match=r"broadcast\.mode is full but broadcast\.values\.kind .* zeros in the place"
    ):
        Broadcast(values=rule)
    assert Broadcast(values=rule, mode="delta").values == rule


def test_a_broadcast_with_too_few_bytes() -> None:
    with pytest.raises(
        ValueError, match=r"broadcast\.values\.update_bytes is 64, and an update of 5000 parameters takes"
    ):
        Broadcast(values=ByteBudget(update_bytes=64)).check_size(5000)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 4096])
@pytest.mark.parametrize("step", [0.01, 2.0, 9.0])
def test_a_dead_zone_always_sends_something(size: int, step: float) -> None:
    """Equal numbers are below two thirds of two root mean squares, and would be kept for ever."""
    delta_1D = np.full((1, size), -0.25, np.float32)
    loss_1D = lost(DeadZone(step=step), delta_1D, context(shapes=((size,),)))
    assert np.abs(loss_1D).max() <= 0.25 / 2
    assert squares(loss_1D[0]) <= (1 - 0.75 / size) * squares(delta_1D[0])
