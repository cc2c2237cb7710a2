"""The server trusts no update: every reason of refusal, through real frames."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedrounds.fl_components.admission import Admission, RoundAdmission
from fedrounds.fl_components.arrays import Indices, Symbols
from fedrounds.fl_components.errors import UpdateRejected
from fedrounds.fl_components.executors import map_inline
from fedrounds.fl_components.layout import Layout
from fedrounds.fl_components.server import stages
from fedrounds.fl_components.server.encoding import Codec
from fedrounds.fl_components.server.run import Run
from fedrounds.fl_components.values import EncodedBatch, RoundPlan, ServerState, Weighted
from fedrounds.fl_components.wire import Update, encode_update, max_update_bytes

from .conftest import Single, StartRun

CLIENT = "client-0003"


@pytest.fixture
def run(start_run: StartRun) -> Run:
    return start_run(admission={"max_update_norm": 10.0})


@pytest.fixture
def state(run: Run) -> ServerState:
    return stages.load(run, 1)


@pytest.fixture
def plan(run: Run, state: ServerState) -> RoundPlan:
    return stages.authorise(run, stages.select(run, state, stages.broadcast(run, state)))


def check_update(run: Run, plan: RoundPlan, client_id: str, frame: bytes) -> Any:
    (task,) = (each for each in plan.cohort if each.client_id == client_id)
    (delta_D,), refused = run.codec(plan).decode(plan, [task], [frame], run.federation.admission(plan))
    if refused:
        raise UpdateRejected(refused[0])
    return delta_D


def small(run: Run) -> Any:
    return np.full(run.federation.num_parameters, 0.01, np.float32)


def with_value(delta_D: Any, value: float, position: int = 100) -> Any:
    delta_D = delta_D.copy()
    delta_D[position] = value
    return delta_D


def sent(run: Run, plan: RoundPlan, **changes: Any) -> bytes:
    update = Update(CLIENT, plan.base_digest, ("delta",), {"values": small(run)})
    return encode_update(replace(update, **changes))


CASES: list[tuple[str, Callable[[Run, RoundPlan], bytes]]] = [
    ("not_finite", lambda run, plan: sent(run, plan, parts={"values": with_value(small(run), np.nan)})),
    ("not_finite", lambda run, plan: sent(run, plan, parts={"values": with_value(small(run), np.inf, 0)})),
    ("not_finite", lambda run, plan: sent(run, plan, parts={"values": with_value(small(run), -np.inf, -1)})),
    ("norm_too_large", lambda run, plan: sent(run, plan, parts={"values": with_value(small(run), 10.1)})),
    ("norm_too_large", lambda run, plan: sent(run, plan, parts={"values": np.full_like(small(run), 3e38)})),
    ("wrong_shape", lambda run, plan: sent(run, plan, parts={"values": small(run)[:-1]})),
    ("wrong_shape", lambda run, plan: sent(run, plan, parts={"values": small(run)[:, None]})),
    ("wrong_shape", lambda run, plan: sent(run, plan, parts={"values": small(run).astype(np.float16)})),
    ("wrong_tensors", lambda run, plan: sent(run, plan, parts={"delto": small(run)})),
    ("wrong_tensors", lambda run, plan: sent(run, plan, parts={})),
    ("wrong_tensors", lambda run, plan: sent(run, plan, channels=("delta", "control"))),
    ("wrong_shape", lambda run, plan: sent(run, plan, parts={"values": Symbols(np.zeros(9, np.uint8), 8)})),
    ("wrong_shape", lambda run, plan: sent(run, plan, parts={"values": Indices(np.arange(9), 9)})),
    ("stale_base", lambda run, plan: sent(run, plan, base_digest="0" * 64)),
    ("undecodable", lambda run, plan: sent(run, plan, base_digest="")),
    ("undecodable", lambda run, plan: sent(run, plan, base_digest="\ud800\x1b[31m" * 100)),
    ("wrong_client", lambda run, plan: sent(run, plan, client_id="client-0004")),
    ("wrong_client", lambda run, plan: sent(run, plan, client_id="\ud800\n\x1b[31m" * 100)),
    ("undecodable", lambda run, plan: sent(run, plan)[:-1]),
    ("undecodable", lambda run, plan: b""),
    ("undecodable", lambda run, plan: b"PK\x03\x04" * 50),
    ("too_large", lambda run, plan: bytes(max_update_bytes(run.federation.num_parameters) + 1)),
    ("too_large", lambda run, plan: sent(run, plan, parts={"values": small(run).repeat(9)})),
]


def test_a_good_update_is_taken_bit_for_bit(run: Run, plan: RoundPlan) -> None:
    delta_D = with_value(small(run), -0.0)
    found_D = check_update(run, plan, CLIENT, sent(run, plan, parts={"values": delta_D}))
    assert found_D.tobytes() == delta_D.tobytes()


def test_the_limit_itself_is_allowed(run: Run, plan: RoundPlan) -> None:
    delta_D = with_value(np.zeros_like(small(run)), 10.0)
    assert check_update(run, plan, CLIENT, sent(run, plan, parts={"values": delta_D}))[100] == 10


@pytest.mark.parametrize("size", [1, 1000, 199_210, 3_000_000])
@pytest.mark.parametrize("scale", [1e-22, 1e-18, 1.0, 1e16])  # of the first no square is a float32
def test_the_limit_is_held_to_the_last_digits(run: Run, plan: RoundPlan, size: int, scale: float) -> None:
    """However many numbers there are, and however rounding goes where a quick look at the norm is enough."""
    codec, task = replace(run.codec(plan), layout=Layout(("delta",), ((size,),))), plan.cohort[0]
    delta_D = (scale * np.random.default_rng(size).standard_normal(size)).astype(np.float32)
    norm = float(np.linalg.norm(delta_D.astype(np.float64)))
    frame = encode_update(Update(task.client_id, plan.base_digest, ("delta",), {"values": delta_D}))
    for limit, refused in ((norm * (1 + 1e-9), False), (norm * (1 - 1e-9), True)):
        reasons = codec.decode(plan, [task], [frame], RoundAdmission(Admission(max_update_norm=limit)))[1]
        assert bool(reasons) == refused


@pytest.mark.parametrize(("reason", "frame"), CASES, ids=[f"{number}-{case[0]}" for number, case in enumerate(CASES)])
def test_an_update_that_is_refused(
    run: Run, plan: RoundPlan, reason: str, frame: Callable[[Run, RoundPlan], bytes]
) -> None:
    with pytest.raises(UpdateRejected) as caught:
        check_update(run, plan, CLIENT, frame(run, plan))
    found, _, explanation = caught.value.message.partition(": ")
    assert found == reason
    assert explanation
    assert len(caught.value.message) < 1500  # it is kept, logged and printed, whatever the client wrote
    assert caught.value.message.isprintable()
    assert json.loads(json.dumps(caught.value.message)) == caught.value.message


def test_what_cannot_be_decoded_is_zeros_whatever_was_there(run: Run, plan: RoundPlan) -> None:
    def in_used_memory(function: Any, rows_ND: Any, *columns: Any, **how: Any) -> Any:
        rows_ND[:] = np.nan
        return map_inline(function, rows_ND, *columns, **how)

    (task,) = (each for each in plan.cohort if each.client_id == CLIENT)
    frames = [sent(run, plan), b"", sent(run, plan, base_digest="0" * 64)]
    codec = replace(run.codec(plan), rule=Single())
    deltas_ND, refused = codec.decode(plan, [task] * 3, frames, run.federation.admission(plan), in_used_memory)
    assert list(refused) == [1, 2]
    assert np.array_equal(deltas_ND, [small(run), 0 * small(run), 0 * small(run)])


def test_every_reason_is_named_where_it_is_promised() -> None:
    promised = Codec.decode.__doc__ or ""
    assert all(reason in promised for reason, _ in CASES)


def test_refusals_of_a_wave_are_kept_with_their_reasons(run: Run, plan: RoundPlan) -> None:
    client_ids = tuple(task.client_id for task in plan.cohort)
    frames = [sent(run, plan, client_id=client_id) for client_id in client_ids]
    frames[0] = b"junk"
    frames[3] = sent(run, plan, parts={"values": with_value(small(run), np.nan)})
    frames[8] = frames[7]  # a copy of another client's update
    losses = tuple(Weighted(float(index), 1.0) for index in range(9))
    collection = stages.admit(run, plan, EncodedBatch(client_ids, tuple(frames), losses), None)
    collected = collection.statistics
    assert {client: rejection.code for client, rejection in collected.rejected.items()} == {
        "client-0000": "undecodable",
        "client-0003": "not_finite",
        "client-0008": "wrong_client",
    }
    assert (collected.selected, collected.received) == (9, 6)
    assert collected.upload_bytes == sum(map(len, frames))  # what was refused was sent all the same
    assert collected.download_bytes == 9 * plan.download_bytes
    assert collected.train_loss.weight == 6
    assert collected.train_loss.total == 1 + 2 + 4 + 5 + 6 + 7
    np.testing.assert_allclose(
        run.config.aggregation.finish(collection.updates),  # type: ignore[attr-defined]
        small(run),
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    "order", [[8, 7, 6, 5, 4, 3, 2, 1, 0], [2, 0, 1, 3, 4, 5, 8, 6, 7], [0, 2, 1, 4, 3, 8, 7, 5, 6]]
)
def test_the_order_in_which_updates_come_changes_no_bit(run: Run, plan: RoundPlan, order: list[int]) -> None:
    client_ids = [task.client_id for task in plan.cohort[:9]]
    draw = np.random.default_rng(0)
    frames = [
        sent(run, plan, client_id=client_id, parts={"values": small(run) * np.float32(draw.normal())})
        for client_id in client_ids
    ]

    def admitted(places: list[int]) -> Any:
        batch = EncodedBatch(
            tuple(client_ids[place] for place in places),
            tuple(frames[place] for place in places),
            tuple(Weighted(float(place), 1.0) for place in places),
        )
        return stages.admit(run, plan, batch, None)

    expected, found = admitted([*range(9)]), admitted(order)
    assert found.statistics.received == 9
    assert found.updates.tensors.keys() == expected.updates.tensors.keys()
    for name, tensor in expected.updates.tensors.items():
        assert found.updates.tensors[name].tobytes() == tensor.tobytes()
