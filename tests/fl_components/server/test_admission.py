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
from fedrounds.fl_components.server.hub import Hub
from fedrounds.fl_components.values import EncodedBatch, RoundPlan, ServerState, Weighted
from fedrounds.fl_components.wire import Update, encode_update, max_update_bytes

from .conftest import OpenRun, Single

CLIENT = "client-0003"


@pytest.fixture
def hub(open_run: OpenRun) -> Hub:
    return open_run(admission={"max_update_norm": 10.0})


@pytest.fixture
def state(hub: Hub) -> ServerState:
    return stages.load(hub, 1)


@pytest.fixture
def plan(hub: Hub, state: ServerState) -> RoundPlan:
    return stages.authorise(hub, stages.select(hub, state, stages.broadcast(hub, state)))


def check_update(hub: Hub, plan: RoundPlan, client_id: str, frame: bytes) -> Any:
    (task,) = (each for each in plan.cohort if each.client_id == client_id)
    (delta_D,), refused = hub.codec(plan).decode(plan, [task], [frame], hub.federation.admission(plan))
    if refused:
        raise UpdateRejected(refused[0])
    return delta_D


def small(hub: Hub) -> Any:
    return np.full(hub.federation.num_parameters, 0.01, np.float32)


def with_value(delta_D: Any, value: float, position: int = 100) -> Any:
    delta_D = delta_D.copy()
    delta_D[position] = value
    return delta_D


def sent(hub: Hub, plan: RoundPlan, **changes: Any) -> bytes:
    update = Update(CLIENT, plan.base_digest, ("delta",), {"values": small(hub)})
    return encode_update(replace(update, **changes))


CASES: list[tuple[str, Callable[[Hub, RoundPlan], bytes]]] = [
    ("not_finite", lambda hub, plan: sent(hub, plan, parts={"values": with_value(small(hub), np.nan)})),
    ("not_finite", lambda hub, plan: sent(hub, plan, parts={"values": with_value(small(hub), np.inf, 0)})),
    ("not_finite", lambda hub, plan: sent(hub, plan, parts={"values": with_value(small(hub), -np.inf, -1)})),
    ("norm_too_large", lambda hub, plan: sent(hub, plan, parts={"values": with_value(small(hub), 10.1)})),
    ("norm_too_large", lambda hub, plan: sent(hub, plan, parts={"values": np.full_like(small(hub), 3e38)})),
    ("wrong_shape", lambda hub, plan: sent(hub, plan, parts={"values": small(hub)[:-1]})),
    ("wrong_shape", lambda hub, plan: sent(hub, plan, parts={"values": small(hub)[:, None]})),
    ("wrong_shape", lambda hub, plan: sent(hub, plan, parts={"values": small(hub).astype(np.float16)})),
    ("wrong_tensors", lambda hub, plan: sent(hub, plan, parts={"delto": small(hub)})),
    ("wrong_tensors", lambda hub, plan: sent(hub, plan, parts={})),
    ("wrong_tensors", lambda hub, plan: sent(hub, plan, channels=("delta", "control"))),
    ("wrong_shape", lambda hub, plan: sent(hub, plan, parts={"values": Symbols(np.zeros(9, np.uint8), 8)})),
    ("wrong_shape", lambda hub, plan: sent(hub, plan, parts={"values": Indices(np.arange(9), 9)})),
    ("stale_base", lambda hub, plan: sent(hub, plan, base_digest="0" * 64)),
    ("undecodable", lambda hub, plan: sent(hub, plan, base_digest="")),
    ("undecodable", lambda hub, plan: sent(hub, plan, base_digest="\ud800\x1b[31m" * 100)),
    ("wrong_client", lambda hub, plan: sent(hub, plan, client_id="client-0004")),
    ("wrong_client", lambda hub, plan: sent(hub, plan, client_id="\ud800\n\x1b[31m" * 100)),
    ("undecodable", lambda hub, plan: sent(hub, plan)[:-1]),
    ("undecodable", lambda hub, plan: b""),
    ("undecodable", lambda hub, plan: b"PK\x03\x04" * 50),
    ("too_large", lambda hub, plan: bytes(max_update_bytes(hub.federation.num_parameters) + 1)),
    ("too_large", lambda hub, plan: sent(hub, plan, parts={"values": small(hub).repeat(9)})),
]


def test_a_good_update_is_taken_bit_for_bit(hub: Hub, plan: RoundPlan) -> None:
    delta_D = with_value(small(hub), -0.0)
    found_D = check_update(hub, plan, CLIENT, sent(hub, plan, parts={"values": delta_D}))
    assert found_D.tobytes() == delta_D.tobytes()


def test_the_limit_itself_is_allowed(hub: Hub, plan: RoundPlan) -> None:
    delta_D = with_value(np.zeros_like(small(hub)), 10.0)
    assert check_update(hub, plan, CLIENT, sent(hub, plan, parts={"values": delta_D}))[100] == 10


@pytest.mark.parametrize("size", [1, 1000, 199_210, 3_000_000])
@pytest.mark.parametrize("scale", [1e-22, 1e-18, 1.0, 1e16])  # of the first no square is a float32
def test_the_limit_is_held_to_the_last_digits(hub: Hub, plan: RoundPlan, size: int, scale: float) -> None:
    """However many numbers there are, and however rounding goes where a quick look at the norm is enough."""
    codec, task = replace(hub.codec(plan), layout=Layout(("delta",), ((size,),))), plan.cohort[0]
    delta_D = (scale * np.random.default_rng(size).standard_normal(size)).astype(np.float32)
    norm = float(np.linalg.norm(delta_D.astype(np.float64)))
    frame = encode_update(Update(task.client_id, plan.base_digest, ("delta",), {"values": delta_D}))
    for limit, refused in ((norm * (1 + 1e-9), False), (norm * (1 - 1e-9), True)):
        reasons = codec.decode(plan, [task], [frame], RoundAdmission(Admission(max_update_norm=limit)))[1]
        assert bool(reasons) == refused


@pytest.mark.parametrize(("reason", "frame"), CASES, ids=[f"{number}-{case[0]}" for number, case in enumerate(CASES)])
def test_an_update_that_is_refused(
    hub: Hub, plan: RoundPlan, reason: str, frame: Callable[[Hub, RoundPlan], bytes]
) -> None:
    with pytest.raises(UpdateRejected) as caught:
        check_update(hub, plan, CLIENT, frame(hub, plan))
    found, _, explanation = caught.value.message.partition(": ")
    assert found == reason
    assert explanation
    assert len(caught.value.message) < 1500  # it is kept, logged and printed, whatever the client wrote
    assert caught.value.message.isprintable()
    assert json.loads(json.dumps(caught.value.message)) == caught.value.message


def test_what_cannot_be_decoded_is_zeros_whatever_was_there(hub: Hub, plan: RoundPlan) -> None:
    def in_used_memory(function: Any, rows_ND: Any, *columns: Any, **how: Any) -> Any:
        rows_ND[:] = np.nan
        return map_inline(function, rows_ND, *columns, **how)

    (task,) = (each for each in plan.cohort if each.client_id == CLIENT)
    frames = [sent(hub, plan), b"", sent(hub, plan, base_digest="0" * 64)]
    codec = replace(hub.codec(plan), rule=Single())
    deltas_ND, refused = codec.decode(plan, [task] * 3, frames, hub.federation.admission(plan), in_used_memory)
    assert list(refused) == [1, 2]
    assert np.array_equal(deltas_ND, [small(hub), 0 * small(hub), 0 * small(hub)])


def test_every_reason_is_named_where_it_is_promised() -> None:
    promised = Codec.decode.__doc__ or ""
    assert all(reason in promised for reason, _ in CASES)


def test_refusals_of_a_wave_are_kept_with_their_reasons(hub: Hub, plan: RoundPlan) -> None:
    client_ids = tuple(task.client_id for task in plan.cohort)
    frames = [sent(hub, plan, client_id=client_id) for client_id in client_ids]
    frames[0] = b"junk"
    frames[3] = sent(hub, plan, parts={"values": with_value(small(hub), np.nan)})
    frames[8] = frames[7]  # a copy of another client's update
    losses = tuple(Weighted(float(index), 1.0) for index in range(9))
    collection = stages.admit(hub, plan, EncodedBatch(client_ids, tuple(frames), losses), None)
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
        hub.config.aggregation.finish(collection.updates),  # type: ignore[attr-defined]
        small(hub),
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    "order", [[8, 7, 6, 5, 4, 3, 2, 1, 0], [2, 0, 1, 3, 4, 5, 8, 6, 7], [0, 2, 1, 4, 3, 8, 7, 5, 6]]
)
def test_the_order_in_which_updates_come_changes_no_bit(hub: Hub, plan: RoundPlan, order: list[int]) -> None:
    client_ids = [task.client_id for task in plan.cohort[:9]]
    draw = np.random.default_rng(0)
    frames = [
        sent(hub, plan, client_id=client_id, parts={"values": small(hub) * np.float32(draw.normal())})
        for client_id in client_ids
    ]

    def admitted(places: list[int]) -> Any:
        batch = EncodedBatch(
            tuple(client_ids[place] for place in places),
            tuple(frames[place] for place in places),
            tuple(Weighted(float(place), 1.0) for place in places),
        )
        return stages.admit(hub, plan, batch, None)

    expected, found = admitted([*range(9)]), admitted(order)
    assert found.statistics.received == 9
    assert found.updates.tensors.keys() == expected.updates.tensors.keys()
    for name, tensor in expected.updates.tensors.items():
        assert found.updates.tensors[name].tobytes() == tensor.tobytes()
