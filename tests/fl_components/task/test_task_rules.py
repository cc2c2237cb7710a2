"""The contract of learning tasks: every task's loss, gradients and metrics, held against torch and scikit-learn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics
from torch.func import grad, vmap
from torch.nn.functional import cross_entropy, mse_loss, one_hot

from fedrounds.fl_components.arrays import IGNORED
from fedrounds.fl_components.task import Classification, LearningTask, Regression, Tally

SEEDS = st.integers(0, 2**32 - 1)


class TaskContract(ABC):
    """What every learning task promises."""

    task: LearningTask
    num_classes: int

    def __str__(self) -> str:
        return type(self).__name__

    @abstractmethod
    def targets(self, num_rows: int, generator: np.random.Generator) -> Any:
        """Targets of this task, as an array."""

    @abstractmethod
    def reference_loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """torch's own mean loss."""

    @abstractmethod
    def reference_metrics(self, outputs: Any, targets: Any) -> dict[str, float]:
        """scikit-learn's values of the metrics that it has."""

    def rows(self, num_rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = np.random.default_rng(seed)
        outputs = generator.standard_normal((num_rows, self.task.output_size(self.num_classes)))
        return torch.tensor(outputs, dtype=torch.float32), torch.from_numpy(self.targets(num_rows, generator))

    def ignoring(self, targets: torch.Tensor, places: list[int]) -> torch.Tensor:
        ignored = targets.clone()
        ignored[places] = self.task.targets.ignored
        return ignored

    def values(self, *chunks: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
        tally = Tally(self.task.metrics())
        for outputs, targets in chunks:
            tally.add(outputs, targets)
        return tally.values()

    def test_the_losses_of_examples_add_up_to_the_mean(self) -> None:
        outputs, targets = self.rows(7, seed=1)
        each = self.task.loss(outputs, targets, "none")
        assert each.shape == (7,)
        assert self.task.loss(outputs, targets, "sum").item() == pytest.approx(each.sum().item(), rel=1e-6)
        assert self.task.loss(outputs, targets).item() == pytest.approx(each.mean().item(), rel=1e-6)
        assert self.task.loss(outputs, targets).item() == pytest.approx(self.reference_loss(outputs, targets).item())

    def test_gradients_equal_torch_s(self) -> None:
        outputs, targets = self.rows(7, seed=2)
        outputs.requires_grad_()
        (expected,) = torch.autograd.grad(self.reference_loss(outputs, targets), outputs)
        (mean,) = torch.autograd.grad(self.task.loss(outputs, targets), outputs)
        (total,) = torch.autograd.grad(self.task.loss(outputs, targets, "sum"), outputs)
        assert torch.allclose(mean, expected, rtol=1e-6) and torch.allclose(total / 7, expected, rtol=1e-6)

    def test_targets_that_do_not_count_change_nothing(self) -> None:
        outputs, targets = self.rows(8, seed=3)
        targets = self.ignoring(targets, [1, 4])
        outputs.requires_grad_()
        kept = [0, 2, 3, 5, 6, 7]
        each = self.task.loss(outputs, targets, "none")
        assert each[[1, 4]].tolist() == [0, 0]
        mean = self.task.loss(outputs, targets)
        assert mean.item() == pytest.approx(self.task.loss(outputs[kept], targets[kept]).item(), rel=1e-6)
        (gradient,) = torch.autograd.grad(mean, outputs)
        assert not gradient[[1, 4]].any() and gradient[kept].any(dim=1).all()
        assert self.values((outputs.detach()[:, None], targets[:, None])) == pytest.approx(
            self.values((outputs.detach()[kept], targets[kept])), rel=1e-6
        )

    def test_vmap_differentiates_many_clients_at_once(self) -> None:
        outputs, targets = self.rows(12, seed=4)
        outputs, targets = outputs.view(3, 4, -1), self.ignoring(targets, [3, 6]).view(3, 4)
        together = vmap(grad(self.task.loss))(outputs, targets)
        for client in range(3):
            alone = outputs[client].clone().requires_grad_()
            (expected,) = torch.autograd.grad(self.task.loss(alone, targets[client]), alone)
            assert torch.allclose(together[client], expected, rtol=1e-6)

    def test_clients_tallies_merge_into_that_of_all(self) -> None:
        outputs, targets = self.rows(20, seed=5)
        metrics, parts = self.task.metrics(), []
        for rows in (slice(0, 3), slice(3, 20)):
            tally = Tally(metrics)
            tally.add(outputs[rows], targets[rows])
            parts.append(tally)
        pooled = Tally(metrics)
        for tally in parts:
            before = tally.values()
            pooled.merge(tally)
            assert tally.values() == before
        assert pooled.values() == pytest.approx(self.values((outputs, targets)), rel=1e-5)

    def test_no_rows_and_outputs_that_are_not_finite_have_no_metrics(self) -> None:
        metrics = self.task.metrics()
        assert Tally(metrics).values() == {}
        outputs, targets = self.rows(6, seed=6)
        empty = self.values((outputs[:0], targets[:0]))
        assert not {name for name in empty if not name.startswith("confusion_matrix/")}
        values = self.values((outputs * torch.nan, targets))
        assert np.isnan(values.pop("loss"))
        assert all(np.isfinite(value) for value in values.values())

    def test_defaults_are_metrics(self) -> None:
        known = self.task.metrics()
        assert {*self.task.default_metrics, self.task.default_primary} <= known.keys()
        assert known[self.task.default_primary].higher_is_better is not None

    def test_synthetic_targets_are_valid_and_repeat(self) -> None:
        first, second = (self.task.synthetic_targets((4, 3), torch.Generator().manual_seed(0)) for _ in range(2))
        assert torch.equal(first, second) and self.task.targets.counted(first).all()
        assert first.numpy().dtype == self.task.targets.dtype

    def test_hard_targets_have_a_large_negative_gradient(self) -> None:
        outputs = self.rows(9, seed=7)[0].requires_grad_()
        targets, places = self.task.hard_targets(outputs.detach())
        (gradient,) = torch.autograd.grad(self.task.loss(outputs, targets, "sum"), outputs)
        assert (gradient[torch.arange(9), places] <= -0.5).all()


class ClassificationContract(TaskContract):
    task = Classification(specificity=0.8)

    def targets(self, num_rows: int, generator: np.random.Generator) -> Any:
        return generator.integers(0, self.num_classes, num_rows)

    def reference_loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return cross_entropy(outputs, targets)

    def reference_metrics(self, outputs: Any, targets: Any) -> dict[str, float]:
        probabilities = torch.from_numpy(outputs).softmax(1).numpy()
        predicted, binary = outputs.argmax(1), self.num_classes == 2
        occurring = np.unique(targets)
        found = {
            "accuracy": sklearn_metrics.accuracy_score(targets, predicted),
            "balanced_accuracy": sklearn_metrics.recall_score(
                targets, predicted, labels=occurring, average="macro", zero_division=0.0
            ),
            "brier": np.square(probabilities - np.eye(self.num_classes)[targets]).sum(1).mean() / (2 if binary else 1),
        }
        if binary and (targets.any() or predicted.any()):
            found["f1"] = sklearn_metrics.f1_score(targets, predicted)
        if not binary:
            found["f1"] = sklearn_metrics.f1_score(targets, predicted, average="macro")
        if len(occurring) == self.num_classes:
            found["auroc"] = sklearn_metrics.roc_auc_score(
                targets, probabilities[:, 1] if binary else probabilities, multi_class="ovr"
            )
            one_against_the_rest = targets == 1 if binary else np.eye(self.num_classes)[targets]
            found["average_precision"] = sklearn_metrics.average_precision_score(
                one_against_the_rest, probabilities[:, 1] if binary else probabilities
            )
        counts = sklearn_metrics.confusion_matrix(targets, predicted, labels=range(self.num_classes))
        return found | {
            f"confusion_matrix/{row}/{column}": counts[row, column]
            for row in range(self.num_classes)
            for column in range(self.num_classes)
        }

    def test_label_smoothing_is_torch_s(self) -> None:
        outputs, targets = self.rows(5, seed=8)
        expected = cross_entropy(outputs, targets, label_smoothing=0.2)
        assert self.task.loss(outputs, targets, "mean", 0.2).item() == expected.item()

    def test_one_class_leaves_out_what_it_does_not_define(self) -> None:
        outputs, _ = self.rows(6, seed=9)
        values = self.values((outputs, torch.zeros(6, dtype=torch.int64)))
        assert not {"auroc", "average_precision", "sensitivity_at_specificity"} & values.keys()
        assert {"accuracy", "balanced_accuracy", "brier", "expected_calibration_error"} <= values.keys()


class TestBinary(ClassificationContract):
    num_classes = 2

    def test_sensitivity_at_a_specificity(self) -> None:
        """Of five negatives one may be above the threshold at a specificity of 0.8: three of four positives are."""
        scores = torch.tensor([0.1, 0.2, 0.3, 0.5, 0.9, 0.25, 0.4, 0.6, 0.95])
        outputs = torch.stack([torch.zeros(9), scores], dim=1)
        targets = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1])
        assert self.values((outputs, targets))["sensitivity_at_specificity"] == 0.5

    def test_expected_calibration_error_by_hand(self) -> None:
        """Two rows with confidence 0.75 in one bin, of which one is right; one row with 0.9 that is wrong."""
        odds = torch.tensor([[3.0, 1.0], [3.0, 1.0], [1.0, 9.0]])
        targets = torch.tensor([0, 1, 0])
        expected = (2 * abs(0.5 - 0.75) + abs(0 - 0.9)) / 3
        assert self.values((odds.log(), targets))["expected_calibration_error"] == pytest.approx(expected)


class TestSeveralClasses(ClassificationContract):
    num_classes = 3

    def test_classes_that_do_not_occur_do_not_count_in_the_mean(self) -> None:
        outputs, targets = self.rows(30, seed=10)
        targets = targets % 2  # of class 2 there are none
        probabilities = outputs.double().softmax(1).numpy()
        expected = np.mean(
            [sklearn_metrics.roc_auc_score(targets == label, probabilities[:, label]) for label in (0, 1)]
        )
        values = self.values((outputs, targets))
        assert values["auroc"] == pytest.approx(expected)
        assert "sensitivity_at_specificity" not in values

    def test_the_confusion_matrix_has_the_names_of_the_classes(self) -> None:
        tally = Tally(self.task.metrics(("mild", "moderate", "severe")))
        tally.add(one_hot(torch.tensor([2, 2, 0]), 3).float(), torch.tensor([2, 0, 0]))
        values = tally.values()
        assert values["confusion_matrix/mild/severe"] == values["confusion_matrix/severe/severe"] == 1
        assert sum(value for name, value in values.items() if name.startswith("confusion_matrix/")) == 3
        assert not any(name.startswith("confusion_matrix/") for name in tally.values(pooled=False))

    def test_sequences_of_labels(self) -> None:
        outputs, targets = self.rows(12, seed=11)
        targets[3] = IGNORED
        kept = torch.arange(12) != 3
        assert self.values((outputs.view(2, 6, 3), targets.view(2, 6))) == pytest.approx(
            self.values((outputs[kept], targets[kept]))
        )


class TestRegression(TaskContract):
    task = Regression()
    num_classes = 0

    def targets(self, num_rows: int, generator: np.random.Generator) -> Any:
        return generator.standard_normal(num_rows).astype(np.float32)

    def reference_loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return mse_loss(outputs[:, 0], targets)

    def reference_metrics(self, outputs: Any, targets: Any) -> dict[str, float]:
        found = {
            "mse": sklearn_metrics.mean_squared_error(targets, outputs[:, 0]),
            "mae": sklearn_metrics.mean_absolute_error(targets, outputs[:, 0]),
        }
        return found | ({"r2": sklearn_metrics.r2_score(targets, outputs[:, 0])} if len(targets) > 1 else {})

    def test_r2_is_left_out_for_one_row_and_for_equal_targets(self) -> None:
        outputs, _ = self.rows(4, seed=8)
        assert "r2" not in self.values((outputs, torch.full((4,), 2.5)))
        assert "r2" not in self.values((outputs[:1], torch.tensor([1.0])))

    def test_r2_of_large_targets(self) -> None:
        """Sums of squares would lose what a mean of a million leaves of a deviation of one."""
        outputs, targets = self.rows(50, seed=9)
        moved = self.values((outputs.double() + 1e6, targets.double() + 1e6))
        assert moved["r2"] == pytest.approx(self.values((outputs, targets))["r2"], rel=1e-5)


CONTRACTS = pytest.mark.parametrize("contract", [TestBinary(), TestSeveralClasses(), TestRegression()], ids=str)


@CONTRACTS
@given(seed=SEEDS, num_rows=st.integers(1, 60))
def test_metrics_equal_scikit_learn_s(contract: TaskContract, seed: int, num_rows: int) -> None:
    outputs, targets = contract.rows(num_rows, seed)
    values = contract.values((outputs, targets))
    expected = contract.reference_metrics(outputs.double().numpy(), targets.numpy())
    assert {name: values.get(name) for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert values["loss"] == pytest.approx(contract.reference_loss(outputs, targets).item(), rel=1e-5)


@CONTRACTS
@given(seed=SEEDS, sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), order=SEEDS)
def test_chunks_of_rows_in_any_order_have_the_metrics_of_the_whole(
    contract: TaskContract, seed: int, sizes: list[int], order: int
) -> None:
    outputs, targets = contract.rows(sum(sizes), seed)
    shuffled = torch.from_numpy(np.random.default_rng(order).permutation(sum(sizes)))
    chunks = zip(outputs[shuffled].split(sizes), targets[shuffled].split(sizes), strict=True)
    assert contract.values(*chunks) == pytest.approx(contract.values((outputs, targets)), rel=1e-5, abs=1e-9)
