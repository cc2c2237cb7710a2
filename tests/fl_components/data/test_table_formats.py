"""Tables as hospitals export them: dialects, part files, decimals, dates, missing values, spellings of labels."""

from __future__ import annotations

import csv
import datetime as dt
import gzip
import os
import tempfile
import unicodedata
import warnings
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedrounds.fl_components.config import parse_config
from fedrounds.fl_components.data import FederatedData, Tables
from fedrounds.fl_components.data.cells import text
from fedrounds.fl_components.data.client_table import Dialect
from fedrounds.fl_components.data.fingerprints import Fingerprint, Fingerprints
from fedrounds.fl_components.data.table_files import read_table
from fedrounds.fl_components.errors import ConfigError, DataError
from fedrounds.fl_components.server.assembly import assemble
from tests.support import cases

PLAIN = "age,ill\n50.5,0\n61,1\n"
ROWS = [[50.5, 0], [61, 1]]


def write(folder: Path, **files: str | bytes) -> Path:
    for name, content in files.items():
        (folder / f"{name}.csv").write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def load(folder: Path, **fields: Any) -> FederatedData:
    return Tables.model_validate({"folder": str(folder), "label": "ill", "test_fraction": 0.0} | fields).load(0)


def ages(folder: Path, **fields: Any) -> list[list[float]]:
    return load(folder, **fields).x_train.tolist()


def message(folder: Path, **fields: Any) -> str:
    with pytest.raises(DataError) as refused:
        load(folder, **fields)
    assert refused.value.hint
    return f"{refused.value.message} | {refused.value.hint}"


# ------------------------------------------------------------------------------------------------- the files


def test_hidden_files_are_ignored_and_others_are_named(tmp_path: Path) -> None:
    write(tmp_path, north=PLAIN)
    for name in ("._north.csv", ".DS_Store", "~$south.csv", ".south.csv.crc"):
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07\xb0")
    (tmp_path / "codebook.xlsx").write_bytes(b"PK")
    (tmp_path / "scripts").mkdir()
    tables = Tables(folder=str(tmp_path), label="ill")
    assert tables.left_alone() == ("codebook.xlsx", "scripts")
    assert tables.load(0).client_ids == ("north",)


def test_names_are_composed(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "Köln")
    write(tmp_path, **{decomposed: f"{unicodedata.normalize('NFD', 'Größe')},ill\n1,0\n2,1\n"})
    data = load(tmp_path, columns=["Größe"])
    assert data.client_ids == ("Köln",)
    assert load(tmp_path, columns=[unicodedata.normalize("NFD", "Größe")]).num_examples(0) == 2
    write(tmp_path, Köln="Größe,ill\n1,0\n2,1\n")
    assert "'Ko\\u0308ln.csv' and 'K\\xf6ln.csv' would both be the client 'Köln'" in message(tmp_path)


def test_cells_are_composed(tmp_path: Path) -> None:
    write(tmp_path, a=f"sex,ill\n{unicodedata.normalize('NFD', 'männlich')},0\nweiblich,1\n")
    assert ages(tmp_path, categories={"sex": ["männlich", "weiblich"]}) == [[1, 0], [0, 1]]


def test_names_that_differ_in_case_only_are_refused(tmp_path: Path) -> None:
    write(tmp_path, North=PLAIN, north=PLAIN)
    assert "North.csv and north.csv differ in upper and lower case only" in message(tmp_path)


@pytest.mark.parametrize("ending", ["csv", "parquet", "csv.gz", "CSV"])
def test_what_looks_like_a_clients_file_and_is_none_is_refused(tmp_path: Path, ending: str) -> None:
    write(tmp_path, north=PLAIN)
    (tmp_path / f"east.{ending}").symlink_to("/annex/objects/east")
    assert f"east.{ending} is a link to /annex/objects/east, which does not exist" in message(tmp_path)
    (tmp_path / f"east.{ending}").unlink()
    (tmp_path / f"east.{ending}").mkdir()
    assert f"east.{ending} is a folder without part files" in message(tmp_path)


@pytest.mark.parametrize("name", ["west.csv.zip", "west.csv.bz2", "west.parquet.gz", "West.CSV.XZ"])
def test_a_packed_table_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path, north=PLAIN)
    (tmp_path / name).write_bytes(b"x")
    assert f"{name} is compressed in a form that is not read" in message(tmp_path)


def test_gzip_is_read(tmp_path: Path) -> None:
    (tmp_path / "west.csv.gz").write_bytes(gzip.compress(PLAIN.encode()))
    data = load(tmp_path)
    assert data.client_ids == ("west",)
    assert data.x_train.tolist() == [[50.5], [61]]


def test_a_workbook_with_the_wrong_ending_is_named(tmp_path: Path) -> None:
    assert "a.csv is a ZIP archive or an Excel workbook" in message(write(tmp_path, a=b"PK\x03\x04rest"))


def test_a_folder_of_part_files_is_one_client(tmp_path: Path) -> None:
    spark = tmp_path / "east.parquet"
    spark.mkdir()
    pd.DataFrame({"age": [61, 72], "ill": [1, 0]}).to_parquet(spark / "part-00001-c000.snappy.parquet")
    pd.DataFrame({"ill": [0.0], "age": [50.5]}).to_parquet(spark / "part-00000-c000.snappy.parquet")
    pd.DataFrame({"age": [], "ill": []}).to_parquet(spark / "part-00002-c000.snappy.parquet")
    for name in ("_SUCCESS", "._SUCCESS.crc", ".part-00000.crc", "_committed_1"):
        (spark / name).touch()
    hadoop = tmp_path / "west.csv"
    hadoop.mkdir()
    write(hadoop, **{"part-0": "age,ill\n1,0\n", "part-1": "age,ill\n", "part-2": ""})
    (hadoop / "part-3.csv.gz").write_bytes(gzip.compress(b"age,ill\n4,1\n"))
    data = load(tmp_path)
    assert data.client_ids == ("east", "west")
    assert data.train(0)[0].tolist() == [[50.5], [61], [72]]
    assert data.train(0)[1].tolist() == [0, 1, 0]
    assert data.train(1)[0].tolist() == [[1], [4]]
    write(hadoop, **{"part-1": "age,ill\n\n?,0\n"})
    assert "west.csv/part-1.csv, line 3: the value of the column 'age' is missing" in message(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("year=2020", "has the folder year=2020"),
        ("_delta_log", "is a Delta table"),
        ("notes.txt", "has the file notes.txt"),
        ("part-1.csv", "has the file part-1.csv"),
    ],
)
def test_a_folder_with_anything_else_is_refused(tmp_path: Path, name: str, words: str) -> None:
    spark = tmp_path / "east.parquet"
    spark.mkdir()
    pd.DataFrame({"age": [61, 72], "ill": [1, 0]}).to_parquet(spark / "part-0.parquet")
    (spark / name).touch() if "." in name else (spark / name).mkdir()
    assert words in message(tmp_path)


def test_part_files_have_the_same_columns(tmp_path: Path) -> None:
    (tmp_path / "east.csv").mkdir()
    write(tmp_path / "east.csv", a=PLAIN, b="age,ill,sex\n50,0,f\n")
    assert "b.csv has the column 'sex', and" in message(tmp_path)


def test_one_spark_table_as_the_folder_is_refused(tmp_path: Path) -> None:
    write(tmp_path, **{"part-00000": PLAIN})
    (tmp_path / "_SUCCESS").touch()
    assert "holds the part files of a single table" in message(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (b"K\xf6ln.csv", r"the file name 'K\udcf6ln.csv' is not UTF-8 | rename the file"),
        (b"ward (2).csv", "ward (2).csv: client id 'ward (2)' cannot be used | an id is text of 1 to 100 letters"),
    ],
)
def test_a_file_name_that_cannot_be_an_id_is_refused_before_files_are_read(
    tmp_path: Path, name: bytes, words: str
) -> None:
    write(tmp_path, a="no table")
    (tmp_path / os.fsdecode(name)).touch()
    assert words in message(tmp_path)


def test_a_name_that_is_not_unicode_is_left_alone_and_can_be_shown(tmp_path: Path) -> None:
    write(tmp_path, north=PLAIN)
    (tmp_path / os.fsdecode(b"K\xf6ln.txt")).touch()
    assert Tables(folder=str(tmp_path), label="ill").left_alone() == (r"K\udcf6ln.txt",)


@pytest.mark.parametrize("field", ["folder", "clients_file"])
@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("locked/wards", "locked/wards cannot be read: Permission denied | check its permissions, and those of the"),
        ("x" * 300, "cannot be read: File name too long | check the path"),
        ("a\0b", "a\\x00b' cannot be read: embedded null byte | check the path"),
    ],
)
def test_a_path_that_the_operating_system_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, path: str, words: str
) -> None:
    write(tmp_path, north=PLAIN)
    stat = Path.stat

    def without_permission(path: Path, **options: Any) -> os.stat_result:
        # Tests may run as root, who may enter all folders.
        if "locked" in path.parts:
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", without_permission)
    fields = {"folder": str(tmp_path), "label": "ill"} | {field: str(tmp_path / path)}
    with pytest.raises(DataError) as refused:
        Tables.model_validate(fields).load(0)
    shown = f"{refused.value.message} | {refused.value.hint}"
    assert (words if (field, path) != ("folder", "a\0b") else "is not a folder") in shown


def test_the_home_of_an_unknown_account_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.folder is '~nosuch-account/x'"):
        Tables(folder="~nosuch-account/x", label="ill").load(0)


# ------------------------------------------------------------------------------------------------ the dialect


def test_what_german_excel_writes_is_read(tmp_path: Path) -> None:
    content = "sep=;\nAlter;Größe;Aufnahme;ill\n50,5;1,80;31.12.2023;nein\n61;1,75;02.01.2024;ja\n;;;\n"
    write(tmp_path, a=content.replace("\n", "\r\n").encode("cp1252"))
    fields: dict[str, Any] = {
        "separator": ";",
        "decimal": ",",
        "encoding": "cp1252",
        "dates": {"Aufnahme": "2024-01-01"},
        "date_format": "%d.%m.%Y",
        "classes": ["nein", "ja"],
    }
    data = load(tmp_path, **fields)
    np.testing.assert_array_equal(data.x_train, np.float32([[50.5, 1.8, -1], [61, 1.75, 1]]))
    assert (data.y_train.tolist(), data.class_names) == ([0, 1], ("nein", "ja"))
    assert "a.csv, line 3: '50,5' in the column 'Alter'" in message(tmp_path, **{**fields, "decimal": "."})


@pytest.mark.parametrize(
    ("content", "fields", "words"),
    [
        (
            "age;ill\n36,0;0\n37;1\n",
            {},
            'line 1: the columns seem to be separated by semicolons, and data.separator is ","',
        ),
        ("age;ill\n36,0;0\n37;1\n", {}, 'set data.separator: ";" and data.decimal: ","'),
        ("age;ill\n36.5;0\n37;1\n", {}, 'set data.separator: ";"'),
        ("age\till\n36.5\t0\n", {}, r'separated by tabs, and data.separator is "," | set data.separator: "\t"'),
        ("age|ill\n36.5|0\n", {}, """separated by '|'"""),
        ("age,ill\n36.5,0\n", {"separator": ";"}, 'set data.separator: ","'),
        ('age;"size, cm";ill\n36,5;180;0\n', {}, 'set data.separator: ";" and data.decimal: ","'),
        ('age;"size, cm";ill\n36;180;0\n', {}, 'set data.separator: ";"'),
        ("sep=;\nage;ill\n36;0\n", {}, 'set data.separator: ";"'),
        (PLAIN, {"separator": ";", "decimal": ","}, 'set data.separator: "," and data.decimal: "."'),
        ("age;ill\n1.234,5;0\n", {"separator": ";", "decimal": ","}, "without thousands separators, with ','"),
        ("age;ill\n1.234;0\n", {"separator": ";", "decimal": ","}, "without thousands separators"),
        ("age;ill\n3.5;0\n", {"separator": ";", "decimal": ","}, 'set data.decimal: "." for decimal points'),
        ("age;ill\n3,5;0\n", {"separator": ";"}, 'set data.decimal: "," for decimal commas'),
        ("age,ill\n1 234,0\n", {}, "without thousands separators, with '.'"),
        ('age,ill\n"1,234",0\n', {}, "write numbers without thousands separators, with '.' before the decimals"),
        (
            "age;ill\n1,234;0\n",
            {"separator": ";"},
            "thousands separators, with '.' before the decimals, or set data.dec",
        ),
        ("age,ill\n1'234.5,0\n", {}, "without thousands separators"),
        ("name,ill\nMüller,0\n".encode("cp1252"), {}, "the byte 0xfc is not UTF-8 text"),
        ("name,ill\nMüller,0\n".encode("cp1252"), {}, "or set data.encoding: cp1252 (Excel on Windows"),
        ("name,ill\nMüller,0\n", {"encoding": "cp1252"}, "a.csv is UTF-8 text, and data.encoding is cp1252"),
        (PLAIN.encode("utf-16"), {}, "a.csv is UTF-16 text, not UTF-8 | save the file as UTF-8 (Excel: CSV UTF-8), or"),
        (PLAIN.encode("utf-16-le"), {}, "a.csv holds NUL characters"),
        (b"age,ill\n+2AA-,1\n", {"encoding": "utf-7"}, "a.csv is not UTF-7 text"),
        (b"age,ill\n\\ud800,1\n", {"encoding": "unicode_escape"}, "a.csv is not unicode_escape text"),
    ],
)
def test_another_dialect_is_refused_with_the_field_to_set(
    tmp_path: Path, content: str | bytes, fields: dict[str, Any], words: str
) -> None:
    assert words in message(write(tmp_path, a=content), **fields)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252", "latin-1", "utf-32"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    write(tmp_path, a="Größe,ill\n1.5,0\n2,1\n".encode(encoding))
    assert ages(tmp_path, encoding=encoding.removesuffix("-sig"), columns=["Größe"]) == [[1.5], [2]]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"separator": ";;"}, "one ASCII character"),
        ({"separator": "\\t"}, "tabs"),
        ({"separator": "."}, "stands in no number"),
        ({"separator": "§"}, "one ASCII character"),
        ({"separator": "\0"}, "one ASCII character"),
        ({"classes": [float("nan"), 1]}, "list text, finite numbers"),
        ({"categories": {"x": ["a", float("inf")]}}, "list text, finite numbers"),
        ({"dates": {"x": 1577836800}}, "as YYYY-MM-DD"),
        ({"dates": {"x": "1577836800"}}, "as YYYY-MM-DD"),
        ({"dates": {"x": True}}, "as YYYY-MM-DD"),
        ({"classes": [1, True]}, "the same value"),
        ({"decimal": ","}, "separator and decimal are both ','"),
        ({"encoding": "klingon"}, "not a text encoding"),
        ({"encoding": "base64"}, "not a text encoding"),
        ({"date_format": "%d.%m."}, "year, month and day"),
        ({"date_format": "%d.%m.%Y"}, "dates names no column"),
        ({"dates": {"ill": "2020-01-01"}}, "dates names ill, which is not an input"),
        ({"dates": {"x": "2020-01-01"}, "categories": {"x": ["a", "b"]}}, "x is in dates and in categories"),
        ({"missing": "impute"}, "known are refuse, drop_row, indicator"),
        ({"missing": {"age": "mean"}}, "known are refuse, drop_row, indicator"),
        ({"missing": {"ill": "indicator"}}, "ill is the label"),
        ({"missing": {"x": "drop_row"}, "columns": ["age"]}, "neither an input nor the label"),
        ({"columns": [False]}, "columns.0\n  Input should be a valid string"),
        ({"categories": {"seen": [dt.date(2024, 1, 2), dt.date(2024, 1, 3)]}}, "write dates in quotes"),
        ({"classes": [1, "1e0"]}, "the same value"),
    ],
)
def test_fields_that_make_no_sense_are_refused_in_one_sentence(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words) as refused:
        Tables.model_validate({"folder": "f", "label": "ill"} | fields)
    assert refused.value.error_count() == 1


# -------------------------------------------------------------------------------------------- cells and their types


@pytest.mark.parametrize(
    ("cell", "number"),
    [
        ("1", 1),
        ("+1", 1),
        (" 61 ", 61),
        ("1.", 1),
        (".5", 0.5),
        ("1e+05", 1e5),
        ("-0.0", 0),
        ("\u00a061", 61),
        ("TRUE", 1),
    ],
)
def test_numbers_that_are_read(tmp_path: Path, cell: str, number: float) -> None:
    assert ages(write(tmp_path, a=f"age,ill\n{cell},0\n7,1\n")) == [[number], [7]]


@pytest.mark.parametrize(
    "cell", ["0x10", "1_000", "\uff11", "inf", "Infinity", "1d5", "1 000", "1e", "--1", "5%", "1L", "1e39"]
)
def test_numbers_that_are_refused(tmp_path: Path, cell: str) -> None:
    assert f"a.csv, line 2: {cell!r} in the column 'age' is not a number" in message(
        write(tmp_path, a=f"age,ill\n{cell},0\n")
    )


@pytest.mark.parametrize(
    "cells",
    [
        [Decimal("40.3"), Decimal("-1.25")],
        pd.array([40.3, -1.25], "Float64"),
        pd.Categorical([40.3, -1.25]),
        ["40.3", "-1.25"],
        pd.Categorical(["40.3", "-1.25"]),
    ],
)
def test_numbers_of_any_type_in_parquet(tmp_path: Path, cells: Any) -> None:
    pd.DataFrame({"age": cells, "ill": [Decimal("0.00"), Decimal("1.00")]}).to_parquet(tmp_path / "a.parquet")
    data = load(tmp_path)
    np.testing.assert_array_equal(data.x_train, np.float32([[40.3], [-1.25]]))
    assert data.class_names == ("0", "1")


def parquet(folder: Path, name: str = "a", **columns: Any) -> Path:
    pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    return folder


def of_table(columns: dict[str, Any]) -> Fingerprint:
    return Fingerprints.of_tables({"a": columns}).clients["a"]


CODES = [["I10", "E11"], ["J45"]]
NEVER, FIRST = dt.datetime(9999, 12, 31, 23, 59, 59), dt.datetime(1, 1, 1)
YEARS = "lies outside the years 1 to 9999 | correct it or, where it stands for a date that is not known, leave it empty"
ZONE = "is in the time zone 'Foo/Bar', which is not known | write the time stamps with a zone such as Europe/Berlin"
UNUSABLE = [
    (pa.array(CODES), "is a list, which is neither a number nor text | write one value in each cell"),
    (pa.array([[dt.date(2020, 1, 1)], []]), "is a list, which"),
    (pa.array([[10**12], []], pa.list_(pa.timestamp("s"))), "is a list, which"),
    (pa.array([{"x": 1, "y": [1]}, {"x": 2}]), "is a struct, which"),
    (pa.array([{"x": 10**12}, None], pa.struct([("x", pa.timestamp("s"))])), "is a struct, which"),
    (pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int64())), "is a map, which"),
    (pa.array([b"\xff\0", b"no"]), "is not UTF-8 text | write the column as text (string) in UTF-8"),
    (pa.array([10**12, 5], pa.timestamp("s")), YEARS),
    (pa.array([10**8, 5], pa.date32()), YEARS),
    (pa.array([-(10**6), 5], pa.date32()), YEARS),
    (pa.array([NEVER, NEVER], pa.timestamp("us", "Asia/Tokyo")), YEARS),
    (pa.array([FIRST, FIRST], pa.timestamp("us", "America/New_York")), YEARS),
    (pa.array([10**9, 5], pa.timestamp("us", "Foo/Bar")), ZONE),
    (pa.array([2**62, 5], pa.duration("s")), "is out of range (duration[s])"),
]


@pytest.mark.parametrize(("cells", "words"), UNUSABLE)
def test_a_column_of_another_type_is_refused_where_it_is_used_and_harmless_elsewhere(
    tmp_path: Path, cells: pa.Array, words: str
) -> None:
    parquet(tmp_path, age=[50.0, 61.0], odd=cells, ill=[0, 1])
    assert ages(tmp_path, columns=["age"]) == [[50], [61]]
    uses: list[dict[str, Any]] = [
        {},
        {"dates": {"odd": "2020-01-01"}},
        {"categories": {"odd": ["a", "b"]}},
        {"label": "odd", "columns": ["age"]},
    ]
    for fields in uses:
        where = f"a.parquet, row 0 (from 0): the value in the column 'odd' {words}"
        assert where in message(tmp_path, **fields)


@pytest.mark.parametrize("cells", [each for each, _ in UNUSABLE] + [pa.array([1, 10**9 + 1], pa.time64("ns"))])
def test_a_column_of_another_type_has_a_fingerprint_that_depends_on_its_cells(cells: pa.Array) -> None:
    ages = pa.array([50.0, 61.0])
    same, turned = (of_table({"age": ages, "odd": each}).whole["all"] for each in (cells, cells.take([1, 0])))
    assert of_table({"age": [50.0, 61.0], "odd": [cells.slice(0, 1), cells.slice(1)]}).whole["all"] == same
    assert (same == turned) == (cells[0] == cells[1])


@pytest.mark.parametrize(
    ("cells", "odd"),
    [
        (pa.array([dt.datetime(2020, 1, 2, 3)], pa.timestamp("us", "Asia/Tokyo")), NEVER),
        (pa.array([dt.date(2020, 1, 2)]), 10**8),
        (pa.array([10**9], pa.time64("ns")), 1),
    ],
)
def test_a_cell_has_the_same_fingerprint_beside_one_that_python_cannot_hold(cells: pa.Array, odd: Any) -> None:
    both = pa.concat_arrays([cells, pa.array([odd], cells.type)])
    alone, beside = of_table({"x": cells}).views["all"].hashes, of_table({"x": both}).views["all"].hashes
    assert len(beside) == 2 and set(alone) < set(beside)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary(1), pa.binary_view()])
def test_bytes_are_text(tmp_path: Path, kind: pa.DataType) -> None:
    write(tmp_path, b="age,sex,ill\n5,m,n\n7,f,y\n")
    sex, ill = pa.array([b"m", b"f"], kind), pa.array([b"n", b"y"], kind)
    parquet(tmp_path, age=pa.array([b"5", b"7"], kind), sex=sex, ill=ill)
    data = load(tmp_path, categories={"sex": ["m", "f"]})
    assert data.class_names == ("n", "y")
    assert data.train(0)[0].tolist() == data.train(1)[0].tolist() == [[5, 1, 0], [7, 0, 1]]
    one, other = data.fingerprints().clients.values()
    assert one.whole == other.whole


def test_text_that_is_not_utf8_is_refused_by_its_row(tmp_path: Path) -> None:
    buffers = pa.array([b"f", b"m\xe4nnlich"]).buffers()
    parquet(tmp_path, sex=pa.Array.from_buffers(pa.string(), 2, buffers), age=[1, 2], ill=[0, 1])
    assert ages(tmp_path, columns=["age"]) == [[1], [2]]
    for fields in ({}, {"categories": {"sex": ["f", "m"]}}):
        assert "row 1 (from 0): the value in the column 'sex' is not UTF-8 text" in message(tmp_path, **fields)


def test_half_floats_are_numbers_categories_and_classes(tmp_path: Path) -> None:
    parquet(tmp_path, x=pa.array(np.float16([0.1, 2])), ill=pa.array(np.float16([0, 1])))
    assert ages(tmp_path) == [[np.float16(0.1)], [2]]
    data = load(tmp_path, categories={"x": [0.1, 2]})
    assert (data.x_train.tolist(), data.class_names) == ([[1, 0], [0, 1]], ("0", "1"))


def test_a_column_of_empty_lists_is_one_of_missing_values(tmp_path: Path) -> None:
    parquet(tmp_path, age=[1, 2], x=pa.nulls(2, pa.list_(pa.int64())), ill=[0, 1])
    assert ages(tmp_path, missing="indicator") == [[1, 0, 0, 1], [2, 0, 0, 1]]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("1,4", "a.csv, line 3: 2 fields, and there are 3 columns | complete the line"),
        ("1", "a.csv, line 3: 1 field, and there are 3 columns"),
        ('"1,\n1",4', "a.csv, line 3: 2 fields"),
        ('1,"a\nb",\n\n1,4', "a.csv, line 6: 2 fields"),
        ("1,4\n1,4,5", "a.csv, line 3: 2 fields"),
    ],
)
@pytest.mark.parametrize("missing", ["refuse", "indicator", "drop_row"])
def test_a_line_cut_short_is_refused_whatever_is_done_with_missing_values(
    tmp_path: Path, lines: str, words: str, missing: str
) -> None:
    write(tmp_path, a=f"ill,note,age\n0,3,4\n{lines}")
    assert words in message(tmp_path, missing=missing, columns=["age"])
    sep = lines.replace(",", ";")
    write(tmp_path, a=f"sep=;\nill;note;age\n0;3;4\n{sep}")
    moved = words.replace("line 3", "line 4").replace("line 6", "line 7")
    assert moved in message(tmp_path, missing=missing, columns=["age"], separator=";")


def test_an_empty_last_cell_is_no_line_cut_short(tmp_path: Path) -> None:
    write(tmp_path, a='ill,note,age\n0,3,4\n1,"a,\nb",\n\n  \n0,"a ""b"" c",""\n')
    assert ages(tmp_path, missing="indicator", columns=["age"]) == [[4, 0], [0, 1], [0, 1]]


def test_huge_scaled_values_are_refused_without_a_warning(tmp_path: Path) -> None:
    write(tmp_path, a="age,ill\n1e30,0\n3,1\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "training row 0 (from 0), has inf as feature 0" in message(tmp_path, scale={"age": [0, 1e-300]})
        assert "has -inf as feature 0" in message(tmp_path, scale={"age": [1.7e308, 1e-300]})


def test_a_label_that_no_file_has_is_not_blamed_on_the_other_files(tmp_path: Path) -> None:
    write(tmp_path, a="age ill\n1 0\n", b="age ill\n1 1\n")
    assert "a.csv has no column 'ill'; it has 'age ill' | correct what data names" in message(tmp_path)


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        ([1, None], "Int64"),
        ([True, None], "boolean"),
        ([1.5, None], "Float64"),
        ([Decimal(1), None], object),
        ([1.5, None], float),
    ],
)
def test_nulls_are_missing_values(tmp_path: Path, cells: Any, kind: Any) -> None:
    pd.DataFrame({"age": pd.Series(cells, dtype=kind), "ill": [0, 1]}).to_parquet(tmp_path / "a.parquet")
    assert "a.parquet, row 1 (from 0): the value of the column 'age' is missing" in message(tmp_path)
    assert ages(tmp_path, missing="indicator") == [[float(cells[0]), 0], [0, 1]]


def test_a_path_like_a_partition_adds_no_column(tmp_path: Path) -> None:
    folder = tmp_path / "ward=3"
    folder.mkdir()
    pd.DataFrame({"age": [1, 2], "ill": [0, 1]}).to_parquet(folder / "a.parquet")
    assert load(folder).input_shape == (1,)


NUMBERS = st.floats(-1e30, 1e30, allow_nan=False).filter(lambda x: x == 0 or abs(x) > 1e-30) | st.integers(
    -(10**9), 10**9
)
WORDS = st.text(st.characters(codec="cp1252", exclude_categories=("C", "Zs")), min_size=1, max_size=6).filter(
    lambda word: word.strip() == word and not word.startswith("sep=")
)
DIALECTS = st.tuples(
    st.sampled_from([",", ";", "\t", "|"]), st.sampled_from([".", ","]), st.sampled_from(["utf-8", "utf-16"])
)


@settings(max_examples=cases(25), deadline=None)
@given(
    numbers=st.lists(NUMBERS, min_size=2, max_size=8),
    words=st.lists(WORDS, min_size=2, max_size=8),
    dialect=DIALECTS.filter(lambda each: each[0] != each[1]),
)
def test_a_table_reads_the_same_in_any_dialect_and_in_parquet(
    numbers: list[float], words: list[str], dialect: tuple[str, str, str]
) -> None:
    rows = min(len(numbers), len(words))
    numbers, words = numbers[:rows], words[:rows]
    separator, decimal, encoding = dialect
    days = [dt.date(2020, 1, 1) + dt.timedelta(days=37 * row) for row in range(rows)]
    with tempfile.TemporaryDirectory() as folder:
        one, other = Path(folder) / "a.csv", Path(folder) / "a.parquet"
        with one.open("w", encoding=encoding, newline="") as file:
            table = csv.writer(file, delimiter=separator)
            table.writerow(["number", "word", "day"])
            written = [repr(number).replace(".", decimal) for number in numbers]
            table.writerows(zip(written, words, days, strict=True))
        pd.DataFrame({"number": np.array(numbers, float), "word": words, "day": days}).to_parquet(other)
        text_table, typed = read_table(one, Dialect(separator, decimal, encoding)), read_table(other, Dialect())
        np.testing.assert_array_equal(text_table.numbers("number"), np.array(numbers, float))
        np.testing.assert_array_equal(typed.numbers("number"), np.array(numbers, float))
        since = dt.date(2000, 2, 29)
        np.testing.assert_array_equal(text_table.days("day", since), [(day - since).days for day in days])
        np.testing.assert_array_equal(typed.days("day", since), text_table.days("day", since))
        for column in ("number", "day"):
            codes, values = text_table.values(column)
            typed_codes, typed_values = typed.values(column)
            assert [values[code] for code in codes] == [typed_values[code] for code in typed_codes]
        if decimal == ".":
            codes, values = text_table.values("word")
            assert [values[code] for code in codes] == [text(word) for word in words]


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(0, 3), st.booleans())
def test_equal_numbers_have_equal_texts(number: float, zeros: int, plus: bool) -> None:
    plain = format(Decimal(number).normalize(), "f") if 1e-5 < abs(number) < 1e15 else repr(number)
    if "e" not in plain and "." in plain:
        plain += "0" * zeros
    spelled = ("+" if plus and not plain.startswith("-") else "") + plain
    assert text(spelled) == text(number) == text(repr(number)) == text(np.float64(number))


# -------------------------------------------------------------------------------------------------------- labels


def test_equal_numbers_are_one_class(tmp_path: Path) -> None:
    write(tmp_path, a="x,ill\n1,0\n1,1\n", b="x,ill\n1,-0.0\n1,+1\n", c="x,ill\n1,0e0\n1,1.00\n")
    pd.DataFrame({"x": [1, 1], "ill": [-0.0, 1.0]}).to_parquet(tmp_path / "d.parquet")
    for classes in (None, [0, 1], ["0", 1.0], ["+0", "1e0"]):
        data = load(tmp_path, classes=classes)
        assert data.y_train.tolist() == [0, 1] * 4
        assert data.class_names == ("0", "1")
    write(tmp_path, a="x,ill\n1,100000\n", b="x,ill\n1,1e+05\n", c="x,ill\n1,1E5\n")
    assert load(tmp_path, classes=[0, 1, 100_000]).y_train.tolist() == [2, 2, 2, 0, 1]


def test_equal_numbers_are_one_category(tmp_path: Path) -> None:
    write(tmp_path, a="x,ill\n100000,0\n1e+05,1\n-0,1\n0,0\n")
    data = load(tmp_path, categories={"x": ["0", "1E5"]})
    assert data.x_train.argmax(1).tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("classes", [None, [0, 1], [False, True], ["FALSE", "1"]])
def test_true_and_false_are_one_and_zero(tmp_path: Path, classes: Any) -> None:
    write(tmp_path, a="x,ill\nTRUE,true\nFalse,FALSE\n", b="x,ill\n1,1\n0,0\n")
    parquet(tmp_path, "c", x=[True, False], ill=[True, False])
    parquet(tmp_path, "d", x=[1.0, 0.0], ill=[1, 0])
    for listed in ([0, 1], [False, True]):
        data = load(tmp_path, classes=classes, categories={"x": listed})
        assert (data.y_train.tolist(), data.num_classes) == ([1, 0] * 4, 2)
        assert data.x_train.tolist() == [[0, 1], [1, 0]] * 4


def test_the_words_true_and_false_are_classes_of_that_name(tmp_path: Path) -> None:
    assert load(write(tmp_path, a="x,ill\n1,TRUE\n1,false\n")).class_names == ("false", "true")
    assert load(write(tmp_path, a="x,ill\n1,TRUE\n1,0\n1,2\n")).class_names == ("0", "1", "2")


def test_texts_that_differ_are_different_classes(tmp_path: Path) -> None:
    data = load(write(tmp_path, a="x,ill\n1,No\n1,no\n1,01\n1,1\n"))
    assert data.class_names == ("01", "1", "No", "no")


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (
            [str(age) for age in range(20, 45)],
            "has 25 different values, all numbers from 20 to 44: it seems to be a quantity",
        ),
        ([f"{day / 2}" for day in range(21)], "to predict a quantity, set task: {kind: regression}"),
        ([f"patient-{row}" for row in range(30)], "it seems to be an identifier or free text"),
    ],
)
def test_a_label_with_many_values_is_no_class(tmp_path: Path, labels: list[str], words: str) -> None:
    write(tmp_path, a="x,ill\n" + "".join(f"1,{label}\n" for label in labels))
    assert words in message(tmp_path)
    assert load(tmp_path, classes=labels).num_classes == len(labels)


def test_many_classes_of_few_values_are_classes(tmp_path: Path) -> None:
    write(tmp_path, a="x,ill\n" + "".join(f"1,{row % 20}\n" for row in range(60)))
    assert load(tmp_path).num_classes == 20
    write(tmp_path, a="x,ill\n" + "".join(f"1,ward {row % 25}\n" for row in range(60)))
    assert load(tmp_path).num_classes == 25


def test_a_quantity_with_few_rows_is_hinted_at(tmp_path: Path) -> None:
    write(tmp_path, a="x,ill\n" + "".join(f"1,{row}\n" for row in range(12)))
    assert "to predict a quantity, set task: {kind: regression}" in message(tmp_path, test_fraction=0.5)


# -------------------------------------------------------------------------------------------------- missing values

GAPS = "age,sex,ill\n50,f,0\n,m,1\n70,NA,0\n80,f,?\n90,f,1\n"
SEX = {"categories": {"sex": ["f", "m"]}}


@pytest.mark.parametrize("cell", ["", "NA", "n/a", "#N/A", "#NV", "NaN", "null", "<NA>", "NaT", "?", ".", "  "])
def test_spellings_of_missing_values(tmp_path: Path, cell: str) -> None:
    write(tmp_path, a=f"age,ill\n{cell},0\n{cell},0\n3,1\n")
    assert "a.csv, line 2: the value of the column 'age' is missing (and 1 more of its 3 values)" in message(tmp_path)
    assert ages(tmp_path, missing="indicator") == [[0, 1], [0, 1], [3, 0]]


def test_rows_with_a_missing_value_are_dropped(tmp_path: Path) -> None:
    write(tmp_path, a=GAPS)
    data = load(tmp_path, missing="drop_row", **SEX)
    assert (data.x_train.tolist(), data.y_train.tolist()) == ([[50, 1, 0], [90, 1, 0]], [0, 1])
    columns = {"columns": ["age"], "missing": {"age": "drop_row", "ill": "drop_row"}}
    assert ages(tmp_path, **columns) == [[50], [70], [90]]
    assert "line 5: the value of the column 'ill' is missing" in message(tmp_path, missing={"age": "drop_row"}, **SEX)


def test_indicators_depend_on_the_configuration_alone(tmp_path: Path) -> None:
    write(tmp_path, a=GAPS, b="age,sex,ill\n10,m,0\n20,f,1\n")
    rules = {"age": "indicator", "sex": "indicator", "ill": "drop_row"}
    data = load(tmp_path, missing=rules, scale={"age": [60, 10]}, **SEX)
    assert data.train(0)[0].tolist() == [[-1, 0, 1, 0, 0], [0, 1, 0, 1, 0], [1, 0, 0, 0, 1], [3, 0, 1, 0, 0]]
    assert data.train(1)[0].tolist() == [[-5, 0, 0, 1, 0], [-4, 0, 1, 0, 0]]  # no gaps, and the same inputs
    assert "the column 'ill' is missing" in message(tmp_path, missing="indicator", **SEX)


def test_a_listed_value_is_not_missing(tmp_path: Path) -> None:
    write(tmp_path, a="land,ill\nNA,0\nDE,1\n")
    assert ages(tmp_path, categories={"land": ["DE", "NA"]}, missing="drop_row") == [[0, 1], [1, 0]]


def test_a_client_of_incomplete_rows_is_refused(tmp_path: Path) -> None:
    assert "each row has a missing value" in message(write(tmp_path, a="age,ill\n,0\n?,1\n"), missing="drop_row")


def test_a_dropped_row_does_not_decide_what_becomes_of_others(tmp_path: Path) -> None:
    rows = [f"{row},{row % 2}" for row in range(40)]
    write(tmp_path, a="\n".join(["age,ill", *rows]))
    whole = load(tmp_path, test_fraction=0.3, missing="drop_row")
    rows[7] = ",1"
    write(tmp_path, a="\n".join(["age,ill", *rows]))
    less = load(tmp_path, test_fraction=0.3, missing="drop_row")
    for part in ("x_train", "x_test"):
        assert [x for x in getattr(whole, part).ravel() if x != 7] == getattr(less, part).ravel().tolist()


def test_a_class_of_dropped_rows_alone_is_none(tmp_path: Path) -> None:
    write(tmp_path, a="age,ill\n1,0\n2,1\n,rare\n")
    assert load(tmp_path, missing="drop_row").class_names == ("0", "1")


# ---------------------------------------------------------------------------------------------------------- dates


def test_dates_are_days_since_a_public_date(tmp_path: Path) -> None:
    write(tmp_path, a="seen,ill\n2020-01-31,0\n2019-12-31 12:00,1\n2020-01-01T06:00:00Z,0\n9999-12-31,1\n")
    assert ages(tmp_path, dates={"seen": "2020-01-01"})[:3] == [[30], [-0.5], [0.25]]
    scaled = ages(tmp_path, dates={"seen": dt.date(2020, 1, 1)}, scale={"seen": [20, 10]})
    assert scaled[:2] == [[1], [np.float32(-2.05)]]
    moments = pd.to_datetime(["2020-01-31", "2019-12-31 12:00", "2020-01-01 06:00", "2262-01-01"], format="ISO8601")
    typed = [
        (moments, [[30], [-0.5], [0.25]]),
        (moments.tz_localize("Europe/Berlin"), [[30], [-0.5], [0.25]]),
        (moments.as_unit("ns"), [[30], [-0.5], [0.25]]),
        (list(moments.date), [[30], [-1], [0]]),
    ]
    for cells, expected in typed:
        pd.DataFrame({"seen": cells, "ill": [0, 1, 0, 1]}).to_parquet(tmp_path / "b.parquet")
        assert load(tmp_path, dates={"seen": "2020-01-01"}).train(1)[0].tolist()[:3] == expected


@pytest.mark.parametrize(
    "cells",
    [
        [20200102, 20200131],
        [20200102.0, 20200131.0],
        [Decimal(20200102), Decimal(20200131)],
        ["20200102", "20200131"],
        [b"20200102", b"20200131"],
    ],
)
def test_dates_may_be_whole_numbers_in_parquet(tmp_path: Path, cells: Any) -> None:
    parquet(tmp_path, seen=cells, ill=[0, 1])
    assert ages(tmp_path, dates={"seen": "2020-01-01"}, date_format="%Y%m%d") == [[1], [30]]
    assert "'20200102' in the column 'seen' is not a date" in message(tmp_path, dates={"seen": "2020-01-01"})


@pytest.mark.parametrize(
    ("cell", "form"),
    [
        (pa.scalar(2012020), "%d%m%Y"),  # 02012020, without the zero before it
        (pa.scalar(20200102.5), "%Y%m%d"),
        (pa.scalar(20200102.0, pa.float32()), "%Y%m%d"),  # float32 holds no odd numbers of this size
        (pa.scalar(True), "%Y%m%d"),
    ],
)
def test_a_number_that_may_be_another_date_is_refused(tmp_path: Path, cell: pa.Scalar[Any], form: str) -> None:
    parquet(tmp_path, seen=pa.array([cell.as_py()], cell.type), ill=[0])
    assert f"in the column 'seen' is not a date ({form})" in message(
        tmp_path, dates={"seen": "2020-01-01"}, date_format=form
    )


def test_gaps_among_dates_that_are_numbers_are_missing(tmp_path: Path) -> None:
    parquet(tmp_path, seen=[20200102.0, float("nan"), None], ill=[0, 1, 1])
    fields: dict[str, Any] = {"dates": {"seen": "2020-01-01"}, "date_format": "%Y%m%d", "missing": "indicator"}
    assert ages(tmp_path, **fields) == [[1, 0], [0, 1], [0, 1]]


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_dates_may_be_counted_from_a_date_long_ago(tmp_path: Path, unit: str) -> None:
    parquet(tmp_path, seen=pa.array([dt.datetime(2020, 1, 1, 12)], pa.timestamp(unit)), ill=[0])
    table = read_table(tmp_path / "a.parquet", Dialect())
    assert table.days("seen", dt.date(1, 1, 1)).tolist() == [(dt.date(2020, 1, 1) - dt.date(1, 1, 1)).days + 0.5]


def test_the_last_microsecond_of_the_calendar_is_summarised(tmp_path: Path) -> None:
    last = dt.datetime.max
    parquet(tmp_path, seen=pa.array([last, last - dt.timedelta(days=1)], pa.timestamp("us")), ill=[0, 1])
    tables = Tables.model_validate({"folder": str(tmp_path), "label": "ill", "dates": {"seen": "2020-01-01"}})
    bounds = tables.columns_read()[0].range
    assert bounds is not None and str(bounds[1]).startswith("9999-12-31 23:59:59.99999")


@pytest.mark.parametrize(
    ("cell", "fields", "words"),
    [
        (
            "31.12.2023",
            {},
            """'31.12.2023' in the column 'seen' is not a date (YYYY-MM-DD) | set data.date_format: "%d.%m.%Y\"""",
        ),
        ("12/31/2023", {}, '"%d/%m/%Y" (day first) or "%m/%d/%Y" (month first)'),
        ("31.02.2023", {"date_format": "%d.%m.%Y"}, "is not a date (%d.%m.%Y) | correct it"),
        ("2023-12-31", {"date_format": "%d.%m.%Y"}, "leave data.date_format out"),
        ("2023-02-30", {}, "is not a date (YYYY-MM-DD)"),
        ("45291", {}, "is not a date (YYYY-MM-DD)"),
        ("", {}, "the value of the column 'seen' is missing"),
    ],
)
def test_what_is_no_date_is_refused(tmp_path: Path, cell: str, fields: dict[str, Any], words: str) -> None:
    write(tmp_path, a=f"seen,ill\n{cell},0\n")
    assert words in message(tmp_path, dates={"seen": "2020-01-01"}, **fields)


def test_a_date_among_numbers_is_explained(tmp_path: Path) -> None:
    write(tmp_path, a="seen,ill\n2020-01-31,0\n")
    assert "list the column in data.dates" in message(tmp_path)


# --------------------------------------------------------------------------------------------- what is reported


def test_columns_are_summarised_as_they_are_in_the_files(tmp_path: Path) -> None:
    write(
        tmp_path,
        a="age,sex,seen,ill\n50,f,2020-01-31,0\n,m,2021-01-01 12:00,1\n",
        b="age,sex,seen,ill\n-7.5,f,,1\n9,,,0\n",
    )
    tables = Tables.model_validate(
        {"folder": str(tmp_path), "label": "ill", "missing": "indicator", "dates": {"seen": "2020-01-01"}, **SEX}
    )
    age, sex, seen, ill = tables.columns_read()
    assert (age.name, age.kind, age.range, age.missing, age.missing_by_client) == (
        "age",
        "number",
        (-7.5, 50.0),
        0.25,
        {"a": 0.5, "b": 0.0},
    )
    assert (sex.kind, sex.range, sex.counts) == ("category", None, {"f": 2, "m": 1})
    assert (seen.range, seen.missing_by_client) == (("2020-01-31", "2021-01-01 12:00:00"), {"a": 0.0, "b": 1.0})
    assert (ill.kind, ill.missing) == ("label", 0.0)


def test_without_test_rows_the_fraction_is_named(tmp_path: Path) -> None:
    write(tmp_path, a="age,ill\n50,0\n61,1\n70,0\n", b="age,ill\n50,0\n61,1\n70,0\n71,1\n")
    config = {
        "name": "tiny",
        "rounds": 1,
        "data": {"kind": "tables", "folder": str(tmp_path), "label": "ill"},
        "model": {"kind": "logistic_regression"},
        "training": {"learning_rate": 0.1, "epochs": 1},
    }
    with pytest.raises(DataError) as refused:
        assemble(parse_config(config))
    assert refused.value.hint is not None
    assert "data.test_fraction is 0.2" in refused.value.hint and "the smallest, 'a', has 3" in refused.value.hint
    assert load(tmp_path, test_fraction=0.34).test_rows.lengths.tolist() == [1, 1]


def test_one_sentence_for_a_wrong_field_of_a_configuration() -> None:
    data = {"kind": "tables", "folder": "f", "label": "ill", "missing": {"age": "mean"}}
    with pytest.raises(ConfigError, match="missing") as refused:
        parse_config(
            {
                "name": "x",
                "rounds": 1,
                "data": data,
                "model": {"kind": "logistic_regression"},
                "training": {"learning_rate": 0.1, "epochs": 1},
            }
        )
    assert refused.value.message == "missing.age is 'mean'; known are refuse, drop_row, indicator"
