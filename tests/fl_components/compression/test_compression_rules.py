"""What every compression rule promises; a new rule is one line in CASES."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import ValidationError

from fl_components.compression import (
    ByteBudget,
    CompressionRule,
    DeadZone,
    Dithered,
    Eden,
    Known,
    LowRank,
    NoCompression,
    Qsgd,
    RandomK,
    Sign,
    Ternary,
    Threshold,
    TopK,
    Uniform,
)
from fl_components.errors import UpdateRejected
from fl_components.values import Indices, Payload, Symbols
from fl_components.wire import Update, encode_update, max_update_bytes
from tests.fl_components.compression.samples import (
    SHAPES,
    SIZE,
    Vector,
    known,
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
    Threshold(threshold=1.0, values=Uniform(bits=4)),
    Qsgd(),
    Qsgd(bits=2, bucket=64),
    Qsgd(bits=8),
    Uniform(bits=1),
    Uniform(bits=8),
    Uniform(bits=12),
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
        what = known(num_updates, shapes=shapes)
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
        together_ND = there_and_back(rule, deltas_ND, known(3))
        for row, delta_D in enumerate(deltas_ND):
            alone_D = there_and_back(rule, delta_D[None], known(3).of([row]))[0]
            # Matrix products may differ in their last bits, and then a symbol here and there.
            assert squares(alone_D - together_ND[row]) <= 1e-4 * squares(delta_D)

    def test_zeros_stay_zeros(self, rule: CompressionRule) -> None:
        assert not there_and_back(rule, np.zeros((2, SIZE), np.float32), known(2)).any()

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
    def test_what_is_not_finite_is_no_error_here_and_harms_no_other(self, rule: CompressionRule, value: float) -> None:
        """The server refuses it by its norm."""
        bad_D = update()
        bad_D[:] = value
        found_ND = there_and_back(rule, np.stack([bad_D, update()]), known(2))
        assert not np.isfinite(found_ND[0]).all() or np.abs(found_ND[0]).max() > 1e30
        assert np.isfinite(found_ND[1]).all()

    def test_it_is_never_longer_than_the_server_reads(self, rule: CompressionRule) -> None:
        for size in (1, 5, 1000):
            what = known(shapes=((size,),))
            (payload,) = rule.compress(update(size=size)[None], what)
            # The longest id: 100 letters outside the basic plane, each of which JSON escapes twice.
            frame = encode_update(Update("\U0001d49c" * 100, "ab" * 32, payload))
            assert len(frame) <= max_update_bytes(size)

    def test_a_payload_that_stands_for_no_update(self, rule: CompressionRule) -> None:
        (good,) = rule.compress(update()[None], known())
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
                rule.check(payload, known())
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


def batches(rule: CompressionRule, many: int) -> list[Known]:
    """Draws for so many updates; where all of a round share some, one update a round."""
    size = 1 if shares(rule) else 200
    return [known(size, first_seed=first) for first in range(0, many, size)]


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
        what = known(shapes=((len(bits),),))

        def frame(delta_D: Any, client_id: str) -> bytes:
            return encode_update(Update(client_id, "ab" * 32, rule.compress(delta_D[None], what)[0]))

        zeros = frame(np.zeros(len(bits), np.float32), "client-0001")
        assert len(frame(bits.view(np.float32), f"client-{number:04d}")) == len(zeros)

    @given(bits=hnp.arrays(np.uint32, st.integers(1, 40), elements=st.integers(0, 2**32 - 1)))
    def test_no_compression_keeps_every_bit(self, bits: Any) -> None:
        delta_D = bits.view(np.float32)  # denormals, -0.0, infinities, and NaN with every payload
        found_ND, _ = through_frames(NoCompression(), delta_D[None], known(shapes=((len(bits),),)))
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
        _, (frame,) = through_frames(rule, delta_D[None], known(shapes=((199_210,),)))
        assert 8 * len(frame) / 199_210 <= 1.1 * bits

    @given(size=st.integers(1, 5000), update_bytes=st.integers(64, 4000), error_feedback=st.booleans())
    def test_a_byte_budget_is_kept(self, size: int, update_bytes: int, error_feedback: bool) -> None:
        rule = ByteBudget(update_bytes=update_bytes, error_feedback=error_feedback)
        delta_D, what = update(layers, size), known(shapes=((size,),))
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
    @pytest.mark.parametrize("rule", [Qsgd, Ternary, Uniform, Eden, Dithered, NoCompression, RandomK])
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
