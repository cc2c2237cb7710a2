"""What every availability rule promises; a new rule is one line in CASES."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from fedrounds.fl_components.config import load_config
from fedrounds.fl_components.errors import DataError
from fedrounds.fl_components.population import Always, Availability, AvailabilityRule, Bernoulli, Diurnal, Trace
from fedrounds.fl_components.population.availability import uniform

CASES = [Always(), Bernoulli(probability=0.3), Diurnal(), Diurnal(period_rounds=2, low=0.0, high=1.0)]
ROWS = np.arange(20_000)


@pytest.mark.parametrize("rule", CASES, ids=repr)
class TestAvailabilityRule:
    def test_the_answer_does_not_depend_on_who_asks(self, rule: AvailabilityRule) -> None:
        whole = rule.available(ROWS, round=5, seed=1)
        assert whole.dtype == np.bool_
        some = np.array([17, 3, 19_999, 0])
        assert rule.available(some, round=5, seed=1).tolist() == whole[some].tolist()
        assert rule.available(ROWS[:0], round=5, seed=1).tolist() == []

    def test_written_and_read_again_it_is_the_same_rule(self, rule: AvailabilityRule) -> None:
        assert TypeAdapter(Availability).validate_json(rule.model_dump_json()) == rule


def test_bernoulli_has_its_probability_in_each_round_anew() -> None:
    first, second = (Bernoulli(probability=0.3).available(ROWS, round, seed=0) for round in (1, 2))
    for mask in (first, second):
        assert mask.mean() == pytest.approx(0.3, abs=4 * np.sqrt(0.21 / len(ROWS)))
    assert (first & second).mean() == pytest.approx(0.09, abs=0.01)  # independent


def test_diurnal_goes_up_and_down_with_each_client_s_phase() -> None:
    rule = Diurnal(period_rounds=24, low=0.1, high=0.7)
    shares = np.array([rule.available(ROWS, round, seed=0) for round in range(1, 25)])
    assert shares.mean() == pytest.approx(0.4, abs=0.01)
    assert shares.mean(axis=1) == pytest.approx(np.full(24, 0.4), abs=0.03)  # the globe turns: always somebody awake
    # A client twelve hours later is the opposite of itself.
    many = np.mean([[rule.available(ROWS, 24 * day + hour, seed=0) for hour in (0, 12)] for day in range(40)], axis=0)
    assert np.corrcoef(many[0], many[1])[0, 1] < -0.5


def test_uniform_numbers_are_uniform_and_of_different_keys_independent() -> None:
    one, other, far = (uniform(ROWS, key) for key in (1, 2, 1 + (1 << 64)))
    counts = np.histogram(one, bins=20, range=(0, 1))[0]
    expected = len(ROWS) / 20
    assert ((counts - expected) ** 2 / expected).sum() < 43.8  # chi square, 19 degrees of freedom, p = 0.001
    for another in (other, far):
        assert abs(np.corrcoef(one, another)[0, 1]) < 0.03
    assert abs(np.corrcoef(one[1:], one[:-1])[0, 1]) < 0.03


def test_a_trace_is_followed(tmp_path: Path) -> None:
    # As a spreadsheet writes it: with a byte order mark and an empty line at the end.
    (tmp_path / "trace.csv").write_text("\ufeffclient,start_round,stop_round\n0,1,3\n2,2,3\n2,5,6\n\n")
    rule = Trace(file=str(tmp_path / "trace.csv"))
    there = {round: np.flatnonzero(rule.available(np.arange(4), round, seed=0)).tolist() for round in range(1, 7)}
    assert there == {1: [0], 2: [0, 2], 3: [], 4: [], 5: [2], 6: []}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("client,start\n", "line 1: the header is 'client,start'"),
        ("client,start_round,stop_round\n1,2\n", "line 2: '1,2' is no span"),
        ("client,start_round,stop_round\n1,2,3\na,2,3\n", "line 3: 'a,2,3' is no span"),
        ("client,start_round,stop_round\n1,2,3\n\n-1,2,3\n", "line 4: '-1,2,3' is no span"),
        ("client,start_round,stop_round\n1,3,3\n", "line 2: '1,3,3' is no span"),
        ("client,start_round,stop_round\n", "holds no span"),
        ("client,start_round,stop_round\n" + "1" * 200_000, "cannot be read: field larger"),
        ("", "line 1: the header is ''"),
    ],
)
def test_a_trace_that_cannot_be_read(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "trace.csv").write_text(text)
    with pytest.raises(DataError, match=words):
        Trace(file=str(tmp_path / "trace.csv")).available(ROWS, 1, 0)


def test_a_trace_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.csv cannot be read"):
        Trace(file=str(tmp_path / "none.csv")).available(ROWS, 1, 0)


def test_a_trace_s_path_is_relative_to_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "{name: a, rounds: 1, data: {kind: heart_disease}, model: {kind: logistic_regression}, "
        "training: {learning_rate: 1, epochs: 1}, "
        "simulation: {availability: {kind: trace, file: t.csv}}}"
    )
    assert load_config(tmp_path / "c.yaml").simulation.availability == Trace(file=str(tmp_path / "t.csv"))


def test_what_makes_no_sense() -> None:
    with pytest.raises(ValidationError, match=r"low is 0\.9 and simulation\.availability\.high 0\.5"):
        Diurnal(low=0.9)
    with pytest.raises(ValidationError, match="probability"):
        Bernoulli(probability=0.0)
