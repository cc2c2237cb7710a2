"""Whose data these are: what is done to the files, and to the configuration, must not change the answer."""

from __future__ import annotations

import csv
import datetime as dt
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedrounds.fl_components.data import FederatedData, FunctionData, HeartDisease, Tables
from fedrounds.fl_components.data.fingerprints import (
    MAX_COLUMNS,
    Fingerprints,
    column_hash,
    is_calendar,
    of_rows_scaled,
)
from fedrounds.fl_components.errors import DataError
from fedrounds.fl_components.server.ownership import KeyedData, Match, keyed, matches

KEY = bytes(range(32))
Rows = list[dict[str, Any]]
Files = dict[str, Rows]


def hospitals(seed: int = 0, num_files: int = 3, num_rows: int = 40) -> Files:
    """Patients of several hospitals: whole numbers, decimals, words, and a label."""
    found: Files = {}
    for file in range(num_files):
        draw = random.Random(f"{seed} {file}")
        found[f"h{file}"] = [
            {
                "age": draw.randint(30, 80),
                "pressure": draw.randint(100, 180),
                "level": round(draw.gauss(5, 2), 3),
                "pain": draw.choice(["typical", "atypical", "none"]),
                "disease": draw.randint(0, 1),
            }
            for _ in range(num_rows)
        ]
    return found


def data_of(files: Files, key: bytes = KEY) -> KeyedData:
    tables = {
        name: {column: pd.Series([row[column] for row in rows]) for column in rows[0]} for name, rows in files.items()
    }
    return keyed(Fingerprints.of_tables(tables), key)


def bound(data: KeyedData, population: str = "wards") -> dict[str, set[tuple[str, str]]]:
    """As the store gives them."""
    return {digest: {(population, client)} for digest, client in data.recorded.items()}


def populations(mine: KeyedData, of: KeyedData) -> set[str]:
    return {match.population for match in matches(mine, bound(of))}


def renamed_clients(files: Files, _: random.Random) -> Files:
    return {f"annexe {name}": rows for name, rows in files.items()}


def shuffled_rows(files: Files, draw: random.Random) -> Files:
    return {name: draw.sample(rows, len(rows)) for name, rows in files.items()}


def shuffled_columns(files: Files, draw: random.Random) -> Files:
    order = draw.sample([*next(iter(files.values()))[0]], 5)
    return {name: [{column: row[column] for column in order} for row in rows] for name, rows in files.items()}


def duplicated_rows(files: Files, _: random.Random) -> Files:
    return {name: rows + rows for name, rows in files.items()}


def fewer_rows(files: Files, draw: random.Random) -> Files:
    return {name: draw.sample(rows, len(rows) * 9 // 10) for name, rows in files.items()}


def a_tenth_of_the_rows(files: Files, draw: random.Random) -> Files:
    return {name: draw.sample(rows, len(rows) // 8) for name, rows in files.items()}


def padded(files: Files, draw: random.Random) -> Files:
    strangers = hospitals(seed=draw.randint(1000, 2000))
    return {name: rows + strangers[name][: len(rows) // 2] for name, rows in files.items()}


def split_clients(files: Files, _: random.Random) -> Files:
    return {f"{name}{part}": rows[part::2] for name, rows in files.items() for part in (0, 1)}


def a_client_for_each_row(files: Files, _: random.Random) -> Files:
    return {f"{name} {number}": [row] for name, rows in files.items() for number, row in enumerate(rows)}


def merged_clients(files: Files, _: random.Random) -> Files:
    return {"all": [row for rows in files.values() for row in rows]}


def copied_clients(files: Files, _: random.Random) -> Files:
    """So that several clients hold each row."""
    return files | {f"{name} again": rows for name, rows in files.items()}


def a_further_column(files: Files, draw: random.Random) -> Files:
    return {name: [row | {"ward": draw.randint(1, 1000)} for row in rows] for name, rows in files.items()}


def without_a_column(files: Files, draw: random.Random) -> Files:
    column = draw.choice([*next(iter(files.values()))[0]])
    return {name: [{key: row[key] for key in row if key != column} for row in rows] for name, rows in files.items()}


def two_columns_alone(files: Files, _: random.Random) -> Files:
    return {name: [{key: row[key] for key in ("level", "disease")} for row in rows] for name, rows in files.items()}


def renamed_columns(files: Files, _: random.Random) -> Files:
    return {
        name: [{f"x{place}": row[key] for place, key in enumerate(row)} for row in rows] for name, rows in files.items()
    }


def rescaled(files: Files, _: random.Random) -> Files:
    """In the file itself: all numbers, also turned round."""
    return {
        name: [
            row | {"age": (50 - row["age"]) / 10, "pressure": row["pressure"] * 0.1333, "level": row["level"] * 18 + 1}
            for row in rows
        ]
        for name, rows in files.items()
    }


def two_further_constants(files: Files, _: random.Random) -> Files:
    return {name: [row | {"site": 3, "study": "A7"} for row in rows] for name, rows in files.items()}


def two_further_numbers_of_rows(files: Files, _: random.Random) -> Files:
    return {
        name: [row | {"number": number, "visit": f"V-{7 * number:04}"} for number, row in enumerate(rows)]
        for name, rows in files.items()
    }


def as_text(files: Files, draw: random.Random) -> Files:
    def spelled(value: Any) -> str:
        if isinstance(value, str):
            return f" {value} "
        if isinstance(value, int):
            return draw.choice([f"{value}", f"{value}.0", f"+{value}", f"{value}e0", f"{value},0", f"0{value}"])
        return draw.choice([f"{value}", f"{value:.5f}", f"{value}".replace(".", ","), f"{value:e}"])

    return {name: [{key: spelled(value) for key, value in row.items()} for row in rows] for name, rows in files.items()}


CHANGES: list[Callable[[Files, random.Random], Files]] = [
    renamed_clients,
    shuffled_rows,
    shuffled_columns,
    duplicated_rows,
    fewer_rows,
    a_tenth_of_the_rows,
    padded,
    split_clients,
    a_client_for_each_row,
    merged_clients,
    copied_clients,
    a_further_column,
    two_further_constants,
    two_further_numbers_of_rows,
    without_a_column,
    renamed_columns,
    as_text,
]

ORIGINAL = data_of(hospitals())


def daily(column: str, clients: list[str], *years: int) -> Files:
    """What clients measured each day, with a column of the calendar."""
    found: Files = {}
    for place, client in enumerate(clients):
        year, draw = years[place % len(years)], random.Random(f"{client} {years}")
        days = [dt.date(year, 1, 1) + dt.timedelta(number) for number in range(365)]
        if column == "working day":
            days = [day for day in days if day.weekday() < 5]
        if column == "month's end":
            days = [day for day in days if (day + dt.timedelta(1)).day == 1] * 3
        found[client] = [
            {
                column: {
                    "month": day.month,
                    "month's name": day.strftime("%B"),
                    "day": day.day,
                    "date": day.isoformat(),
                    "number": number,
                    "working day": day.toordinal(),
                    "month's end": day.toordinal(),
                }[column],
                "load": round(draw.gauss(50, 9), 3),
                "wind": round(draw.gauss(5, 2), 3),
                "peak": draw.randint(0, 1),
            }
            for number, day in enumerate(days)
        ]
    return found


class TestWhatIsDoneToFiles:
    @settings(max_examples=25)
    @given(st.sampled_from(CHANGES), st.integers(0, 2**32))
    def test_one_change(self, change: Callable[..., Files], seed: int) -> None:
        assert populations(data_of(change(hospitals(), random.Random(seed))), ORIGINAL) == {"wards"}

    @pytest.mark.parametrize("change", [rescaled, two_columns_alone])
    def test_what_leaves_the_rows_of_a_client_together(self, change: Callable[..., Files]) -> None:
        """Few columns are left, or none has its numbers: their values are still those of the same patients."""
        changed = renamed_columns(
            shuffled_rows(renamed_clients(change(hospitals(), random.Random(0)), random.Random(0)), random.Random(0)),
            random.Random(0),
        )
        assert populations(data_of(changed), ORIGINAL) == {"wards"}

    @pytest.mark.parametrize("change", [duplicated_rows, merged_clients, split_clients, renamed_clients])
    def test_rows_in_other_units_are_recognised_together(self, change: Callable[..., Files]) -> None:
        changed = rescaled(change(hospitals(), random.Random(0)), random.Random(0))
        assert populations(data_of(changed), ORIGINAL) == {"wards"}

    def test_clients_of_a_few_rows_in_other_units(self) -> None:
        small = hospitals(num_files=8, num_rows=15)
        assert populations(data_of(rescaled(small, random.Random(0))), data_of(small)) == {"wards"}

    @pytest.mark.parametrize("change", [two_further_constants, two_further_numbers_of_rows])
    @pytest.mark.parametrize("rows", [split_clients, fewer_rows, padded])
    def test_columns_that_tell_nothing_hide_nothing(
        self, change: Callable[..., Files], rows: Callable[..., Files]
    ) -> None:
        changed = change(rows(hospitals(), random.Random(0)), random.Random(0))
        assert populations(data_of(changed), ORIGINAL) == {"wards"}

    @pytest.mark.parametrize("change", [a_further_column, without_a_column, a_tenth_of_the_rows, split_clients])
    def test_a_table_of_many_columns(self, change: Callable[..., Files]) -> None:
        draw = random.Random(0)
        wide: Files = {
            f"h{file}": [{f"gene {column}": round(draw.gauss(0, 1), 4) for column in range(80)} for _ in range(40)]
            for file in range(2)
        }
        assert populations(data_of(change(wide, draw)), data_of(wide)) == {"wards"}

    @settings(max_examples=25)
    @given(
        st.lists(
            st.sampled_from(
                [renamed_clients, shuffled_rows, shuffled_columns, duplicated_rows, split_clients, as_text]
            ),
            max_size=4,
        ),
        st.integers(0, 2**32),
    )
    def test_several_changes(self, changes: list[Callable[..., Files]], seed: int) -> None:
        files, draw = hospitals(), random.Random(seed)
        for change in sorted(changes, key=lambda each: each is as_text):  # other changes read numbers
            files = change(files, draw)
        files = renamed_columns(fewer_rows(files, draw), draw)
        assert populations(data_of(files), ORIGINAL) == {"wards"}

    @settings(max_examples=25)
    @given(st.integers(1, 2**32))
    def test_strangers_are_strangers(self, seed: int) -> None:
        """Other patients, whose ages and pressures lie in the same ranges."""
        assert populations(data_of(hospitals(seed)), ORIGINAL) == set()

    @settings(max_examples=25)
    @given(st.integers(1, 2**32))
    def test_tables_of_a_few_answers_are_not_taken_for_others(self, seed: int) -> None:
        """Where rows are anybody's, only all of a client's rows together tell it."""

        def answers(seed: int) -> Files:
            draw = random.Random(seed)
            return {
                f"h{file}": [{column: draw.randint(0, 1) for column in "abcd"} for _ in range(200)] for file in range(3)
            }

        assert populations(data_of(answers(seed)), data_of(answers(0))) == set()
        assert populations(data_of(shuffled_rows(answers(0), random.Random(seed))), data_of(answers(0))) == {"wards"}

    @pytest.mark.parametrize("column", ["month", "month's name", "day", "date", "number", "working day", "month's end"])
    def test_a_calendar_is_anybodys(self, column: str) -> None:
        """Strangers who count by the same days are strangers, and so are two clients of one population."""
        mine, yours = data_of(daily(column, ["shop"], 2023)), data_of(daily(column, ["mill", "farm"], 2023, 2024))
        assert populations(yours, mine) == set()
        both = data_of(daily(column, ["shop", "bank"], 2023))
        assert {(each.client, each.owner) for each in matches(both, bound(both)) if each.client and each.owner} == {
            ("shop", "shop"),
            ("bank", "bank"),
        }

    def test_one_measurement_beside_a_calendar_is_enough(self) -> None:
        """Rows that hold a date alone are equal for strangers, and identify no client."""

        def loads(*clients: str) -> Files:
            files = daily("date", [*clients], 2023)
            return {name: [{key: row[key] for key in ("date", "load")} for row in files[name]] for name in files}

        assert populations(data_of(loads("mill")), data_of(loads("shop"))) == set()
        assert populations(data_of(loads("shop")), data_of(loads("shop", "mill"))) == {"wards"}

    def test_a_wide_table_has_a_bounded_number_of_views_and_may_lose_a_column(self) -> None:
        draw = random.Random(0)
        wide = {name: [{f"c{place}": draw.random() for place in range(150)} for _ in range(20)] for name in "ab"}
        recorded = Fingerprints.of_tables({name: pd.DataFrame(rows) for name, rows in wide.items()})
        assert all(len(each.views) <= MAX_COLUMNS + 3 for each in recorded.clients.values())
        fewer = {name: [{key: row[key] for key in row if key != "c7"} for row in rows] for name, rows in wide.items()}
        assert populations(data_of(fewer), data_of(wide)) == {"wards"}

    def test_clients_are_told_apart(self) -> None:
        """A client's data are its own, and another one's under any other name."""
        own = matches(ORIGINAL, bound(ORIGINAL))
        assert {(match.client, match.owner) for match in own if match.client and match.owner} == {
            (name, name) for name in hospitals()
        }
        renamed = matches(
            data_of(rescaled(renamed_clients(hospitals(), random.Random(0)), random.Random(0))), bound(ORIGINAL)
        )
        assert Match("annexe h1", "wards", "h1") in renamed

    def test_another_key_makes_other_digests(self) -> None:
        other = data_of(hospitals(), bytes(32))
        assert not other.digests() & ORIGINAL.digests()
        assert all(len(digest) == 41 for digest in other.recorded)


class TestWhatIsDoneToTheConfiguration:
    def write(self, folder: Path, files: Files, dialect: str = "excel") -> str:
        folder.mkdir()
        for name, rows in files.items():
            with open(folder / f"{name}.csv", "w", newline="") as out:
                writer = csv.DictWriter(out, list(rows[0]), dialect=dialect)
                writer.writeheader()
                writer.writerows(rows)
        return str(folder)

    @pytest.mark.parametrize(
        "changes",
        [
            {"scale": {"age": [50, 10]}},
            {"columns": ["level", "age"]},
            {"columns": ["pressure"]},
            {"test_fraction": 0.5},
            {"label": "pain", "categories": {}},
            {"public": True},
            {"seed": 7},
        ],
    )
    def test_tables(self, tmp_path: Path, changes: dict[str, Any]) -> None:
        folder = self.write(tmp_path / "csv", hospitals())
        fields = {"folder": folder, "label": "disease", "categories": {"pain": ["typical", "atypical", "none"]}}
        if changes.get("columns"):
            fields.pop("categories")
        seed = changes.get("seed", 0)
        rule = Tables(**fields | {name: value for name, value in changes.items() if name != "seed"})
        assert keyed(rule.load(seed).fingerprints(), KEY).recorded == ORIGINAL.recorded

    def test_the_format_of_the_files(self, tmp_path: Path) -> None:
        for name, rows in hospitals().items():
            pd.DataFrame(rows).to_parquet(tmp_path / f"{name}.parquet")
        rule = Tables(folder=str(tmp_path), label="disease", columns=["age"])
        assert keyed(rule.load(3).fingerprints(), KEY).recorded == ORIGINAL.recorded

    @settings(max_examples=25)
    @given(st.integers(0, 100), st.sampled_from([np.float64, np.float32, list]), st.floats(0.2, 0.9))
    def test_a_function(self, seed: int, kind: Any, part: float) -> None:
        """The order of rows and clients, the type of the arrays, and which rows are there to test on."""
        draw, order = random.Random(seed), np.random.default_rng(seed)

        def clients(change: bool) -> FederatedData:
            found = {}
            for client in range(4):
                generator = np.random.default_rng(client)
                x, y = generator.normal(size=(30, 5)), generator.integers(0, 2, 30)
                rows, cut = (order.permutation(30), int(part * 30)) if change else (np.arange(30), 20)
                x, y = x[rows], y[rows]
                as_kind = (lambda each: each.tolist()) if kind is list else (lambda each: each.astype(kind))
                found[f"{'x' * change}{client}"] = (as_kind(x[:cut]), y[:cut], as_kind(x[cut:]), y[cut:])
            names = draw.sample([*found], 4) if change else [*found]
            returned.update({name: found[name] for name in names})
            return FunctionData(path=f"{__name__}:return_them", num_classes=2).load(0)

        returned.clear()
        before = keyed(clients(False).fingerprints(), KEY)
        returned.clear()
        after = keyed(clients(True).fingerprints(), KEY)
        assert {*before.recorded} == {*after.recorded}
        assert populations(after, before) == {"wards"}

    @pytest.mark.parametrize(
        ("width", "share"),
        [(784, 0.5), *(pytest.param(width, share, marks=pytest.mark.ci) for width, share in ((49, 1.0), (784, 1.0)))],
    )
    def test_images_that_were_normalised(self, width: int, share: float) -> None:
        def images(normalise: Callable[[Any], Any], share: float) -> KeyedData:
            returned.clear()
            for client in range(3):
                generator = np.random.default_rng(client)
                x, y = generator.integers(0, 256, (60, width)).astype(np.float32), generator.integers(0, 2, 60)
                kept = int(45 * share)
                returned[str(client)] = (normalise(x[:kept]), y[:kept], normalise(x[45:]), y[45:])
            return keyed(FunctionData(path=f"{__name__}:return_them", num_classes=2).load(0).fingerprints(), KEY)

        whole = images(lambda x: x, 1.0)
        for normalise in (lambda x: x / 255, lambda x: (x / 255 - 0.1307) / 0.3081, lambda x: 1 - x / 127.5):
            assert populations(images(normalise, share), whole) == {"wards"}

    def test_numbers_at_the_ends_of_float32(self) -> None:
        """Such rows are refused later, by their place: they must not stop those who take the fingerprints."""
        rows = [[np.inf, np.nan, *range(6)], [3e38, -3e38, *range(6)], [0.0] * 8, [1e-45, *[0.0] * 7]]
        returned.clear()
        returned["c"] = (np.array(rows, np.float32), np.zeros(4, int), np.ones((1, 8), np.float32), np.ones(1, int))
        with pytest.raises(DataError):
            FunctionData(path=f"{__name__}:return_them", num_classes=2).load(0)
        hashes = of_rows_scaled(np.array(rows, np.float32))
        assert len(set(hashes.tolist())) == 4

    def test_inputs_of_the_heart_data(self) -> None:
        ways = [HeartDisease(normalisation=way) for way in ("public_constants", "public_bounds", "per_client")]
        first, *others = (keyed(way.load(0).fingerprints(), KEY).recorded for way in ways)
        assert all(each == first for each in others) and len(first) > 500


returned: dict[str, Any] = {}


def return_them() -> dict[str, Any]:
    return dict(returned)


DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, int], Any]] = {
    "normal": lambda draw, size: draw.normal(size=size),
    "uniform": lambda draw, size: draw.uniform(size=size),
    "with a long tail": lambda draw, size: draw.lognormal(0, 2, size),
}


class TestColumns:
    @settings(max_examples=25)
    @given(
        st.lists(st.floats(-1e3, 1e3, width=32), min_size=16, max_size=60, unique=True),
        st.sampled_from([0.5, 2, -4, 1024]),
    )
    def test_scaling_by_powers_of_two_changes_nothing(self, values: list[float], factor: float) -> None:
        column = np.array(values)
        assert column_hash(column) == column_hash(column * factor)

    @pytest.mark.parametrize("num_rows", [100, 3_000, 20_000, 100_000])
    @pytest.mark.parametrize("draw", DISTRIBUTIONS)
    def test_other_units_change_nothing_but_by_a_rare_rounding(self, draw: str, num_rows: int) -> None:
        """Of float32 columns, whose rounding may move a value into another cell of the grid."""
        equal = 0
        for seed in range(10):
            column = DISTRIBUTIONS[draw](np.random.default_rng(seed), num_rows)
            equal += column_hash(column.astype(np.float32)) == column_hash((0.1333 * column).astype(np.float32))
        assert equal >= 9

    @pytest.mark.parametrize("num_rows", [3_000, 100_000])
    @pytest.mark.parametrize("draw", DISTRIBUTIONS)
    def test_long_columns_of_strangers_differ(self, draw: str, num_rows: int) -> None:
        columns = (DISTRIBUTIONS[draw](np.random.default_rng(seed), num_rows) for seed in range(30))
        assert len({column_hash(column) for column in columns}) == 30

    @pytest.mark.parametrize("num_rows", [1_500, 3_000, 20_000])
    def test_rows_of_a_long_column_that_occur_twice_change_nothing(self, num_rows: int) -> None:
        column = np.random.default_rng(0).normal(size=num_rows)
        assert column_hash(column) == column_hash(np.tile(3 - 2 * column, 2))

    def test_row_numbers_and_time_grids_are_anybodys(self) -> None:
        assert column_hash(np.arange(100.0)) is None
        assert column_hash(np.repeat(np.arange(24.0), 5)) is None
        assert column_hash(np.array([0.0, 1.0] * 50)) is None

    @settings(max_examples=25)
    @given(st.integers(0, 2**32), st.integers(20, 60), st.integers(100, 400))
    def test_ages_are_no_calendar(self, seed: int, span: int, num_rows: int) -> None:
        ages = np.random.default_rng(seed).normal(60, span / 4, num_rows).round()
        assert not is_calendar(ages)

    def test_rows_that_occur_twice_change_nothing(self) -> None:
        column = np.random.default_rng(0).normal(size=40)
        assert column_hash(column) == column_hash(np.tile(3 - 2 * column, 2))
