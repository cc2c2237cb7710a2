"""The values that are kept: what was written is read back bit for bit, and equal values are equal bytes."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedrounds.fl_components.errors import StoreError
from fedrounds.fl_components.rejections import Rejection, RejectionCode
from fedrounds.fl_components.values import (
    Accumulator,
    CohortStatistics,
    RoundPlan,
    SealedCohort,
    ServerState,
    Weighted,
    pack,
    unpack,
)

SPECIAL = np.array([0.0, -0.0, np.nan, -np.nan, np.inf, -np.inf, 1e-45, -1e-40, 3.4e38], np.float32)
QUIET_AND_SIGNALLING = np.array([0x7FC00001, 0xFFC12345, 0x7F800001], np.uint32).view(np.float32)

floats = st.floats(allow_nan=False)


def same_bits(a: Any, b: Any) -> bool:
    return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())


class TestPack:
    @given(
        tensors=st.dictionaries(
            st.text(min_size=1, max_size=5).filter(lambda name: name != "__metadata__" and name.isprintable()),
            hnp.arrays(
                st.sampled_from([np.float32, np.float64, np.int64, np.uint8, np.bool_]),
                hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
            ),
            max_size=4,
        ),
        header=st.dictionaries(
            st.text(max_size=5), st.none() | st.booleans() | st.integers() | floats | st.text(), max_size=4
        ),
    )
    def test_round_trip(self, tensors: dict[str, Any], header: dict[str, Any]) -> None:
        data = pack(tensors, header)
        found, found_header = unpack(data)
        assert found_header == header
        assert found.keys() == tensors.keys()
        assert all(same_bits(found[name], tensors[name]) for name in tensors)
        assert pack(dict(reversed(tensors.items())), dict(reversed(header.items()))) == data

    def test_every_bit_of_a_float(self) -> None:
        for array in (SPECIAL, QUIET_AND_SIGNALLING, SPECIAL[::2], np.asfortranarray(SPECIAL.reshape(3, 3))):
            assert same_bits(unpack(pack({"x": array}, {}))[0]["x"], array)

    def test_bytes_of_another_order_are_the_same_values(self) -> None:
        assert np.array_equal(unpack(pack({"x": np.array([1.5, 2.0], ">f4")}, {}))[0]["x"], [1.5, 2.0])

    @pytest.mark.parametrize(
        "data", [b"", b"1234567", b"\xff" * 8, b"\xff" * 100, b"\2" + b"\0" * 7 + b"{}", b"PK\3\4"]
    )
    def test_not_a_checkpoint(self, data: bytes) -> None:
        with pytest.raises(StoreError, match="not a checkpoint of fedrounds"):
            unpack(data)

    @pytest.mark.parametrize("header", ["[" * 100_000, "9" * 5000, "[]", "3", "null", "", "{", '"text"'])
    def test_a_header_that_is_none(self, header: str) -> None:
        outer = json.dumps({"__metadata__": {"fedrounds": header}}).encode()
        with pytest.raises(StoreError, match="not a checkpoint of fedrounds"):
            unpack(len(outer).to_bytes(8, "little") + outer)

    def test_tensors_without_a_header(self) -> None:
        outer = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        with pytest.raises(StoreError, match="not a checkpoint of fedrounds"):
            unpack(len(outer).to_bytes(8, "little") + outer + bytes(4))


PARTS = ("server_optimizer", "aggregator", "channels", "clipping", "broadcast")


class TestServerState:
    def test_round_trip(self) -> None:
        state = ServerState(7, SPECIAL, {"m": QUIET_AND_SIGNALLING, "v": np.zeros(0, np.float32)}, "ab" * 32)
        data = state.to_bytes()
        found = ServerState.from_bytes(data)
        assert (found.round, found.config_digest, found.params_digest) == (7, "ab" * 32, state.params_digest)
        assert same_bits(found.params_D, SPECIAL)
        assert found.server_optimizer.keys() == {"m", "v"}
        assert same_bits(found.server_optimizer["m"], QUIET_AND_SIGNALLING)
        assert found.to_bytes() == data

    def test_every_part_is_kept(self) -> None:
        parts = {name: {"x": np.full(2, number, np.float32)} for number, name in enumerate(PARTS)}
        state = ServerState(1, np.zeros(2, np.float32), config_digest="", **parts)
        found = ServerState.from_bytes(state.to_bytes())
        assert {name: getattr(found, name)["x"].tolist() for name in PARTS} == {
            name: [number, number] for number, name in enumerate(PARTS)
        }

    def test_a_tensor_of_the_optimiser_may_be_called_params(self) -> None:
        state = ServerState(1, np.zeros(2, np.float32), {"params": np.ones(2, np.float32)}, "")
        found = ServerState.from_bytes(state.to_bytes())
        assert found.params_D.tolist() == [0, 0]
        assert found.server_optimizer["params"].tolist() == [1, 1]


class TestSealedCohort:
    @given(
        rejected=st.dictionaries(
            st.text(), st.builds(Rejection, st.sampled_from(RejectionCode), st.text()), max_size=3
        ),
        loss=st.tuples(floats, floats),
        seconds=st.dictionaries(st.sampled_from(["train", "admit"]), floats),
        counts=st.tuples(*[st.integers(0, 2**62)] * 4),
    )
    def test_round_trip(self, rejected: Any, loss: Any, seconds: Any, counts: Any) -> None:
        count, selected, upload_bytes, download_bytes = counts
        tensors = {"aggregate": np.array([1e-320, -0.0, 0.1]), "state.m": np.array([3.0])}
        statistics = CohortStatistics(
            received=count,
            train_loss=Weighted(*loss),
            compression_error=Weighted(*loss),
            client_states={client: "r/000001/ab" for client in rejected},
            selected=selected,
            rejected=rejected,
            upload_bytes=upload_bytes,
            download_bytes=download_bytes,
            largest_bytes=count,
            slowest_s=loss[0],
            seconds=seconds,
        )
        data = SealedCohort(tensors, statistics).to_bytes()
        cohort = SealedCohort.from_bytes(data)
        found = cohort.statistics
        assert cohort.to_bytes() == data
        assert (found.received, found.train_loss, found.rejected) == (count, Weighted(*loss), rejected)
        assert (found.selected, found.upload_bytes, found.download_bytes) == (selected, upload_bytes, download_bytes)
        assert (found.seconds, found.slowest_s, found.largest_bytes) == (seconds, loss[0], count)
        assert found.client_states == statistics.client_states and found.compression_error == Weighted(*loss)
        assert same_bits(cohort.tensors["aggregate"], tensors["aggregate"])
        assert cohort.aggregator_state == {"m": np.array([3.0])}

    def test_a_loss_that_is_not_finite(self) -> None:
        cohort = SealedCohort({}, CohortStatistics(train_loss=Weighted(float("nan"), 3.0)))
        assert np.isnan(SealedCohort.from_bytes(cohort.to_bytes()).statistics.train_loss.mean)


def test_weighted_adds() -> None:
    total = sum((Weighted(x * w, w) for x, w in ((1.0, 1.0), (4.0, 2.0))), Weighted())
    assert (total.mean, total.weight) == (3.0, 3.0)
    assert np.isnan(Weighted().mean)


def test_values_are_frozen() -> None:
    plan = RoundPlan("r", 1, "d", 0, (), (), (), 1)
    for value, name in (
        (plan, "round"),
        (Weighted(), "total"),
        (Accumulator({}), "count"),
        (SealedCohort({}), "tensors"),
        (CohortStatistics(), "selected"),
    ):
        with pytest.raises(FrozenInstanceError):
            setattr(value, name, 2)
