"""What every compression rule promises; a new rule is one line in CASES."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fl_components.compression import CompressionRule, NoCompression
from fl_components.errors import UpdateRejected
from fl_components.wire import Update, decode_update, encode_update, max_update_bytes

CASES = [NoCompression()]
FIXED_LENGTH = [NoCompression()]  # of which one frame tells the length of all
LOSSLESS = [NoCompression()]

# Any 32 bits: denormals, -0.0, infinities, and NaN with every payload.
bits = hnp.arrays(np.uint32, st.integers(1, 40), elements=st.integers(0, 2**32 - 1))


def frame(rule: CompressionRule, delta_D: Any, client_id: str = "client-0001") -> bytes:
    return encode_update(Update(client_id, "ab" * 32, rule.compress(delta_D)))


@pytest.mark.parametrize("rule", CASES, ids=repr)
class TestCompressionRule:
    @pytest.mark.parametrize("num_parameters", [1, 2, 7, 1000])
    def test_there_and_back(self, rule: CompressionRule, num_parameters: int) -> None:
        delta_D = np.random.default_rng(0).standard_normal(num_parameters).astype(np.float32)
        before = delta_D.tobytes()
        found_D = rule.decompress(rule.compress(delta_D), num_parameters)
        assert (found_D.dtype, found_D.shape) == (np.float32, (num_parameters,))
        assert delta_D.tobytes() == before

    def test_it_is_never_longer_than_the_server_reads(self, rule: CompressionRule) -> None:
        for num_parameters in (1, 5, 1000):
            # The longest id: 100 letters outside the basic plane, each of which JSON escapes twice.
            assert len(frame(rule, np.ones(num_parameters, np.float32), "\U0001d49c" * 100)) <= max_update_bytes(
                num_parameters
            )

    @pytest.mark.parametrize(
        "tensors",
        [
            {},
            {"delta": np.zeros(4, np.float32)},
            {"delta": np.zeros(0, np.float32)},
            {"delta": np.zeros((5, 1), np.float32)},
            {"delta": np.zeros((), np.float32)},
            {"delta": np.zeros(5, np.float64)},
            {"delta": np.zeros(5, np.int32)},
            {"delta": np.zeros(5, np.float32), "more": np.zeros(5, np.float32)},
            {"delto": np.zeros(5, np.float32)},
            {f"\x1b[31m{number}" * 50: np.zeros(5, np.float32) for number in range(100)},
        ],
    )
    def test_tensors_that_stand_for_no_update(self, rule: CompressionRule, tensors: dict[str, Any]) -> None:
        with pytest.raises(UpdateRejected) as caught:
            rule.decompress(tensors, 5)
        reason, _, rest = caught.value.message.partition(": ")
        assert reason in ("wrong_tensors", "wrong_shape")
        assert rest.isprintable()
        assert len(rest) <= 200


@pytest.mark.parametrize("rule", LOSSLESS, ids=repr)
@given(bits=bits)
def test_lossless_rules_keep_every_bit(rule: CompressionRule, bits: Any) -> None:
    delta_D = bits.view(np.float32)
    found = decode_update(frame(rule, delta_D), max_update_bytes(len(delta_D)))
    assert rule.decompress(found.tensors, len(delta_D)).tobytes() == delta_D.tobytes()


@pytest.mark.parametrize("rule", FIXED_LENGTH, ids=repr)
@given(bits=bits, number=st.integers(0, 9999))
def test_the_length_of_a_frame_does_not_depend_on_its_content(rule: CompressionRule, bits: Any, number: int) -> None:
    zeros = frame(rule, np.zeros(len(bits), np.float32))
    assert len(frame(rule, bits.view(np.float32), f"client-{number:04d}")) == len(zeros)
