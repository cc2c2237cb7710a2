"""The grid of a sweep: how it is written, which cells it has, and what is refused before anything is trained."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedrounds.fl_components.config import config_digest, load_config, parse_axis
from fedrounds.fl_components.errors import ConfigError, RunConflict
from fedrounds.fl_components.run_state import RunState
from fedrounds.fl_components.server import stages
from fedrounds.fl_components.store import Store
from fedrounds.flows.round import walk
from fedrounds.tasks.session import session
from fedrounds.tasks.sweep import plan, sweep_session
from tests.support import HEART

RATES = "training.learning_rate=0.01,0.1"

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.text(st.characters(codec="ascii", categories=["L", "P", "Zs"]))
)
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text("abc"), inner), max_leaves=5)


@given(st.lists(values, min_size=1))
def test_an_axis_is_split_at_the_commas_outside_brackets_and_quotes(written: list[Any]) -> None:
    text = ",".join(json.dumps(value) for value in written)  # JSON is YAML
    assert parse_axis(f"a.b={text}") == ("a.b", written)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("training.learning_rate", "not of the form"),
        ("training..epochs=1", "not of the form"),
        ("seed=", "gives no values to seed"),
        ("seed=1,,2", "cannot be read as YAML"),
        ("seed=1],[2", "cannot be read as YAML"),
        ("model={kind: mlp", "cannot be read as YAML"),
        (f"seed={2**63}", "cannot be read as YAML: the whole number .* has more than 64 bits"),
    ],
)
def test_an_axis_that_cannot_be_read_is_told(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_axis(text)


@given(
    st.lists(st.sampled_from([1, 2, 3, 5]), min_size=1, unique=True),
    st.lists(st.integers(0, 9), min_size=1, unique=True),
)
def test_the_cells_are_the_product_of_the_axes_and_each_is_the_override_of_its_values(
    epochs: list[int], seeds: list[int]
) -> None:
    planned = plan("s", str(HEART), {"training.epochs": epochs, "seed": seeds})
    assert [tuple(values.values()) for values in planned.cells.values()] == list(itertools.product(epochs, seeds))
    again = plan(
        "s", str(HEART), [f"training.epochs={','.join(map(str, epochs))}", f"seed={','.join(map(str, seeds))}"]
    )
    assert again == planned


def test_a_cell_is_configured_as_a_training_with_its_values_set(home: Path) -> None:
    with sweep_session("s", str(HEART), [RATES, "seed=1,2"], ["rounds=3"]) as sweep:
        assert list(sweep.cells) == ["s-001", "s-002", "s-003", "s-004"]
        alone = load_config(HEART, ["rounds=3", "training.learning_rate=0.1", "seed=1"])
        assert config_digest(sweep.cells["s-003"]) == config_digest(alone)
        assert sweep.unfinished() == list(sweep.cells)
    with sweep_session("s") as again:  # from the store alone
        assert again.cells == sweep.cells
    with pytest.raises(RunConflict, match="over"), sweep_session("s", str(HEART), [RATES], ["rounds=3"]):
        pass


def test_a_completed_cell_is_not_worked_on_again(home: Path) -> None:
    with sweep_session("s", str(HEART), [RATES], ["rounds=1"]) as sweep:
        assert sweep.unfinished() == ["s-001", "s-002"]
        config = sweep.cells["s-001"].model_dump(mode="json")
        with session("s-001", config, sweep=sweep.record) as running:
            running.run.lease.begin_attempt()
            walk(stages, running.run, 1)
            running.run.lease.finish(RunState.COMPLETED)
            assert sweep.unfinished() == ["s-001", "s-002"]  # until its views are complete and its lease given back
        assert sweep.unfinished() == ["s-002"]


def test_a_value_is_kept_as_the_configuration_has_it() -> None:
    """YAML takes 1e-2 for text and 1 for a whole number; they are learning rates all the same."""
    assert plan("s", str(HEART), ["training.learning_rate=1e-2,1"]).over == [("training.learning_rate", [0.01, 1.0])]
    groups = plan("s", str(HEART), ["server_optimizer={kind: fedavg},{kind: fedadam, learning_rate: 0.1}"])
    assert groups.over == [("server_optimizer", [{"kind": "fedavg"}, {"kind": "fedadam", "learning_rate": 0.1}])]


def test_a_kind_may_vary_though_the_kinds_have_other_fields() -> None:
    assert (
        len(plan("s", str(HEART), ["server_optimizer.kind=fedavg,fedadam", "model.kind=logistic_regression"]).cells)
        == 2
    )


def test_modules_are_looked_for_beside_the_file(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "there" / "heart.yaml"
    file.parent.mkdir()
    file.write_text(HEART.read_text())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with sweep_session("s", str(file), ["seed=1,2"]) as sweep:
        assert sweep.record.source_folder == str(file.parent)


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ([], "needs a field to vary"),
        (["training.learning_rate=0.1,-1"], "cell training.learning_rate=-1 makes no sense: .* greater than 0"),
        (["seed=1", "training.epoch=1,2"], "cell seed=1, training.epoch=1 makes no sense: .* did you mean epochs"),
        (["rounds.many=1,2"], "cell rounds.many=1 makes no sense: .*rounds is 50"),
        (["seed=1,2", "seed=3"], "seed is varied twice"),
        (["training.learning_rate=0.1,1e-1"], "the same configuration"),
        (["training.epochs=1,2", "training={learning_rate: 0.1, epochs: 1}"], "the same configuration"),
        (["name=a,b"], "name cannot be varied"),
        (["model.start_from=fresh,latest"], "would begin where the cell before it ended"),
        (["model.start_from=models:/m@challenger"], "would begin where the cell before it ended"),
        ([f"seed={','.join(map(str, range(1000)))}"], "1,000 cells"),
        (["seed=2020-01-01"], "seed is '2020-01-01': it must be a whole number"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(home: Path, over: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said), sweep_session("s", str(HEART), over):
        pass
    with Store.open() as store:
        assert store.find_sweep("s") is None


def test_a_number_that_json_lacks_is_refused(home: Path) -> None:
    with pytest.raises(ConfigError, match="none that JSON has"):
        plan("s", str(HEART), {"training.learning_rate": [0.1, math.nan]})
