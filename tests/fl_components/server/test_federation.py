"""All that a configuration names fits together, or is refused before any round begins."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedrounds.fl_components.config import config_digest, parse_config
from fedrounds.fl_components.errors import ConfigError, DataError, FedroundsError, ModelError
from fedrounds.fl_components.parameters import flatten
from fedrounds.fl_components.server.assembly import assemble
from fedrounds.fl_components.training import engine_environment, evaluate

FUNCTIONS = """
import numpy as np
from torch import nn

def grouped():  # into groups of one value, of which GroupNorm takes no single row
    return nn.Sequential(nn.Linear(4, 4), nn.GroupNorm(4, 4), nn.Linear(4, 3))

def load(num_clients=3, tests=2, features=4, whole=False, rows=4):
    generator = np.random.default_rng(0)
    def client(tested):
        x = generator.integers(0, 9, (6, features)) if whole else generator.standard_normal((6, features))
        y = generator.integers(0, 3, 6)
        return (x[:rows], y[:rows], x[rows:], y[rows:]) if tested else (x[:rows], y[:rows])
    return {f"ward {number}": client(number < tests) for number in range(num_clients)}
"""

EXAMPLE_LEVEL = {
    "kind": "example_level",
    "noise_multiplier": 1.0,
    "max_grad_norm": 1.0,
    "sampling_rate": 0.5,
    "delta": 1e-3,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The folder of a configuration whose data come from a function beside it."""
    (tmp_path / "ward_functions.py").write_text(FUNCTIONS)
    (tmp_path / "json.py").write_text("raise AssertionError('this hides an installed module')\n")
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.delitem(sys.modules, "ward_functions", raising=False)
    return str(tmp_path)


def configured(arguments: dict[str, Any] | None = None, **changes: Any) -> Any:
    return parse_config(
        {
            "name": "ward",
            "rounds": 2,
            "data": {
                "kind": "function",
                "path": "ward_functions:load",
                "arguments": arguments or {},
                "num_classes": 3,
            },
            "model": {"kind": "logistic_regression"},
            "training": {"learning_rate": 0.1, "epochs": 1},
            **changes,
        }
    )


class TestPublicRows:
    def test_test_examples_where_they_are_public(self, folder: str) -> None:
        data = configured().data.model_dump() | {"public": True}
        for changes in ({"data": data}, {"evaluation": {"public_test": True}}):
            federation = assemble(configured(**changes), folder)
            all_rows, two = federation.public_rows(100), federation.public_rows(2)
            np.testing.assert_array_equal(all_rows.x, federation.simulated.data.x_test)
            np.testing.assert_array_equal(all_rows.y, federation.simulated.data.y_test)
            np.testing.assert_array_equal(two.x, federation.simulated.data.x_test[[0, -1]])
            assert (two.starts.tolist(), two.stops.tolist()) == ([0], [2])

    @pytest.mark.parametrize("whole", [False, True])
    def test_else_nobody_s(self, whole: bool, folder: str) -> None:
        model = {"kind": "gru", "hidden": 3, "vocabulary": 9} if whole else {"kind": "logistic_regression"}
        first, other = (
            assemble(configured({"whole": whole, "num_clients": clients}, model=model), folder) for clients in (3, 5)
        )
        rows, same = first.public_rows(20), other.public_rows(20)
        assert rows.x.shape == (20, 4) and rows.x.dtype == torch.from_numpy(first.simulated.data.x_train).dtype
        assert torch.equal(rows.x, same.x) and torch.equal(rows.y, same.y)  # whatever the clients hold


class TestAssemble:
    def test_it_fits(self, folder: str) -> None:
        federation = assemble(configured(), folder)
        assert federation.population.client_ids == ("ward 0", "ward 1", "ward 2")
        assert federation.num_parameters == 4 * 3 + 3
        assert federation.initial_params_D.dtype == np.float32

    def test_the_folder_comes_last_and_once(self, folder: str) -> None:
        before = sys.path.copy()
        for _ in range(2):
            assemble(configured(), folder)
        assert sys.path == [*before, folder]

    def test_the_seed_decides_the_initial_parameters(self, folder: str) -> None:
        model = {"kind": "mlp", "hidden": [5]}
        first, again, other = (assemble(configured(model=model, seed=seed), folder) for seed in (1, 1, 2))
        assert first.initial_params_D.tobytes() == again.initial_params_D.tobytes()
        assert first.initial_params_D.tobytes() != other.initial_params_D.tobytes()

    @pytest.mark.parametrize(
        ("rows", "changes", "words"),
        [
            (4, {"batch_size": 3}, "client ward 0 has 4 rows, training.batch_size is 3"),
            (4, {"batch_size": 1}, "client ward 0 has 4 rows, training.batch_size is 1"),
            (5, {"evaluation": {"per_client": True}}, "client ward 0 has 1 test rows"),
            (4, {"privacy": EXAMPLE_LEVEL}, "a client may have one test row"),
        ],
    )
    def test_batches_of_one_row_are_found_before_training(
        self, rows: int, changes: dict[str, Any], words: str, folder: str
    ) -> None:
        model = {"kind": "module", "path": "ward_functions:grouped"}
        evaluation = changes.pop("evaluation", {}) | {"every": 1}
        training = {"learning_rate": 0.1, "epochs": 1} | changes
        with pytest.raises(ModelError, match=words):
            assemble(configured({"rows": rows}, model=model, training=training, evaluation=evaluation), folder)
        if "privacy" not in changes:  # two rows do in any batch
            assemble(configured(model=model, training={"learning_rate": 0.1, "epochs": 1, "batch_size": 2}), folder)

    @pytest.mark.parametrize(
        ("arguments", "changes", "error", "words"),
        [
            (
                {},
                {"selection": {"cohort_size": 4}},
                ConfigError,
                r"selection.cohort_size is 4 but data function has 3 clients; make selection.cohort_size at most 3",
            ),
            ({}, {"selection": {"min_updates": 4}}, ConfigError, r"selection.min_updates is 4 .* at most 3"),
            ({"tests": 0}, {}, DataError, "data function has no test examples: the model could never be evaluated"),
            (
                {"num_clients": 1001, "tests": 1001},
                {},
                ConfigError,
                "evaluation.per_client is true but data function has 1001 clients with test rows: .* set "
                "evaluation.per_client to false above 1000",
            ),
            (
                {},
                {"selection": {"kind": "stratified", "by": "region", "cohort_size": 2}},
                DataError,
                "this data has no attribute 'region' of clients",
            ),
            (
                {},
                {"simulation": {"availability": {"kind": "trace", "file": "/no/trace.csv"}}},
                DataError,
                "/no/trace.csv cannot be read",
            ),
            ({"whole": True}, {}, ModelError, r"the model cannot take rows of int64 \[4\]"),
            ({"wards": 3}, {}, DataError, r"ward_functions:load failed with data.arguments \['wards'\]: TypeError"),
            (
                {},
                {
                    "model": {
                        "kind": "module",
                        "path": "torch.nn:Linear",
                        "arguments": {"in_features": 5, "out_features": 3},
                    }
                },
                ModelError,
                r"the model cannot take rows of float32 \[4\]",
            ),
        ],
    )
    def test_what_does_not_fit(
        self,
        folder: str,
        arguments: dict[str, Any],
        changes: dict[str, Any],
        error: type[FedroundsError],
        words: str,
    ) -> None:
        config = configured(arguments, **changes)  # it makes sense until the data are read
        with pytest.raises(error, match=words) as caught:
            assemble(config, folder)
        assert caught.value.exit_code == 2

    def test_a_token_that_only_a_test_row_has_is_found_unless_rows_are_private(self, folder: str) -> None:
        model = {"kind": "transformer", "width": 4, "heads": 1, "layers": 1, "vocabulary": 5}
        with pytest.raises(ModelError, match=r"in embedding, Embedding") as caught:
            assemble(configured({"whole": True}, model=model), folder)
        assert "make it an embedding of at least 9 tokens" in (caught.value.hint or "")
        privacy = {"kind": "example_level", "noise_multiplier": 1.0, "max_grad_norm": 1.0, "sampling_rate": 0.5}
        training = {"learning_rate": 0.1, "epochs": 1, "privacy": {**privacy, "delta": 0.1}}
        assert assemble(configured({"whole": True}, model=model, training=training), folder).num_parameters > 0

    def test_a_large_population_without_per_client_evaluation(self, folder: str) -> None:
        federation = assemble(configured({"num_clients": 1001}, evaluation={"per_client": False}), folder)
        assert list(federation.evaluate(federation.initial_params_D)) == ["eval/loss", "eval/accuracy"]


class TestInitialState:
    def test_fresh(self, folder: str) -> None:
        config = configured(server_optimizer={"kind": "fedadam"})
        federation = assemble(config, folder)
        state = federation.initial_state()
        assert (state.round, state.config_digest) == (0, config_digest(config))
        assert state.params_D.tobytes() == federation.initial_params_D.tobytes()
        assert state.server_optimizer.keys() == {"m", "v"}

    def test_warm(self, folder: str) -> None:
        params_D = np.arange(15, dtype=np.float32)
        assert assemble(configured(), folder).initial_state(params_D).params_D.tolist() == list(range(15))

    def test_of_another_model(self, folder: str) -> None:
        config = configured(model={"kind": "logistic_regression", "start_from": "latest"})
        with pytest.raises(ConfigError) as caught:
            assemble(config, folder).initial_state(np.zeros(14, np.float32))
        assert caught.value.message == (
            "model.start_from 'latest' has 14 parameters but model logistic_regression has 15; start from a model of "
            "the same shape, or fresh"
        )


class TestEvaluate:
    def test_clients_add_up_to_the_whole(self, folder: str) -> None:
        federation = assemble(configured(), folder)
        params_D = np.random.default_rng(0).standard_normal(15).astype(np.float32)
        metrics = federation.evaluate(params_D)
        assert metrics.keys() == {
            f"{of}/{name}"
            for of in ("eval", "eval/client/ward 0", "eval/client/ward 1")  # ward 2 has no test rows
            for name in ("loss", "accuracy")
        } | {f"eval/{name}/clients/{level}" for name in ("loss", "accuracy") for level in ("q10", "median", "q90")}
        data, module = federation.simulated.data, federation.trained_module(params_D)
        values = evaluate(module, data.x_test, data.y_test, federation.evaluation_set.metrics).values()
        assert metrics["eval/loss"] == pytest.approx(values["loss"], rel=1e-6)
        assert metrics["eval/accuracy"] == pytest.approx(values["accuracy"])
        assert metrics["eval/loss/clients/median"] == pytest.approx(
            (metrics["eval/client/ward 0/loss"] + metrics["eval/client/ward 1/loss"]) / 2
        )
        assert metrics["eval/loss"] == pytest.approx(
            (metrics["eval/client/ward 0/loss"] + metrics["eval/client/ward 1/loss"]) / 2, rel=1e-6
        )

    def test_it_leaves_the_model_and_the_rows_as_they_were(self, folder: str, tmp_path: Path) -> None:
        """A model that works in place on its input, evaluated again and again, and from other parameters in between."""
        (tmp_path / "ward_models.py").write_text(
            "from torch import nn\n\n\nclass Halves(nn.Linear):\n    def forward(self, x):\n"
            "        return super().forward(x.mul_(0.5))\n"
        )
        model = {"kind": "module", "path": "ward_models:Halves", "arguments": {"in_features": 4, "out_features": 3}}
        federation = assemble(configured(model=model), folder)
        params_D, rows = federation.initial_params_D, federation.simulated.data.x_test.copy()
        metrics = federation.evaluate(params_D)
        assert federation.evaluate(params_D * 2) != metrics
        assert federation.evaluate(params_D) == metrics
        assert federation.simulated.data.x_test.tobytes() == rows.tobytes()
        assert flatten(federation.module).tobytes() == params_D.tobytes()

    def test_baselines_need_no_model(self, folder: str) -> None:
        federation = assemble(configured(), folder)
        assert federation.baselines.keys() == {"pooled_majority", "client_majority"}
        assert all(0 <= value <= 1 for value in federation.baselines.values())


def test_the_engine_s_facts_can_be_kept() -> None:
    facts = engine_environment()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["processor"]


def test_the_facts_of_a_federation(folder: str) -> None:
    facts = assemble(configured(), folder).facts
    assert (facts["num_clients"], facts["num_parameters"]) == (3, 15)
    assert len(str(facts["constants_digest"])) == 64


def test_a_module_of_the_user_s_that_python_would_not_find_is_refused(tmp_path: Path) -> None:
    """`test` and `json` are modules of Python: a file of that name beside the configuration is neither."""
    for name in ("json", "test"):
        (tmp_path / f"{name}.py").write_text("def load(): return {}")
        config = configured(data={"kind": "function", "path": f"{name}:load"})
        with pytest.raises(
            ConfigError, match=rf"data\.path is '{name}:load', and {name} is .*, not {tmp_path}"
        ) as caught:
            assemble(config, str(tmp_path))
        assert caught.value.hint == "give your module another name" + (
            "; or use a process of its own" * (name in sys.modules)
        )
