"""What every partition promises, and what the statistics of each are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from fedrounds.fl_components.data.federated import RowRanges
from fedrounds.fl_components.data.partition import Assignment, Dirichlet, Iid, Natural, Partition, QuantitySkew, Shards
from fedrounds.fl_components.data.partition.base import federate
from fedrounds.fl_components.errors import DataError
from tests.support import cases

LABELS = np.random.default_rng(0).integers(0, 10, 6000)
OWNERS = np.random.default_rng(1).integers(100, 140, 6000)
RULES = [
    Iid(num_clients=1),
    Iid(num_clients=7),
    Iid(num_clients=6000),
    Iid(num_clients=20, examples_per_client=100),
    Dirichlet(num_clients=20, alpha=0.3),
    Dirichlet(num_clients=5, alpha=100.0, min_examples=900),
    Dirichlet(num_clients=1, alpha=0.001),
    Shards(num_clients=20),
    Shards(num_clients=7, shards_per_client=3),
    QuantitySkew(num_clients=30, sigma=1.5),
    QuantitySkew(num_clients=60, sigma=3.0, min_examples=100),
    Natural(),
]
OVERLAPPING = [
    Iid(num_clients=61, examples_per_client=100),
    Iid(num_clients=50_000, examples_per_client=20),
    Iid(num_clients=2, examples_per_client=6000),
]


def deal(rule: Any, seed: int = 0, labels: np.ndarray = LABELS) -> Assignment:
    return rule.deal(labels, np.random.default_rng(seed), OWNERS)


def counts_nC(dealt: Assignment, labels: np.ndarray) -> np.ndarray:
    """Labels of each client, counted one by one."""
    parts = zip(dealt.rows.starts, dealt.rows.stops, strict=True)
    return np.array([np.bincount(labels[dealt.order[start:stop]], minlength=labels.max() + 1) for start, stop in parts])


def labels_of_a_client(dealt: Assignment, labels: np.ndarray) -> np.ndarray:
    return (counts_nC(dealt, labels) > 0).sum(axis=1)


@pytest.mark.parametrize("rule", RULES + OVERLAPPING, ids=repr)
class TestPartitionRule:
    def test_the_same_seed_gives_the_same_bits(self, rule: Partition) -> None:
        one, other = deal(rule, seed=3), deal(rule, seed=3)
        assert np.array_equal(one.order, other.order)
        assert np.array_equal(one.rows.starts, other.rows.starts)
        assert np.array_equal(one.rows.stops, other.rows.stops)
        assert one.client_ids == other.client_ids

    def test_no_client_is_empty_and_all_rows_of_the_order_are_somebodys(self, rule: Partition) -> None:
        dealt = deal(rule)
        num_clients = rule.known_num_clients() or len(np.unique(OWNERS))
        assert len(dealt.client_ids) == len(dealt.rows.starts) == len(dealt.rows.stops) == num_clients
        assert dealt.rows.lengths.min() >= getattr(rule, "min_examples", 1)
        owned = np.zeros(len(dealt.order) + 1, np.int64)
        np.add.at(owned, dealt.rows.starts, 1)
        np.add.at(owned, dealt.rows.stops, -1)
        assert np.cumsum(owned)[:-1].min() >= 1
        assert dealt.rows.starts.min() == 0 and dealt.rows.stops.max() == len(dealt.order)

    def test_the_order_has_no_row_twice(self, rule: Partition) -> None:
        order = deal(rule).order
        assert len(np.unique(order)) == len(order) <= len(LABELS)
        assert 0 <= order.min() <= order.max() < len(LABELS)

    def test_written_and_read_again_it_is_the_same_rule(self, rule: Partition) -> None:
        assert TypeAdapter(Partition).validate_python(rule.model_dump(mode="json")) == rule


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_clients_share_no_rows(rule: Partition) -> None:
    rows = deal(rule).rows
    assert np.array_equal(rows.starts, RowRanges.consecutive(rows.lengths).starts)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in (Natural(), RULES[3])], ids=repr)
def test_all_rows_are_dealt_and_another_seed_deals_otherwise(rule: Partition) -> None:
    assert np.array_equal(np.sort(deal(rule).order), np.arange(len(LABELS)))
    assert not np.array_equal(deal(rule).order, deal(rule, seed=1).order)


class TestIid:
    def test_it_is_a_permutation_cut_by_array_split(self) -> None:
        dealt = deal(Iid(num_clients=7), seed=5)
        parts = np.array_split(np.random.default_rng(5).permutation(len(LABELS)), 7)
        assert dealt.rows.lengths.tolist() == [len(part) for part in parts]
        assert np.array_equal(dealt.order, np.concatenate(parts))

    def test_windows_are_evenly_spaced(self) -> None:
        dealt = deal(Iid(num_clients=50_000, examples_per_client=20))
        assert set(dealt.rows.lengths.tolist()) == {20}
        assert set(np.diff(dealt.rows.starts).tolist()) <= {0, 1}

    def test_a_million_clients_are_two_tables_of_offsets(self) -> None:
        dealt = deal(Iid(num_clients=1_000_000, examples_per_client=20))
        assert dealt.rows.starts.nbytes + dealt.rows.stops.nbytes == 16_000_000
        assert len(dealt.client_ids) == 1_000_000 and dealt.client_ids[5] == "client-000005"

    def test_labels_are_those_of_the_table(self) -> None:
        # Pearson's statistic of 20 x 10 counts against the pooled shares: chi-squared with 171 degrees of freedom,
        # whose 99.99 % quantile is 247.
        counts = counts_nC(deal(Iid(num_clients=20)), LABELS)
        expected = counts.sum(axis=1, keepdims=True) * np.bincount(LABELS) / len(LABELS)
        assert ((counts - expected) ** 2 / expected).sum() < 247


class TestDirichlet:
    def test_shares_are_those_of_the_distribution(self) -> None:
        # A client's share of a label is Beta(alpha, (n - 1) alpha): mean 1/n, variance (n - 1) / (n^2 (n alpha + 1)).
        n, alpha, labels = 10, 2.0, np.arange(40_000) % 40
        share = counts_nC(deal(Dirichlet(num_clients=n, alpha=alpha), labels=labels), labels) / 1000
        assert share.mean() == pytest.approx(1 / n)
        assert share.var() == pytest.approx((n - 1) / (n**2 * (n * alpha + 1)), rel=0.25)

    def test_a_small_alpha_gives_few_labels_and_a_large_one_all(self) -> None:
        few = labels_of_a_client(deal(Dirichlet(num_clients=5, alpha=0.01)), LABELS)
        some = labels_of_a_client(deal(Dirichlet(num_clients=5, alpha=0.2)), LABELS)
        all_ten = labels_of_a_client(deal(Dirichlet(num_clients=5, alpha=100.0)), LABELS)
        assert few.mean() <= 3 < some.mean() < all_ten.mean() == 10
        assert few.sum() < some.sum()

    def test_a_label_that_does_not_occur_is_no_trouble(self) -> None:
        labels = LABELS * 3
        assert len(deal(Dirichlet(num_clients=9, alpha=1.0), labels=labels).order) == len(labels)

    @pytest.mark.parametrize(
        "rule",
        [
            Dirichlet(num_clients=1000, alpha=0.001),
            Dirichlet(num_clients=20, alpha=0.1, min_examples=290),
            Dirichlet(num_clients=100_000, alpha=1.0),
        ],
    )
    def test_rather_than_leave_clients_short_it_refuses(self, rule: Dirichlet) -> None:
        with pytest.raises(DataError, match=r"clients") as caught:
            deal(rule)
        assert caught.value.hint is not None and "num_clients" in caught.value.hint


class TestShards:
    def test_as_mcmahan_has_it(self) -> None:
        # 100 clients, 200 shards of 30 rows; every label has the rows of 20 shards: a shard has one label.
        labels = np.random.default_rng(2).permutation(np.arange(6000) % 10)
        dealt = deal(Shards(num_clients=100), labels=labels)
        assert set(dealt.rows.lengths.tolist()) == {60}
        assert set(labels_of_a_client(dealt, labels).tolist()) == {1, 2}
        assert set(np.unique(counts_nC(dealt, labels)).tolist()) == {0, 30, 60}

    def test_a_shard_across_two_labels_adds_one(self) -> None:
        assert labels_of_a_client(deal(Shards(num_clients=100)), LABELS).max() <= 4
        assert labels_of_a_client(deal(Shards(num_clients=100)), LABELS).mean() < 2.2

    def test_a_clients_rows_are_mixed(self) -> None:
        labels = LABELS[deal(Shards(num_clients=10)).order[:600]]
        assert np.count_nonzero(np.diff(labels)) > 50


class TestQuantitySkew:
    def test_the_logarithm_of_sizes_has_the_deviation_sigma(self) -> None:
        # The deviation of n log-sizes is sigma up to about sigma / sqrt(2 n): here 3.2 %, four of them allowed.
        labels = np.zeros(2_000_000, np.int64)
        sizes = deal(QuantitySkew(num_clients=500, sigma=0.8), labels=labels).rows.lengths
        assert np.log(sizes).std() == pytest.approx(0.8, rel=0.13)
        assert sizes.mean() > 1.2 * np.median(sizes)  # exp(sigma^2 / 2) = 1.38 times

    def test_without_skew_all_are_equal(self) -> None:
        assert set(deal(QuantitySkew(num_clients=40, sigma=0.0)).rows.lengths.tolist()) == {150}


class TestNatural:
    def test_a_client_is_an_owner(self) -> None:
        dealt = deal(Natural())
        assert dealt.client_ids == tuple(f"client-{owner:04d}" for owner in np.unique(OWNERS))
        for client, owner in enumerate(np.unique(OWNERS)):
            rows = dealt.order[dealt.rows.starts[client] : dealt.rows.stops[client]]
            assert rows.tolist() == np.flatnonzero(owner == OWNERS).tolist()

    def test_without_owners_it_is_refused(self) -> None:
        with pytest.raises(DataError, match="who made each row, and this data does not"):
            Natural().deal(LABELS, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("rule", "words", "mend"),
    [
        (
            Iid(num_clients=6001),
            "6000 rows cannot give 6001 clients 1 row",
            "at most 6000, or give examples_per_client",
        ),
        (Iid(num_clients=3, examples_per_client=6001), "examples_per_client is 6001", "at most 6000"),
        (Shards(num_clients=3001), "3001 clients 2 row", "at most 6000"),
        (QuantitySkew(num_clients=60, sigma=1.0, min_examples=101), "60 clients 101 row", "min_examples smaller"),
        (Dirichlet(num_clients=60, alpha=1.0, min_examples=101), "60 clients 101 row", "min_examples smaller"),
    ],
)
def test_a_partition_that_leaves_clients_empty_is_refused(rule: Partition, words: str, mend: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        deal(rule)
    assert caught.value.hint is not None and mend in caught.value.hint


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "iid"},
        {"kind": "iid", "num_clients": 0},
        {"kind": "iid", "num_clients": 3, "examples_per_client": 0},
        {"kind": "dirichlet", "num_clients": 3},
        {"kind": "dirichlet", "num_clients": 3, "alpha": 0},
        {"kind": "dirichlet", "num_clients": 3, "alpha": 1, "min_examples": 0},
        {"kind": "shards", "num_clients": 3, "shards_per_client": 0},
        {"kind": "quantity_skew", "num_clients": 3, "sigma": -1},
        {"kind": "natural", "num_clients": 3},
    ],
    ids=repr,
)
def test_what_makes_no_sense_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Partition).validate_python(fields)


ANY_RULE = st.integers(1, 12).flatmap(
    lambda n: st.one_of(
        st.builds(Iid, num_clients=st.just(n), examples_per_client=st.none() | st.integers(1, 20)),
        st.builds(Dirichlet, num_clients=st.just(n), alpha=st.floats(1e-3, 1e3), min_examples=st.integers(1, 3)),
        st.builds(Shards, num_clients=st.just(n), shards_per_client=st.integers(1, 4)),
        st.builds(QuantitySkew, num_clients=st.just(n), sigma=st.floats(0, 10), min_examples=st.integers(1, 3)),
    )
)


@settings(max_examples=cases(100), deadline=None)
@given(rule=ANY_RULE, labels=st.lists(st.integers(0, 5), min_size=1, max_size=60), seed=st.integers(0, 2**32))
def test_any_table_is_dealt_whole_or_refused_with_the_mend(rule: Any, labels: list[int], seed: int) -> None:
    try:
        dealt = rule.deal(np.array(labels), np.random.default_rng(seed))
    except DataError as error:
        assert error.hint
        return
    assert dealt.rows.lengths.min() >= getattr(rule, "min_examples", 1)
    assert len(dealt.rows.starts) == rule.num_clients
    assert len(np.unique(dealt.order)) == len(dealt.order) == dealt.rows.stops.max()
    if getattr(rule, "examples_per_client", None) is None:
        assert len(dealt.order) == len(labels)


class TestFederate:
    def test_rows_keep_their_labels_and_pixels_become_numbers_up_to_one(self) -> None:
        y = np.arange(50) % 10
        x = (y[:, None] * 25).astype(np.uint8)
        data = federate(Shards(num_clients=5), 3, (x, y), (x[:10], y[:10]), num_classes=10, public=True)
        assert data.x_train.dtype == np.float32
        np.testing.assert_allclose(data.x_train[:, 0], data.y_train * 25 / 255, rtol=1e-6)
        assert [len(data.test(client)[1]) for client in range(5)] == [0] * 5
        assert np.array_equal(data.unowned_test()[1], y[:10])
        assert data.public
