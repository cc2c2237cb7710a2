from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from fl_components.data import Digits


def test_sizes() -> None:
    data = Digits().load(seed=0)
    assert (data.num_clients, data.num_classes, data.input_shape, data.public) == (10, 10, (64,), True)
    sizes = [data.num_examples(i) + len(data.test(i)[1]) for i in range(10)]
    assert sum(sizes) == 1797 and max(sizes) - min(sizes) == 1
    assert [len(data.test(i)[1]) for i in range(10)] == [int(0.2 * size) for size in sizes]
    assert data.client_ids[0] == "client-0000"
    assert data.x_train.min() == 0 and data.x_train.max() == 1


def test_every_digit_goes_to_one_client() -> None:
    from sklearn.datasets import load_digits

    data = Digits(num_clients=7).load(seed=5)
    dealt = np.concatenate([data.x_train, data.x_test]) * 16
    assert np.array_equal(np.unique(dealt, axis=0), np.unique(load_digits().data, axis=0))


def test_another_seed_deals_otherwise() -> None:
    assert not np.array_equal(Digits().load(seed=0).y_train, Digits().load(seed=1).y_train)


@pytest.mark.parametrize(
    "field",
    [{"num_clients": 0}, {"num_clients": 1798}, {"test_fraction": 1.0}, {"test_fraction": -0.1}, {"clients": 3}],
)
def test_what_makes_no_sense_is_refused(field: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Digits.model_validate(field)
