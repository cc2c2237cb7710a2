"""A client is a function: it needs its rows, a specification as JSON and the broadcast, and no server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedrounds.fl_components.client import RESIDUAL, ClientExamples, RoundSpec, run_round
from fedrounds.fl_components.compression import TopK
from fedrounds.fl_components.config import parse_config
from fedrounds.fl_components.errors import WireError
from fedrounds.fl_components.server import stages
from fedrounds.fl_components.server.opening import open_run
from fedrounds.fl_components.server.run import Run
from fedrounds.fl_components.server.specs import round_spec
from fedrounds.fl_components.store import Store
from fedrounds.fl_components.training import SGD
from fedrounds.fl_components.training.objectives import Scaffold
from fedrounds.fl_components.training.schedules import Cosine
from fedrounds.fl_components.values import EncodedBatch, RoundPlan, Weighted
from fedrounds.fl_components.wire import decode_update, max_update_bytes
from fedrounds.flows.round import walk

HEART = {
    "name": "heart",
    "rounds": 3,
    "data": {"kind": "heart_disease"},
    "model": {"kind": "logistic_regression"},
    "training": {"learning_rate": 0.1, "epochs": 2},
}

# What a silo's process does: it imports the client's half and nothing else of the project.
CLIENT = """
import json, sys
from pathlib import Path
import numpy as np
from fedrounds.fl_components.client import ClientExamples, RoundSpec, run_round

folder = Path(sys.argv[1])
spec = RoundSpec.from_json((folder / "spec.json").read_text())
rows = np.load(folder / "rows.npz")
answer = run_round(spec, (folder / "broadcast").read_bytes(), ClientExamples(rows["x"], rows["y"]))
(folder / "update").write_bytes(answer.frame)
print(json.dumps([answer.loss.total, answer.loss.weight]))
beyond = ("server", "store", "data", "config", "executors", "simulate", "aggregation", "server_optimizers")
folders = tuple(f"fedrounds.fl_components.{folder}" for folder in beyond)
assert not [name for name in sys.modules if name.startswith(folders)]
assert not {"prefect", "mlflow", "sqlalchemy"} & sys.modules.keys()
"""


def test_four_processes_without_a_server_reproduce_the_parameters(tmp_path: Path, home: Path) -> None:
    config = parse_config(HEART)
    with Store.open() as store:
        expected = []
        with open_run(store, "whole", config=config) as run:
            for round in (1, 2, 3):
                walk(stages, run, round)
                expected.append(run.state().params_D)
        with open_run(store, "silos", config=config) as run:
            for round, expected_D in zip((1, 2, 3), expected, strict=True):
                state = stages.load(run, round)
                sent = stages.broadcast(run, state)
                plan = stages.authorise(run, stages.select(run, state, sent))
                batch = answers_of_processes(tmp_path / str(round), run, plan, sent.frame)
                cohort = stages.aggregate(run, plan, state, stages.admit(run, plan, batch, None))
                assert (cohort.statistics.received, cohort.statistics.rejected) == (4, {})
                state = stages.server_step(run, plan, state, sent, cohort)
                stages.commit(run, plan, state, cohort, {})
                np.testing.assert_allclose(state.params_D, expected_D, rtol=0, atol=1e-6)


def answers_of_processes(folder: Path, run: Run, plan: RoundPlan, frame: bytes) -> EncodedBatch:
    """Run each client of a plan in a process of its own."""
    processes = []
    for task in plan.cohort:
        own = folder / task.client_id
        own.mkdir(parents=True)
        (own / "spec.json").write_text(round_spec(run.federation, plan, task, run.source(plan.round)).to_json())
        (own / "broadcast").write_bytes(frame)
        x, y = run.federation.simulated.data.train(task.index)
        np.savez(own / "rows.npz", x=x, y=y)
        processes.append(subprocess.Popen([sys.executable, "-c", CLIENT, str(own)], stdout=subprocess.PIPE))
    losses = [Weighted(*json.loads(process.communicate(timeout=120)[0])) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    names = tuple(task.client_id for task in plan.cohort)
    return EncodedBatch(names, tuple((folder / name / "update").read_bytes() for name in names), tuple(losses))


class Client:
    """One hospital in the first round."""

    def __init__(self, run: Run, **changes: Any) -> None:
        state = stages.load(run, 1)
        sent = stages.broadcast(run, state)
        plan = stages.authorise(run, stages.select(run, state, sent))
        task = plan.cohort[0]
        self.frame = sent.frame
        self.spec = round_spec(run.federation, plan, task, run.source(1)).model_copy(update=changes)
        self.examples = ClientExamples(*run.federation.simulated.data.train(task.index))


@pytest.fixture
def client(home: Path) -> Iterator[Client]:
    with Store.open() as store, open_run(store, "r", config=parse_config(HEART)) as run:
        yield Client(run)


class TestRoundSpec:
    def test_json_keeps_every_bit(self, client: Client) -> None:
        spec = client.spec.model_copy(update={"training": SGD(learning_rate=0.1 / 3, epochs=1, schedule=Cosine())})
        read = RoundSpec.from_json(spec.to_json())
        assert read == spec and read.to_json() == spec.to_json()

    def test_it_holds_no_secret(self, client: Client) -> None:
        assert not {"key", "secret"} & set(RoundSpec.model_fields)

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"format_version": 2}, "format_version"),
            ({"round": 0}, "round"),
            ({"seed": "0" * 31}, "seed: .*it must be 32 hexadecimal digits"),
            ({"base_digest": "x" * 64}, "base_digest: .*it must be 64 hexadecimal digits"),
            ({"training": {"kind": "sgd", "learning_rate": -1, "epochs": 1}}, "training"),
            ({"code": "import os"}, "code: Extra inputs are not permitted"),
        ],
    )
    def test_what_is_no_specification_is_refused(self, client: Client, changes: dict[str, Any], sentence: str) -> None:
        text = json.dumps(json.loads(client.spec.to_json()) | changes)
        with pytest.raises(WireError, match=f"this is no specification of a round: .*{sentence}"):
            RoundSpec.from_json(text)

    @pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "null"])
    def test_text_that_is_no_object_is_refused(self, text: str) -> None:
        with pytest.raises(WireError, match="this is no specification of a round"):
            RoundSpec.from_json(text)

    def test_a_text_that_is_too_long_is_refused(self) -> None:
        with pytest.raises(WireError, match="at most 1048576 are allowed"):
            RoundSpec.from_json(" " * (1 << 20) + "{}")


class TestRunRound:
    def test_it_depends_on_its_arguments_alone(self, client: Client) -> None:
        answers = [run_round(client.spec, client.frame, client.examples).frame for _ in range(2)]
        assert answers[0] == answers[1]

    def test_a_damaged_broadcast_is_refused(self, client: Client) -> None:
        with pytest.raises(WireError, match="the checksum is not that of the content"):
            run_round(client.spec, client.frame[:-1] + bytes([client.frame[-1] ^ 1]), client.examples)

    def test_another_base_than_the_specification_names_is_refused(self, client: Client) -> None:
        spec = client.spec.model_copy(update={"base_digest": "0" * 64})
        with pytest.raises(WireError, match="names the base 0000000000000000, and the broadcast is another"):
            run_round(spec, client.frame, client.examples)

    def test_a_broadcast_without_the_objective_s_channel_is_refused(self, client: Client) -> None:
        training = client.spec.training.model_copy(update={"objective": Scaffold()})
        spec = client.spec.model_copy(update={"training": training})
        with pytest.raises(WireError, match="the broadcast has the channels params, and params, control are expected"):
            run_round(spec, client.frame, client.examples)

    def test_with_error_feedback_what_was_lost_comes_with_the_next_update(self, client: Client) -> None:
        rule = TopK(fraction=0.3, error_feedback=True)
        spec = client.spec.model_copy(update={"compression": rule})
        plain = run_round(client.spec, client.frame, client.examples)
        lossy = run_round(spec, client.frame, client.examples)
        assert len(lossy.frame) < len(plain.frame)
        (whole_M, received_M) = (decoded(each, answer.frame) for each, answer in ((client.spec, plain), (spec, lossy)))
        np.testing.assert_allclose(received_M + lossy.state[RESIDUAL], whole_M, atol=1e-6)
        again = run_round(spec, client.frame, client.examples, lossy.state)
        np.testing.assert_allclose(
            decoded(spec, again.frame) + again.state[RESIDUAL], whole_M + lossy.state[RESIDUAL], atol=1e-6
        )


def decoded(spec: RoundSpec, frame: bytes) -> Any:
    shapes = tuple(tuple(each.shape) for each in spec.model.build().parameters())
    layout = spec.update_layout(shapes)
    update = decode_update(frame, max_update_bytes(layout.size))
    return spec.compression.decompress([update.parts], spec.update_context(layout))[0]
