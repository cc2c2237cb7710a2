"""A configuration's learning task and metrics: what they are by default, and what is refused when they are read."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedrounds.fl_components.config import FederationConfig, parse_config
from fedrounds.fl_components.data import ClientExamples, FederatedData
from fedrounds.fl_components.errors import ConfigError, DataError
from fedrounds.fl_components.server.assembly import assemble
from fedrounds.fl_components.task import Classification, Metric, Statistic
from fedrounds.fl_components.training import Evaluation

SMALL: dict[str, Any] = {
    "name": "wards",
    "rounds": 2,
    "data": {"kind": "tables", "folder": "/wards", "label": "days"},
    "model": {"kind": "logistic_regression"},
    "training": {"learning_rate": 0.1, "epochs": 1},
}
REGRESSION = SMALL | {"task": {"kind": "regression"}}


def configured(fields: dict[str, Any], **evaluation: Any) -> FederationConfig:
    return parse_config(fields | {"evaluation": evaluation})


def test_defaults_are_written_out() -> None:
    """A run's readers find the metrics and the primary one in its configuration."""
    plain, regression = configured(SMALL), configured(REGRESSION)
    assert (plain.task.kind, plain.evaluation.metrics, plain.evaluation.primary) == (
        "classification",
        ("loss", "accuracy"),
        "accuracy",
    )
    assert (regression.evaluation.metrics, regression.evaluation.primary) == (("mse", "mae", "r2"), "mse")
    assert parse_config(plain.model_dump(mode="json")) == plain


def test_the_primary_metric_is_evaluated_whether_or_not_it_is_listed() -> None:
    assert configured(SMALL, primary="auroc").evaluation.metrics == ("loss", "accuracy", "auroc")
    assert configured(SMALL, metrics=["f1"]).evaluation.metrics == ("f1", "accuracy")
    assert configured(SMALL, metrics=["auroc", "loss"], primary="auroc").evaluation.metrics == ("auroc", "loss")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            REGRESSION | {"evaluation": {"metrics": ["mse", "accuracy"]}},
            "evaluation.metrics names 'accuracy' but task.kind regression has no such metric; known are loss, mse, "
            "mae, r2",
        ),
        (
            SMALL | {"evaluation": {"primary": "r2"}},
            "evaluation.primary names 'r2' but task.kind classification",
        ),
        (SMALL | {"evaluation": {"primary": "confusion_matrix"}}, "evaluation.primary is confusion_matrix but"),
        (SMALL | {"evaluation": {"metrics": []}}, "evaluation.metrics is []: it must have at least 1 item"),
        (SMALL | {"evaluation": {"quantiles": [0.5, 1.5]}}, "give different levels from 0 to 1"),
        (SMALL | {"task": {"kind": "regresion"}}, "task.kind is 'regresion'; did you mean regression?"),
        (
            REGRESSION | {"training": SMALL["training"] | {"label_smoothing": 0.1}},
            "training.label_smoothing is 0.1 but task.kind is regression",
        ),
        (
            REGRESSION | {"data": {"kind": "heart_disease"}},
            "task.kind is regression but the targets of data.kind heart_disease are classes",
        ),
        (
            REGRESSION | {"data": SMALL["data"] | {"classes": [0, 1]}},
            "task.kind is regression but data.classes is given",
        ),
        (
            REGRESSION | {"data": {"kind": "function", "path": "wards:load", "num_classes": 3}},
            "task.kind is regression but data.num_classes is given",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_when_it_is_read(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(fields)
    assert message in caught.value.message


def write(folder: Path, name: str, header: str, rows: list[str]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.csv").write_text("\n".join([header, *rows]) + "\n")


def test_a_metric_of_two_classes_is_refused_for_three(tmp_path: Path) -> None:
    write(tmp_path / "wards", "a", "age,days", [f"{row},{'xyz'[row % 3]}" for row in range(30)])
    fields = SMALL | {"data": SMALL["data"] | {"folder": str(tmp_path / "wards")}}
    with pytest.raises(ConfigError, match="sensitivity_at_specificity but data tables has 3 classes"):
        assemble(configured(fields, metrics=["sensitivity_at_specificity"]))


class Broken(Classification):
    """A task of another package, whose metric fails."""

    def own_metrics(self, class_names: Sequence[str]) -> dict[str, Metric]:
        metric = Metric(Statistic(lambda outputs, targets: np.ones(2)), lambda kept: kept[7], higher_is_better=True)
        return dict(super().own_metrics(class_names)) | {"broken": metric}


def test_a_metric_that_fails_is_found_before_the_first_round() -> None:
    fields = SMALL | {"data": {"kind": "heart_disease"}, "evaluation": {}}
    config = parse_config(fields).model_copy(update={"task": Broken()})
    config = config.model_copy(update={"evaluation": Evaluation(metrics=("broken",)).resolved(config.task)})
    with pytest.raises(ConfigError, match=r"names broken, which fails on synthetic rows: IndexError"):
        assemble(config)


class TestTargetsOfTables:
    FIELDS = REGRESSION | {"data": SMALL["data"] | {"public": True, "test_fraction": 0.25}}

    def load(self, folder: Path, **data: Any) -> Any:
        fields = self.FIELDS | {"data": self.FIELDS["data"] | {"folder": str(folder)} | data}
        return assemble(parse_config(fields))

    def test_numbers_are_taken_as_they_are(self, tmp_path: Path) -> None:
        write(tmp_path / "w", "a", "age,days", ["1,2.5", "2,-3", "3,1e3", "4,0"])
        write(tmp_path / "w", "b", "age,days", ["5,1", "6,2", "7,3", "8,4"])
        federation = self.load(tmp_path / "w")
        data = federation.simulated.data
        assert (data.num_classes, data.y_train.dtype, federation.model_spec.output_shape) == (0, np.float32, (1,))
        assert sorted([*data.train(0)[1].tolist(), *data.test(0)[1].tolist()]) == [-3, 0, 2.5, 1000]
        known = np.concatenate([data.train(client)[1] for client in (0, 1)])
        expected = np.mean(np.square(data.y_test - known.mean(dtype=np.float64)))
        assert data.baselines()["pooled_mean"] == pytest.approx(expected)

    def test_missing_targets_follow_the_rule(self, tmp_path: Path) -> None:
        write(tmp_path / "w", "a", "age,days", ["1,2.5", "2,", "3,4", "4,5", "5,6"])
        with pytest.raises(DataError, match="days"):
            self.load(tmp_path / "w")
        assert len(self.load(tmp_path / "w", missing={"days": "drop_row"}).simulated.data.y_train) == 3

    def test_words_are_refused_by_their_line(self, tmp_path: Path) -> None:
        write(tmp_path / "w", "a", "age,days", ["1,2.5", "2,many", "3,4", "4,5"])
        with pytest.raises(DataError, match="many"):
            self.load(tmp_path / "w")

    def test_a_quantity_without_the_task_leads_to_it(self, tmp_path: Path) -> None:
        write(tmp_path / "w", "a", "age,days", [f"{row},{row + 0.5}" for row in range(30)])
        with pytest.raises(DataError, match="it seems to be a quantity") as caught:
            assemble(parse_config(SMALL | {"data": SMALL["data"] | {"folder": str(tmp_path / "w")}}))
        assert "task: {kind: regression}" in str(caught.value.hint)


def test_rows_are_told_apart_by_their_targets() -> None:
    """Fingerprints: equal for equal rows, others where only the targets differ."""
    x, y = np.arange(80, dtype=np.float32).reshape(40, 2), np.arange(40, dtype=np.float32) / 4
    prints = []
    for targets in (y, y.copy(), y + 7):
        clients = {"a": ClientExamples(x[:30], targets[:30], x[30:], targets[30:])}
        prints.append(pickle.dumps(FederatedData.from_clients(clients, num_classes=0, public=False).fingerprints()))
    assert prints[0] == prints[1] != prints[2]


FUNCTION = """
import numpy as np

def load():
    return {"a": (np.ones((4, 2)), np.array([0.5, 1.25, -3, 1e39 if BAD else 2]), np.ones((1, 2)), np.array([7]))}
"""


def test_targets_of_a_function(tmp_path: Path) -> None:
    (tmp_path / "length_of_stay.py").write_text(FUNCTION.replace("BAD", "False"))
    (tmp_path / "too_long_a_stay.py").write_text(FUNCTION.replace("BAD", "True"))
    fields = REGRESSION | {"data": {"kind": "function", "path": "length_of_stay:load"}}
    data = assemble(parse_config(fields), str(tmp_path)).simulated.data
    assert data.y_train.tolist() == [0.5, 1.25, -3, 2] and data.y_test.tolist() == [7]
    with pytest.raises(DataError, match=r"client 'a', training row 3 \(from 0\), has the target inf"):
        assemble(parse_config(fields | {"data": {"kind": "function", "path": "too_long_a_stay:load"}}), str(tmp_path))
