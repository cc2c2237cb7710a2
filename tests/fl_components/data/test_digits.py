from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from fedrounds.fl_components.data import Digits
from fedrounds.fl_components.data.partition import Dirichlet, Iid, Shards
from fedrounds.fl_components.errors import DataError


def test_sizes() -> None:
    data = Digits().load(seed=0)
    assert (data.num_clients, data.num_classes, data.input_shape, data.public) == (10, 10, (64,), True)
    sizes = [data.num_examples(i) + len(data.test(i)[1]) for i in range(10)]
    assert sum(sizes) == 1797 and max(sizes) - min(sizes) == 1
    assert [len(data.test(i)[1]) for i in range(10)] == [int(0.2 * size) for size in sizes]
    assert data.client_ids[0] == "client-0000"
    assert data.x_train.min() == 0 and data.x_train.max() == 1


@pytest.mark.parametrize(
    "partition", [Iid(num_clients=7), Dirichlet(num_clients=7, alpha=0.5), Shards(num_clients=7)], ids=repr
)
def test_every_digit_goes_to_one_client(partition: Any) -> None:
    from sklearn.datasets import load_digits

    data = Digits(partition=partition).load(seed=5)
    dealt = np.concatenate([data.x_train, data.x_test]) * 16
    assert np.array_equal(np.unique(dealt, axis=0), np.unique(load_digits().data, axis=0))


def test_another_seed_deals_otherwise() -> None:
    assert not np.array_equal(Digits().load(seed=0).y_train, Digits().load(seed=1).y_train)


@pytest.mark.parametrize(
    "field",
    [{"num_clients": 3}, {"test_fraction": 1.0}, {"test_fraction": -0.1}, {"partition": {"kind": "iid"}}],
)
def test_what_makes_no_sense_is_refused(field: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Digits.model_validate(field)


def test_a_client_tests_on_the_first_of_its_rows() -> None:
    whole = Digits(partition=Iid(num_clients=6), test_fraction=0.0).load(seed=2)
    parted = Digits(partition=Iid(num_clients=6), test_fraction=0.3).load(seed=2)
    for client in range(6):
        x, y = whole.train(client)
        first = int(0.3 * len(y))
        found = (*parted.test(client), *parted.train(client))
        expected = (x[:first], y[:first], x[first:], y[first:])
        assert all(np.array_equal(*both) for both in zip(found, expected, strict=True))


def test_more_clients_than_digits_share_them_where_nobody_tests() -> None:
    population = Iid(num_clients=5000, examples_per_client=10)
    data = Digits(partition=population, test_fraction=0.0).load(seed=0)
    assert (data.num_clients, data.num_examples(4999), len(data.y_train)) == (5000, 10, 1797)
    with pytest.raises(DataError, match="one's test rows would be another's training rows"):
        Digits(partition=population).load(seed=0)


def test_too_many_clients_are_refused() -> None:
    with pytest.raises(DataError, match="1797 rows cannot give 1798 clients"):
        Digits(partition=Iid(num_clients=1798)).load(seed=0)
