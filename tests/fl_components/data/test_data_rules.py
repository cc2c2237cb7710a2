"""What every data rule promises; each rule's own values and refusals are in its own file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from fedrounds.fl_components.arrays import IGNORED
from fedrounds.fl_components.data import (
    Data,
    Digits,
    Emnist,
    FederatedData,
    Femnist,
    FunctionData,
    HeartDisease,
    Leaf,
    Mnist,
    Shakespeare,
    Tables,
)
from fedrounds.fl_components.data.partition import Dirichlet, Iid, QuantitySkew, Shards
from fedrounds.fl_components.rules import kind_of
from tests.fl_components.data.idx_files import write_emnist, write_femnist, write_mnist

RULES = [
    HeartDisease(),
    HeartDisease(normalisation="per_client"),
    Digits(),
    Digits(partition=Iid(num_clients=1797), test_fraction=0.0),
    Digits(partition=Shards(num_clients=3), test_fraction=0.9),
    Mnist(),
    Mnist(partition=QuantitySkew(num_clients=12, sigma=1.0)),
    Emnist(split="letters", partition=Dirichlet(num_clients=4, alpha=1.0)),
    Femnist(),
    Femnist(partition=Iid(num_clients=5)),
    Shakespeare(),
    Shakespeare(sequence_length=7, test_fraction=0.5),
    Leaf(folder="leaf"),
    Leaf(folder="leaf", shape=(2, 1), num_classes=2),
    Leaf(folder="leaf_text", vocabulary="ab"),
    Tables(folder="tables", label="ill"),
    Tables(folder="tables", label="ill", columns=["age"], scale={"age": (50, 10)}, classes=[1, 0], test_fraction=0.5),
    FunctionData(path="ward_data:load", arguments={"rows": 5}),
]

VOCABULARY = 80  # of no rule's text here are there more characters

PLAY = "A:\n" + "to be or not to be, " * 9 + "\n\nB:\n" + "or to be not to. " * 9 + "\n"

LEAF = {
    "leaf": {
        "users": ["a", "b"],
        "num_samples": [2, 1],
        "user_data": {"a": {"x": [[1, 2.5], [3, 4]], "y": [0, 1]}, "b": {"x": [[5, 6]], "y": [1]}},
    },
    "leaf_text": {
        "users": ["a"],
        "num_samples": [2],
        "user_data": {"a": {"x": ["abba", "baba"], "y": ["a", "b"]}},
    },
}

WARD_DATA = """
import numpy as np

def load(rows):
    rng = np.random.default_rng(0)
    a = rng.normal(size=(rows, 2, 3)), np.arange(rows) % 3
    b = rng.normal(size=(1, 2, 3)), np.zeros(1, int), rng.normal(size=(2, 2, 3)), np.ones(2, int)
    return {"a": a, "b": b}
"""


@pytest.mark.parametrize("rule", RULES, ids=repr)
class TestDataRule:
    @pytest.fixture(autouse=True)
    def ward(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "ward_data.py").write_text(WARD_DATA)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("FEDROUNDS_DATA", str(tmp_path))
        write_mnist(tmp_path / "mnist")
        write_emnist(tmp_path / "emnist", "letters", 26, first=1)
        write_femnist(tmp_path / "femnist")
        monkeypatch.chdir(tmp_path)
        (tmp_path / "shakespeare").mkdir()
        (tmp_path / "shakespeare" / "input.txt").write_text(PLAY)
        for name, users in LEAF.items():
            for part in ("train", "test"):
                (tmp_path / name / part).mkdir(parents=True)
                (tmp_path / name / part / "all.json").write_text(json.dumps(users))
        (tmp_path / "tables").mkdir()
        for ward in ("north", "south"):
            (tmp_path / "tables" / f"{ward}.csv").write_text("age,ill\n" + "1.5,0\n2,1\n" * 8)

    def test_the_same_seed_gives_the_same_bits(self, rule: Data) -> None:
        first, second = rule.load(seed=3), rule.load(seed=3)
        assert first.client_ids == second.client_ids
        for name in ("x_train", "y_train", "x_test", "y_test"):
            assert np.array_equal(getattr(first, name), getattr(second, name)), name
        for name in ("train_rows", "test_rows"):
            one, other = getattr(first, name), getattr(second, name)
            assert np.array_equal(one.starts, other.starts) and np.array_equal(one.stops, other.stops), name

    def test_clients_own_all_rows_and_none_twice(self, rule: Data) -> None:
        data = rule.load(seed=0)
        assert rule.known_num_clients() in (None, data.num_clients)
        clients = range(data.num_clients)
        assert sum(data.num_examples(i) for i in clients) == len(data.x_train) == len(data.y_train)
        assert np.array_equal(np.concatenate([data.train(i)[0] for i in clients]), data.x_train)
        assert np.array_equal(np.concatenate([data.train(i)[1] for i in clients]), data.y_train)
        tests = [*(data.test(i) for i in clients), data.unowned_test()]
        assert np.array_equal(np.concatenate([x for x, _ in tests]), data.x_test)
        assert np.array_equal(np.concatenate([y for _, y in tests]), data.y_test)
        for i in clients:
            x, y = data.train(i)
            assert len(x) == len(y) == data.num_examples(i) > 0
            assert np.shares_memory(x, data.x_train)

    def test_values_are_in_range(self, rule: Data) -> None:
        data = rule.load(seed=0)
        assert len(set(data.client_ids)) == data.num_clients
        for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test)):
            assert x.dtype in (np.float32, np.int64) and x.shape[1:] == data.input_shape
            assert np.isfinite(x).all() and np.abs(x).max(initial=0) < (20 if x.dtype == np.float32 else VOCABULARY)
            assert y.dtype == np.int64
            counted = y[y != IGNORED]
            assert not len(y) or 0 <= counted.min() <= counted.max() < data.num_classes
        if data.y_train.ndim == 1:
            assert np.unique(data.y_train).size == data.num_classes

    def test_baselines_are_those_of_a_plain_count(self, rule: Data) -> None:
        data = rule.load(seed=0)
        if data.y_train.ndim > 1:
            assert data.baselines().keys() == {"unigram", "bigram"}  # their values: in the rules' own tests
            return
        pooled = majority(data.y_train.tolist())
        own = [
            label == majority(data.train(i)[1].tolist())
            for i in range(data.num_clients)
            for label in data.test(i)[1].tolist()
        ]
        hits = {"pooled_majority": [label == pooled for label in data.y_test.tolist()], "client_majority": own}
        expected = {name: float(np.mean(found)) for name, found in hits.items() if found}
        assert data.baselines() == pytest.approx(expected)

    def test_written_and_read_again_it_is_the_same_rule(self, rule: Data) -> None:
        assert TypeAdapter(Data).validate_python(rule.model_dump(mode="json")) == rule


def majority(labels: list[int]) -> int:
    return max(sorted(set(labels)), key=labels.count)


def test_the_union_names_the_kinds_it_knows() -> None:
    kinds = ", ".join(repr(kind_of(rule)) for rule in Data.__origin__.__args__)
    with pytest.raises(ValidationError, match=kinds):
        TypeAdapter(Data).validate_python({"kind": "mnits"})


def test_baselines_need_no_test_rows() -> None:
    assert Digits(test_fraction=0.0).load(seed=0).baselines() == {}


def test_loading_gives_federated_data() -> None:
    assert isinstance(Digits().load(seed=0), FederatedData)
