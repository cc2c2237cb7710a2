from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from fedrounds.fl_components.data import FederatedData, Tables
from fedrounds.fl_components.errors import DataError

NORTH = "age,smoker,ill\n50,no,0\n61,yes,1\n72,no,1\n43,yes,0\n"
SOUTH = "ill,smoker,age\n1,yes,66\n0,no,35\n"
SMOKER = {"smoker": ["no", "yes"]}


def write(folder: Path, **files: str | bytes) -> Path:
    """CSV files of these names and contents."""
    for name, content in files.items():
        (folder / f"{name}.csv").write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def load(folder: Path, seed: int = 0, **fields: Any) -> FederatedData:
    default = {"folder": str(folder), "label": "ill", "categories": SMOKER, "test_fraction": 0.0}
    return Tables.model_validate(default | fields).load(seed)


def test_files_are_clients_and_columns_go_by_name(tmp_path: Path) -> None:
    data = load(write(tmp_path, south=SOUTH, north=NORTH))
    assert data.client_ids == ("north", "south")
    assert data.train(0)[0].tolist() == [[50, 1, 0], [61, 0, 1], [72, 1, 0], [43, 0, 1]]
    assert data.train(1)[0].tolist() == [[66, 0, 1], [35, 1, 0]]
    assert data.train(1)[1].tolist() == [1, 0]
    assert (data.num_classes, data.public, len(data.y_test)) == (2, False, 0)


def test_scale_and_columns(tmp_path: Path) -> None:
    write(tmp_path, north=NORTH)
    data = load(tmp_path, columns=["smoker", "age"], scale={"age": [50, 10]}, public=True)
    np.testing.assert_allclose(data.x_train, [[1, 0, 0], [0, 1, 1.1], [1, 0, 2.2], [0, 1, -0.7]], rtol=1e-6)
    assert data.public
    assert load(tmp_path, columns=["age"], categories={}).x_train.tolist() == [[50], [61], [72], [43]]


def test_csv_and_parquet_are_the_same(tmp_path: Path) -> None:
    both = {}
    for kind in ("csv", "parquet"):
        folder = tmp_path / kind
        folder.mkdir()
        table = pd.DataFrame(
            {
                "age": [50.5, 61, 72],
                "old": [False, True, True],
                "ward": pd.Categorical(["a", "b", "a"]),
                "score": pd.array([3, 1, 2], "Int64"),
                "ill": [1.0, 0.0, 2.0],
            }
        )
        if kind == "csv":
            table.to_csv(folder / "north.csv", index=False)
        else:
            table.set_index(pd.Index([7, 8, 9])).to_parquet(folder / "north.parquet")
        both[kind] = load(folder, categories={"ward": ["a", "b"], "old": [False, True]}, classes=[0, 1, 2])
    assert np.array_equal(both["csv"].x_train, both["parquet"].x_train)
    assert both["csv"].y_train.tolist() == both["parquet"].y_train.tolist() == [1, 0, 2]
    assert both["csv"].x_train[0].tolist() == [50.5, 1, 0, 1, 0, 3]


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        (["10", "9", "10.0"], None, [1, 0, 1]),
        (["well", "ill", "well"], None, [1, 0, 1]),
        (["well", "ill", "well"], ["well", "dead", "ill"], [0, 2, 0]),
        (["TRUE", "False", "true"], [False, True], [1, 0, 1]),
        (["b", "2", "a"], None, [2, 0, 1]),
        (["01", "1", "01"], ["1", "01"], [1, 0, 1]),
        (["NA", "SA", "NA"], ["NA", "SA"], [0, 1, 0]),
    ],
)
def test_labels_are_numbered_by_the_order_of_their_values(
    tmp_path: Path, labels: list[str], classes: list[Any] | None, expected: list[int]
) -> None:
    write(tmp_path, a="x,ill\n" + "".join(f"1,{label}\n" for label in labels))
    data = load(tmp_path, categories={}, classes=classes)
    assert data.y_train.tolist() == expected
    assert data.num_classes == len(classes or set(expected))


def test_a_part_of_each_clients_rows_is_drawn_to_test_on(tmp_path: Path) -> None:
    rows = [f"{row},{row % 2}" for row in range(40)]
    write(tmp_path, a="\n".join(["x,ill", *rows]), b="\n".join(["x,ill", *rows[:25]]), c="x,ill\n3,1\n")
    data = load(tmp_path, categories={}, test_fraction=0.3)
    assert [len(data.test(i)[1]) for i in range(3)] == [12, 7, 0]
    for client, num_rows in enumerate((40, 25)):
        (x_train, _), (x_test, _) = data.train(client), data.test(client)
        assert sorted([*x_train[:, 0], *x_test[:, 0]]) == list(range(num_rows))
    assert not np.array_equal(data.x_test, load(tmp_path, seed=1, categories={}, test_fraction=0.3).x_test)
    alone = tmp_path / "alone"
    alone.mkdir()
    write(alone, b=(tmp_path / "b.csv").read_text())
    assert np.array_equal(load(alone, categories={}, test_fraction=0.3).x_test, data.test(1)[0])


def test_what_spreadsheets_write_is_read(tmp_path: Path) -> None:
    content = '\ufeffage, ward ,ill\r\n50,"two,\r\nthree",0\r\n\r\n 61 ,one,1\r\n,,\r\n'
    data = load(write(tmp_path, a=content), categories={"ward": ["one", "two,\nthree"]})
    assert data.x_train.tolist() == [[50, 0, 1], [61, 1, 0]]


def test_clients_have_attributes(tmp_path: Path) -> None:
    write(tmp_path, north=NORTH, south=SOUTH, about="client,region\nsouth,EU\nnorth,US\n")
    data = load(tmp_path, clients_file="about.csv")
    assert data.client_ids == ("north", "south")
    assert data.attribute("region").tolist() == [1, 0]


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ("client\nnorth\nsouth\n", "no column besides client"),
        ("name,region\nnorth,EU\n", "no column 'client'"),
        ("client,region\nnorth,EU\nsouth,US\neast,US\n", "about.csv, line 4: client 'east' has no file"),
        ("client,region\nnorth,EU\nsouth,US\nnorth,US\n", "about.csv, line 4: client 'north' is there twice"),
        ("client,region\nnorth,EU\n", "says nothing about client 'south'"),
        ("client,region\nnorth,EU\nsouth,\n", "about.csv, line 3: the value of the column 'region' is missing"),
    ],
)
def test_a_wrong_file_of_attributes_is_refused(tmp_path: Path, about: str, words: str) -> None:
    write(tmp_path, north=NORTH, south=SOUTH, about=about)
    with pytest.raises(DataError, match=words):
        load(tmp_path, clients_file="about.csv")


HEADER = "ill,smoker,age\n"


@pytest.mark.parametrize(
    ("south", "words"),
    [
        ("", "south.csv is empty"),
        ("\n\n", "south.csv, line 1: there is no header"),
        (HEADER, "south.csv has no rows"),
        ("smoker,age\nyes,66\n", "south.csv has no column 'ill'; it has 'smoker', 'age'"),
        ("ill;smoker;age\n1;yes;66\n", "south.csv, line 1: the columns seem to be separated by semicolons"),
        ("ill,age\n1,66\n", "south.csv has no column 'smoker'"),
        ("ill,smoker,age,height\n1,yes,66,170\n", "south.csv has the column 'height', and .*north.csv has not"),
        ("ill,smoker,age,age\n1,yes,66,66\n", "south.csv: the column 'age' is there twice"),
        (",ill,smoker,age\n0,1,yes,66\n", "south.csv: column 1 has no name"),
        (HEADER + "1,yes,66\n1,yes,old\n", "south.csv, line 3: 'old' in the column 'age' is not a number"),
        (HEADER + '1,"yes\n",66\n\n1,yes,old\n', "south.csv, line 5: 'old' in the column 'age'"),
        (HEADER + '1,yes,"6,5"\n', "south.csv, line 2: '6,5' in the column 'age' is not a number"),
        (HEADER + "1,yes,inf\n", "south.csv, line 2: 'inf' in the column 'age'"),
        (HEADER + "1,yes,1e39\n", "south.csv, line 2: '1e39' in the column 'age'"),
        (HEADER + "1,yes,66\n0,no,\n", "south.csv, line 3: the value of the column 'age' is missing"),
        (HEADER + "1,yes,NA\n", "south.csv, line 2: the value of the column 'age' is missing"),
        (HEADER + "1,,66\n", "south.csv, line 2: the value of the column 'smoker' is missing"),
        (HEADER + ",no,66\n", "south.csv, line 2: the value of the column 'ill' is missing"),
        (HEADER + "1,yes\n", "south.csv, line 2: 2 fields, and there are 3 columns"),
        (HEADER + "1,maybe,66\n", "south.csv, line 2: 'maybe' in the column 'smoker' is not in data.categories.smoker"),
        (HEADER + "1,yes,66\n2,no,66\n", "south.csv, line 3: '2' in the column 'ill' is not in data.classes"),
        (HEADER + "1,yes,66,\n", "south.csv, line 2: 4 fields, and there are 3 columns"),
        (HEADER + '1,"yes,66\n', "south.csv, line 2: a double quote is opened and not closed"),
        (b"ill,smoker,age\n1,yes,66\n1,\xffno,66\n", "south.csv, line 3: the byte 0xff is not UTF-8"),
    ],
)
def test_a_wrong_file_is_refused_with_its_line(tmp_path: Path, south: str | bytes, words: str) -> None:
    write(tmp_path, north=NORTH, south=south)
    with pytest.raises(DataError, match=words) as refused:
        load(tmp_path, classes=[0, 1])
    assert refused.value.hint


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ({"age": ["old"]}, r"south.parquet, row 0 \(from 0\): 'old' in the column 'age' is not a number"),
        ({"age": [66.0, None]}, r"south.parquet, row 1 \(from 0\): the value of the column 'age' is missing"),
        ({"age": pd.to_datetime(["2020-01-01"])}, "'2020-01-01' in the column 'age' is not a number"),
        ({"smoker": ["no", None], "age": [1, 2]}, r"row 1 \(from 0\): the value of the column 'smoker' is missing"),
    ],
)
def test_wrong_types_in_parquet_are_refused(tmp_path: Path, column: dict[str, Any], words: str) -> None:
    write(tmp_path, north=NORTH)
    rows = max(len(values) for values in column.values())
    pd.DataFrame({"ill": [1] * rows, "smoker": ["no"] * rows, **column}).to_parquet(tmp_path / "south.parquet")
    with pytest.raises(DataError, match=words):
        load(tmp_path)


@pytest.mark.parametrize(
    "damage", [lambda b: b"", lambda b: b[:50], lambda b: b"PAR1" + b[20:], lambda b: b"a,b\n1,2\n"]
)
def test_a_damaged_parquet_file_is_refused(tmp_path: Path, damage: Any) -> None:
    file = tmp_path / "south.parquet"
    pd.DataFrame({"ill": [1, 0], "smoker": ["no", "yes"], "age": [66, 65]}).to_parquet(file)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=r"south.parquet cannot be read as Parquet"):
        load(tmp_path)


def test_a_label_that_nobody_trains_on_is_refused(tmp_path: Path) -> None:
    write(tmp_path, a="x,ill\n" + "1,0\n2,0\n3,rare\n4,0\n5,0\n6,0\n")
    refused = []
    for seed in range(10):
        try:
            assert load(tmp_path, seed, categories={}, test_fraction=0.5).y_train.tolist().count(1) == 1
        except DataError as error:
            refused.append(error.message)
    assert 0 < len(refused) < 10
    assert all("a.csv, line 4: this is a test row, and no training row" in message for message in refused)
    assert all("'rare'" in message for message in refused)


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is not a folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"has no .csv or .parquet files"):
        load(tmp_path)
    write(tmp_path, only="ill\n1\n0\n")
    with pytest.raises(DataError, match="no column besides the label"):
        load(tmp_path, categories={})
    write(tmp_path, only="x,ill\n1,0\n2,0\n")
    with pytest.raises(DataError, match=r"1 class\(es\)"):
        load(tmp_path, categories={})
    with pytest.raises(DataError, match="no column 'height'"):
        load(tmp_path, categories={}, scale={"height": [170, 10]})
    pd.DataFrame({"x": [1], "ill": [0]}).to_parquet(tmp_path / "only.parquet")
    with pytest.raises(DataError, match=r"only.csv and only.parquet would both be the client 'only'"):
        load(tmp_path, categories={})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"columns": []}, "one or more columns"),
        ({"columns": ["x", "x"]}, "none of them twice"),
        ({"columns": ["x", "ill"]}, "not the label"),
        ({"classes": [1]}, "two or more values"),
        ({"classes": [1, "1.0"]}, "none of them twice"),
        ({"categories": {"x": ["a", "a"]}}, "none of them twice"),
        ({"scale": {"x": [0, 0]}}, "scale above 0"),
        ({"scale": {"ill": [0, 1]}}, "scale names ill, which is not an input"),
        ({"columns": ["x"], "categories": {"y": ["a", "b"]}}, "categories names y, which is not an input"),
        ({"scale": {"x": [0, 1]}, "categories": {"x": ["a", "b"]}}, "x is in scale and in categories"),
        ({"test_fraction": 1.0}, "test_fraction"),
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Tables.model_validate({"folder": "f", "label": "ill"} | fields)
