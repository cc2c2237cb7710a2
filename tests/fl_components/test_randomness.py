"""A draw depends on what it is for, and on nothing that was drawn before it."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedrounds.fl_components.randomness import derive_key, generator

sources = st.integers(0, 2**70) | st.binary(min_size=1, max_size=40).filter(lambda secret: not secret.isdigit())
draws = st.tuples(sources, st.integers(0, 2**40), st.text(), st.text())


@given(draws, draws)
def test_keys_differ_exactly_where_draws_do(a: tuple[int, int, str, str], b: tuple[int, int, str, str]) -> None:
    assert (derive_key(*a) == derive_key(*b)) == (a == b)
    assert 0 <= derive_key(*a) < 2**128


def test_parts_cannot_flow_into_each_other() -> None:
    keys = [
        derive_key(1, 23, "a", "bc"),
        derive_key(12, 3, "a", "bc"),
        derive_key(1, 23, "ab", "c"),
        derive_key(1, 23, "abc"),
        derive_key(1, 23, "", "abc"),
    ]
    assert len(set(keys)) == len(keys)


def test_the_same_draw_in_every_version() -> None:
    # Runs that were begun before depend on these numbers.
    assert derive_key(7, 3, "training", "va") == 114314936786057672280022684931315900254
    assert generator(7, 3, "selection").integers(1000, size=4).tolist() == [764, 314, 861, 398]


def test_other_draws_change_nothing() -> None:
    expected = generator(0, 1, "selection").random(5)
    other = generator(0, 1, "training", "a")
    other.random(1000)
    np.random.seed(3)
    assert np.array_equal(generator(0, 1, "selection").random(5), expected)
    assert not np.array_equal(generator(0, 2, "selection").random(5), expected)
    assert not np.array_equal(generator(1, 1, "selection").random(5), expected)


def test_clients_draw_independently() -> None:
    drawn = np.array([generator(0, 1, "training", f"client-{i}").standard_normal(200) for i in range(50)])
    correlation = np.corrcoef(drawn) - np.eye(50)
    assert np.abs(correlation).max() < 5 / np.sqrt(200)
