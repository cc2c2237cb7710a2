"""What every compression rule promises; a new rule is one line in CASES."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import ValidationError

from fedrounds.fl_components.arrays import Indices, Payload, Symbols
from fedrounds.fl_components.compression import (
    ByteBudget,
    CodecContext,
    CompressionRule,
    DeadZone,
    Dithered,
    Eden,
    LowRank,
    NoCompression,
    Qsgd,
    RandomK,
    Sign,
    Ternary,
    Threshold,
    TopK,
    UniformQuantiser,
)
from fedrounds.fl_components.compression.rotation import rotate, rotate_back
from fedrounds.fl_components.errors import UpdateRejected
from fedrounds.fl_components.wire import Update, encode_update, max_update_bytes
from tests.fl_components.compression.samples import (
    SHAPES,
    SIZE,
    Vector,
    context,
    layers,
    normal,
    sparse,
    squares,
    there_and_back,
    through_frames,
    update,
)

CASES: list[CompressionRule] = [
    NoCompression(),
    TopK(fraction=0.1),
    TopK(fraction=0.1, error_feedback=True),
    TopK(fraction=0.1, values=Sign()),
    TopK(fraction=0.1, values=Qsgd(bits=3)),
    TopK(fraction=1.0),
    RandomK(fraction=0.3),
    RandomK(fraction=0.3, mask="shared"),
    RandomK(fraction=0.3, values=Eden()),
    RandomK(fraction=0.3, error_feedback=True),
    Threshold(threshold=1.0),
    Threshold(threshold=1.0, values=UniformQuantiser(bits=4)),
    Qsgd(),
    Qsgd(bits=2, bucket=64),
    Qsgd(bits=8),
    UniformQuantiser(bits=1),
    UniformQuantiser(bits=8),
    UniformQuantiser(bits=12),
    Sign(),
    Ternary(),
    *(Eden(bits=bits) for bits in (1, 2, 3, 4)),
    Eden(scale="least_error"),
    Dithered(),
    Dithered(step=0.05),
    DeadZone(),
    DeadZone(step=0.01, error_feedback=True),
    TopK(fraction=0.1, values=DeadZone(step=0.5)),
    LowRank(rank=1),
    LowRank(rank=4),
    ByteBudget(update_bytes=500),
    ByteBudget(update_bytes=120, error_feedback=True),
]
FIXED_LENGTH = [NoCompression()]  # of which one frame tells the length of all
UNBIASED = [rule for rule in CASES if rule.unbiased]


@pytest.mark.parametrize("rule", CASES, ids=repr)
class TestCompressionRule:
    @pytest.mark.parametrize("shapes", [((1,),), ((2,),), ((1, 1), (5,)), ((40, 25),), SHAPES])
    @pytest.mark.parametrize("num_updates", [1, 3])
    def test_there_and_back(self, rule: CompressionRule, shapes: Any, num_updates: int) -> None:
        what = context(num_updates, shapes=shapes)
        deltas_ND = np.random.default_rng(0).standard_normal((num_updates, what.num_parameters)).astype(np.float32)
        before = deltas_ND.tobytes()
        found_ND, frames = through_frames(rule, deltas_ND, what)
        assert (found_ND.dtype, found_ND.shape) == (np.float32, deltas_ND.shape)
        assert np.isfinite(found_ND).all()
        assert deltas_ND.tobytes() == before
        assert there_and_back(rule, deltas_ND, what).tobytes() == found_ND.tobytes()
        assert through_frames(rule, deltas_ND, what)[1] == frames  # equal updates, equal bytes

    def test_what_becomes_of_one_does_not_depend_on_the_others(self, rule: CompressionRule) -> None:
        deltas_ND = np.stack([update(), 100 * update(layers), update(sparse(3))])
        together_ND = there_and_back(rule, deltas_ND, context(3))
        for row, delta_D in enumerate(deltas_ND):
            alone_D = there_and_back(rule, delta_D[None], context(3).of([row]))[0]
            # Matrix products may differ in their last bits, and then a symbol here and there.
            assert squares(alone_D - together_ND[row]) <= 1e-4 * squares(delta_D)

    def test_zeros_stay_zeros(self, rule: CompressionRule) -> None:
        assert not there_and_back(rule, np.zeros((2, SIZE), np.float32), context(2)).any()

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
    def test_what_is_not_finite_is_no_error_here_and_harms_no_other(self, rule: CompressionRule, value: float) -> None:
        """The server refuses it by its norm."""
        bad_D = update()
        bad_D[:] = value
        found_ND = there_and_back(rule, np.stack([bad_D, update()]), context(2))
        assert not np.isfinite(found_ND[0]).all() or np.abs(found_ND[0]).max() > 1e30
        assert np.isfinite(found_ND[1]).all()

    def test_it_is_never_longer_than_the_server_reads(self, rule: CompressionRule) -> None:
        for size in (1, 5, 1000):
            what = context(shapes=((size,),))
            (payload,) = rule.compress(update(size=size)[None], what)
            # The longest id: 100 letters outside the basic plane, each of which JSON escapes twice.
            frame = encode_update(Update("\U0001d49c" * 100, "ab" * 32, ("delta",), payload))
            assert len(frame) <= max_update_bytes(size)

    def test_a_payload_that_stands_for_no_update(self, rule: CompressionRule) -> None:
        (good,) = rule.compress(update()[None], context())
        hostile: list[Payload] = [
            {},
            {**good, "more": np.zeros(5, np.float32)},
            {f"{name}o": part for name, part in good.items()},
            {f"\x1b[31m{number}" * 50: np.zeros(5, np.float32) for number in range(100)},
        ]
        for name, part in good.items():
            for wrong in wrong_parts(part):
                hostile.append({**good, name: wrong})
        for payload in hostile:
            with pytest.raises(UpdateRejected) as caught:
                rule.check(payload, context())
            reason, _, rest = caught.value.message.partition(": ")
            assert reason in ("wrong_tensors", "wrong_shape")
            assert rest.isprintable()
            assert len(caught.value.message) <= 240


def wrong_parts(part: Any) -> list[Any]:
    if isinstance(part, Symbols):
        return [
            Symbols(part.values[:-1] if len(part.values) else np.zeros(1, np.uint8), part.bits),
            part.values,
            Indices(np.arange(len(part.values)), len(part.values)),
        ]
    if isinstance(part, Indices):
        return [Indices(part.positions, part.bound + 1), Indices(part.positions[:0], part.bound), part.positions]
    return [
        part[:-1] if len(part) else np.zeros(1, np.float32),
        part.astype(np.float64),
        part[None],
        Symbols(np.zeros(len(part), np.uint8), 1),
    ]


@pytest.mark.parametrize("rule", UNBIASED, ids=repr)
@pytest.mark.parametrize(
    "vector",
    [normal, sparse(2), *(pytest.param(vector, marks=pytest.mark.ci) for vector in (layers, sparse(1), sparse(10)))],
)
def test_unbiased_rules_are_right_on_average(rule: CompressionRule, vector: Vector) -> None:
    """The mean of many is as far from the truth as chance alone would have it, E|mean - x|^2 = E|error|^2 / many, give
    or take six deviations of a sum of so many squares as there are coordinates that matter. A bias of a tenth of what
    one error comes to would show."""
    many, delta_D = 800, update(vector)
    mean_D, error_D = np.zeros(SIZE), np.zeros(SIZE)
    for what in batches(rule, many):
        found_ND = there_and_back(rule, np.tile(delta_D, (len(what.seeds), 1)), what).astype(np.float64)
        mean_D += found_ND.sum(0) / many
        error_D += np.square(found_ND - delta_D).sum(0) / many
    if squares(error_D) == 0:
        return
    matter = error_D.sum() ** 2 / squares(error_D)
    rounding = 1e-12 * squares(delta_D)
    assert squares(mean_D - delta_D) <= (1 + 6 * (2 / matter) ** 0.5) * error_D.sum() / many + rounding


SHORT_UNBIASED: list[CompressionRule] = [
    Qsgd(bits=2),
    Qsgd(bits=4),
    Ternary(),
    UniformQuantiser(bits=1),
    UniformQuantiser(bits=8),
    Dithered(),
    *(Eden(bits=bits) for bits in (1, 2, 3, 4)),
    RandomK(fraction=0.1, values=Eden(bits=2)),
    RandomK(fraction=0.3),
    ByteBudget(update_bytes=64),
]


def short(size: int, number: int) -> Any:
    """Vectors with which signs and a Hadamard transform of a few numbers have a bias."""
    found = {
        0: np.r_[1.0, -0.3, np.zeros(size)][:size],
        1: np.ones(size),
        2: np.arange(1, size + 1) / size,
        3: np.random.default_rng(size).standard_normal(size),
    }
    return found[number].astype(np.float32)


def check_unbiased(rule: CompressionRule, delta_D: Any, many: int) -> None:
    """The squared distance of the mean from the truth is below what it exceeds by chance once in a million tests: with
    S the covariance of what is decoded, (tr S + 2 sqrt(14 tr S^2) + 28 |S|) / many (Laurent and Massart 2000, lemma 1,
    for sums of many draws). A mean squared error of .57 spread over 16 numbers shows a bias of .03 in 1,500 draws."""
    error_ND = np.concatenate(
        [
            there_and_back(rule, np.tile(delta_D, (len(what.seeds), 1)), what) - delta_D
            for first in range(0, many, 500)
            for what in [context(min(500, many - first), first_seed=first, shapes=((len(delta_D),),))]
        ]
    ).astype(np.float64)
    mean_D = error_ND.mean(0)
    variances = np.linalg.eigvalsh(np.cov(error_ND, rowvar=False).reshape(len(delta_D), -1)).clip(0)
    chance = variances.sum() + 2 * (14 * squares(variances)) ** 0.5 + 28 * variances.max()
    assert squares(mean_D) <= chance / many + 1e-12 * squares(delta_D)


@pytest.mark.parametrize("rule", SHORT_UNBIASED, ids=repr)
def test_unbiased_rules_are_right_on_average_at_any_length(rule: CompressionRule) -> None:
    """By the smallest inputs, at which few rotations are no uniformly random one; all lengths in the slow tier."""
    for size, number in ((1, 1), (2, 1), (3, 3), (5, 3), (7, 2)):
        check_unbiased(rule, short(size, number), many=300)
    if isinstance(rule, Eden) and rule.bits == 1:
        for size, number in ((16, 1), (28, 0)):
            check_unbiased(rule, short(size, number), many=1500)


@pytest.mark.slow
@pytest.mark.parametrize("rule", SHORT_UNBIASED, ids=repr)
def test_unbiased_rules_are_right_on_average_at_every_length(rule: CompressionRule) -> None:
    for size in range(1, 65):
        check_unbiased(rule, short(size, size % 4), many=2000)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("size", [2, 3, 7, 16, 28, 64, 100, 128, 129, 256, 512, 513])
def test_eden_has_no_bias_that_40_000_draws_would_show(size: int, bits: int) -> None:
    """At 513 numbers: also of the last two, around the middle of a block that zeros fill up."""
    for number in range(3):
        check_unbiased(Eden(bits=bits), short(size, number), many=40_000)
    if size == 513:
        check_unbiased(Eden(bits=bits), short(size, 0)[::-1].copy(), many=40_000)


def test_short_blocks_are_rotated_uniformly() -> None:
    """Of a uniformly random orthogonal matrix R of d numbers E R_ij^2 = 1/d, E R_ij^4 = 3 / (d (d + 2)), E tr R = 0,
    E (tr R)^2 = E tr R^2 = 1 and E det R = 0 (Diaconis and Shahshahani 1994)."""
    many, size = 1000, 4
    what = context(many, shapes=((size,),))
    axes = [np.tile(np.eye(size, dtype=np.float32)[axis], (many, 1)) for axis in range(size)]
    found = np.stack([rotate(axis, size, what)[:, 0] for axis in axes], axis=2).astype(np.float64)
    assert np.allclose(found @ found.transpose(0, 2, 1), np.eye(size), atol=1e-6)
    traces = np.trace(found, axis1=1, axis2=2)
    means = [
        np.linalg.det(found).mean(),
        traces.mean(),
        np.square(traces).mean(),
        (found @ found).trace(axis1=1, axis2=2).mean(),
    ]
    assert means == pytest.approx([0, 0, 1, 1], abs=0.2)
    assert np.square(found).mean(0) == pytest.approx(np.full((size, size), 1 / size), abs=0.04)
    assert (found**4).mean(0) == pytest.approx(np.full((size, size), 3 / (size * (size + 2))), abs=0.04)
    for block in (128, 256, 4096):
        values = update(size=block)[None]
        rotated = rotate(values, block, context(1, shapes=((block,),)))
        assert squares(rotated.ravel()) == pytest.approx(squares(values[0]), rel=1e-5)
        assert np.allclose(rotate_back(rotated, block, context(1, shapes=((block,),))), values, atol=1e-5)


def batches(rule: CompressionRule, many: int) -> list[CodecContext]:
    """Draws for so many updates; where all of a round share some, one update a round."""
    size = 1 if shares(rule) else 200
    return [context(size, first_seed=first) for first in range(0, many, size)]


def shares(rule: CompressionRule) -> bool:
    return isinstance(rule, RandomK) and rule.mask == "shared"


class TestLengths:
    @pytest.mark.parametrize("rule", FIXED_LENGTH, ids=repr)
    @given(
        bits=hnp.arrays(np.uint32, st.integers(1, 40), elements=st.integers(0, 2**32 - 1)), number=st.integers(0, 9999)
    )
    def test_the_length_of_a_frame_does_not_depend_on_its_content(
        self, rule: CompressionRule, bits: Any, number: int
    ) -> None:
        what = context(shapes=((len(bits),),))

        def frame(delta_D: Any, client_id: str) -> bytes:
            return encode_update(Update(client_id, "ab" * 32, ("delta",), rule.compress(delta_D[None], what)[0]))

        zeros = frame(np.zeros(len(bits), np.float32), "client-0001")
        assert len(frame(bits.view(np.float32), f"client-{number:04d}")) == len(zeros)

    @given(bits=hnp.arrays(np.uint32, st.integers(1, 40), elements=st.integers(0, 2**32 - 1)))
    def test_no_compression_keeps_every_bit(self, bits: Any) -> None:
        delta_D = bits.view(np.float32)  # denormals, -0.0, infinities, and NaN with every payload
        found_ND, _ = through_frames(NoCompression(), delta_D[None], context(shapes=((len(bits),),)))
        assert found_ND.tobytes() == delta_D.tobytes()

    @pytest.mark.parametrize(
        ("rule", "bits"),
        [
            (NoCompression(), 32.0),
            (TopK(values=Sign(bucket=2000)), 0.0908),  # H(.01) + .01: what a random set and its signs cost
            (Eden(bits=1), 1.0),
            (Eden(bits=4), 4.0),
            (Sign(), 1.0 + 32 / 512),
            (Qsgd(bits=8), 8.0 + 32 / 512),
            (RandomK(fraction=0.1), 3.2),
        ],
        ids=repr,
    )
    def test_bits_of_a_parameter(self, rule: CompressionRule, bits: float) -> None:
        """At most a tenth more than the ideal, header included, with 199,210 parameters."""
        delta_D = update(size=199_210)
        _, (frame,) = through_frames(rule, delta_D[None], context(shapes=((199_210,),)))
        assert 8 * len(frame) / 199_210 <= 1.1 * bits

    @given(size=st.integers(1, 5000), update_bytes=st.integers(64, 4000), error_feedback=st.booleans())
    def test_a_byte_budget_is_kept(self, size: int, update_bytes: int, error_feedback: bool) -> None:
        rule = ByteBudget(update_bytes=update_bytes, error_feedback=error_feedback)
        delta_D, what = update(layers, size), context(shapes=((size,),))
        _, (frame,) = through_frames(rule, delta_D[None], what)
        assert len(frame) <= update_bytes + 400
        try:
            rule.check_size(size)
        except ValueError as error:
            assert f"compression.update_bytes is {update_bytes}, and an update of {size} parameters takes" in str(error)
        else:
            bits = rule.compress(delta_D[None], what)[0]["bits"].values  # type: ignore[union-attr]
            assert error_feedback or bits.all()


class TestFields:
    @pytest.mark.parametrize("rule", [Qsgd, Ternary, UniformQuantiser, Eden, Dithered, NoCompression, RandomK])
    def test_error_feedback_of_what_is_right_on_average(self, rule: type[CompressionRule]) -> None:
        if rule is RandomK:  # it stays unscaled, and so biased
            assert not RandomK(error_feedback=True).unbiased
            return
        with pytest.raises(ValidationError, match="loses nothing on average"):
            rule(error_feedback=True)

    def test_error_feedback_inside(self) -> None:
        with pytest.raises(ValidationError, match="belongs to the outermost rule"):
            TopK(values=Sign(error_feedback=True))

    def test_a_sparsifier_of_biased_values_is_biased(self) -> None:
        assert RandomK(values=Qsgd()).unbiased and not RandomK(values=Sign()).unbiased

    @pytest.mark.parametrize("fields", [{"fraction": 0}, {"fraction": 1.5}, {"fraction": True}, {"k": 3}])
    def test_bad_fields(self, fields: dict[str, Any]) -> None:
        with pytest.raises(ValidationError):
            TopK(**fields)
