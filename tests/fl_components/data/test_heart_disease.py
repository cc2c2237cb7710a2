from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import fedrounds.fl_components.data.heart_disease as heart_disease
from fedrounds.fl_components.data import HeartDisease
from fedrounds.fl_components.errors import DataError

FILES = Path(heart_disease.__file__).with_name("heart_disease")
ROW = "63,1,4,140,260,0,1,112,1,3,2,?,?,2"


def test_sizes_are_flambys() -> None:
    data = HeartDisease().load(seed=0)
    assert data.client_ids == ("cleveland", "hungarian", "switzerland", "va")
    assert [data.num_examples(i) for i in range(4)] == [199, 172, 30, 85]
    assert [len(data.test(i)[1]) for i in range(4)] == [104, 89, 16, 45]
    assert (len(data.y_train), len(data.y_test), data.input_shape) == (486, 254, (13,))
    assert [int(data.train(i)[1].sum()) for i in range(4)] == [91, 65, 30, 66]
    assert data.num_classes == 2 and data.public


def test_baselines() -> None:
    baselines = HeartDisease().load(seed=0).baselines()
    assert {name: round(accuracy, 3) for name, accuracy in baselines.items()} == {
        "pooled_majority": 0.516,
        "client_majority": 0.638,
    }


def test_the_split_does_not_depend_on_the_seed() -> None:
    assert np.array_equal(HeartDisease().load(seed=0).x_train, HeartDisease().load(seed=1).x_train)


def test_public_constants_on_one_row(tmp_path: Path) -> None:
    # Three equal rows, so that whatever the split, this is what is trained on.
    for hospital in heart_disease.HOSPITALS:
        (tmp_path / f"processed.{hospital}.data").write_text(f"{ROW}\n" * 3)
    x, y = HeartDisease(folder=str(tmp_path)).load(seed=0).train(3)
    age, sex, pressure, cholesterol, sugar, heart_rate, angina, oldpeak, *indicators = x[0].tolist()
    assert (sex, sugar, angina) == (1, 0, 1)
    assert (age, pressure, cholesterol, heart_rate, oldpeak) == pytest.approx((1.3, 0.5, 1.2, -1.52, 2.0))
    assert indicators == [0, 0, 1, 1, 0]  # chest pain 4 of 2, 3, 4; ECG 1 of 1, 2
    assert y[0] == 1


def test_public_bounds_are_the_constants_cut_and_nothing_of_the_rows() -> None:
    data, raw = HeartDisease(normalisation="public_bounds").load(seed=0), HeartDisease().load(seed=0)
    numeric = [0, 2, 3, 5, 7]
    for client in range(data.num_clients):
        (x, _), (constants, _) = data.train(client), raw.train(client)
        np.testing.assert_array_equal(x[:, numeric], constants[:, numeric].clip(-1, 1))
        others = [place for place in range(13) if place not in numeric]
        np.testing.assert_array_equal(x[:, others], 2 * constants[:, others] - 1)


def test_per_client_uses_the_clients_training_rows_only() -> None:
    data = HeartDisease(normalisation="per_client").load(seed=0)
    raw = HeartDisease().load(seed=0)
    for client in range(data.num_clients):
        x, _ = data.train(client)
        varies = raw.train(client)[0].std(axis=0) > 1e-6
        assert x.mean(axis=0) == pytest.approx(np.zeros(13), abs=1e-5)
        assert x.std(axis=0) == pytest.approx(varies.astype(float), abs=1e-5)
    assert not data.train(2)[0][:, 3].any()  # Switzerland recorded no cholesterol


def test_files_elsewhere_and_blank_lines(tmp_path: Path) -> None:
    folder = shutil.copytree(FILES, tmp_path / "files")
    with (folder / "processed.va.data").open("a") as file:
        file.write("\r\n\n")
    assert np.array_equal(HeartDisease(folder=str(folder)).load(seed=0).x_test, HeartDisease().load(seed=0).x_test)


def test_the_licence_is_beside_the_files() -> None:
    text = (FILES / "LICENCE.md").read_text()
    for word in ("CC BY 4.0", "Janosi", "Steinbrunn", "Pfisterer", "Detrano", "1988", "Ogier du Terrail"):
        assert word in text


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("63,1,4,140,260,0,1", "7 fields where there should be 14"),
        (ROW + ",1", "15 fields"),
        (ROW.replace("140", "14o"), "'14o' cannot be the value of pressure"),
        (ROW.replace("140", "nan"), "'nan' cannot be the value of pressure"),
        (ROW.replace("140", "1e999"), "'1e999' cannot be the value of pressure"),
        (ROW.replace("140", ""), "'' cannot be the value of pressure"),
        (ROW.replace("63,1,4", "63,1,5"), "'5' cannot be the value of chest_pain"),
        (ROW.replace("63,1,4", "63,0.5,4"), "'0.5' cannot be the value of sex"),
        (ROW[:-1] + "7", "'7' cannot be the value of disease"),
        ("<html>404</html>", "1 fields"),
        ("\udcff\udcfe" + ROW, "cannot be the value of age"),
    ],
)
def test_a_corrupt_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    folder = shutil.copytree(FILES, tmp_path / "files")
    file = folder / "processed.hungarian.data"
    lines = file.read_text().splitlines()
    lines[41] = line
    file.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=words) as caught:
        HeartDisease(folder=str(folder)).load(seed=0)
    assert f"{file}, line 42:" in caught.value.message
    assert "UCI" in (caught.value.hint or "")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    folder = shutil.copytree(FILES, tmp_path / "files")
    (folder / "processed.va.data").unlink()
    with pytest.raises(DataError, match=r"processed\.va\.data does not exist") as caught:
        HeartDisease(folder=str(folder)).load(seed=0)
    assert "data.folder" in (caught.value.hint or "")
    (folder / "processed.va.data").mkdir()
    with pytest.raises(DataError, match=r"processed\.va\.data cannot be read"):
        HeartDisease(folder=str(folder)).load(seed=0)


@pytest.mark.parametrize(("text", "rows"), [("", 0), (ROW.replace("140", "?") + "\n" + ROW, 1)])
def test_a_file_without_enough_complete_rows(tmp_path: Path, text: str, rows: int) -> None:
    folder = shutil.copytree(FILES, tmp_path / "files")
    (folder / "processed.va.data").write_text(text)
    with pytest.raises(DataError, match=rf"va\.data: {rows} row\(s\) without missing values"):
        HeartDisease(folder=str(folder)).load(seed=0)
