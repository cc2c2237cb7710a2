"""Heart disease: four hospitals, a public data set with natural clients.

The UCI "Heart Disease" data (Janosi, Steinbrunn, Pfisterer and Detrano, 1988; CC BY 4.0) as prepared by FLamby (Ogier
du Terrail et al., 2022, "FLamby: Datasets and Benchmarks for Cross-Silo Federated Learning in Realistic Healthcare
Settings"): 740 complete rows, 486 to train on and 254 to test on, 13 inputs, and whether there is heart disease.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedrounds.fl_components.data.base import DataRule
from fedrounds.fl_components.data.federated import ClientExamples, FederatedData
from fedrounds.fl_components.data.files import expanded, unreadable
from fedrounds.fl_components.data.fingerprints import Fingerprints
from fedrounds.fl_components.errors import DataError

HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")
_FILES = tuple(f"processed.{hospital}.data" for hospital in HOSPITALS)
_PACKAGED = Path(__file__).with_name("heart_disease")

# The columns of the files. Slope, vessels and thal are missing too often: FLamby drops them.
_COLUMNS = (
    "age",
    "sex",
    "chest_pain",
    "pressure",
    "cholesterol",
    "blood_sugar",
    "ecg",
    "heart_rate",
    "angina",
    "oldpeak",
    "slope",
    "vessels",
    "thal",
    "disease",
)
_KEPT = [*range(10), 13]
_ALLOWED = {1: (0, 1), 2: (1, 2, 3, 4), 5: (0, 1), 6: (0, 1, 2), 8: (0, 1), 13: (0, 1, 2, 3, 4)}

# Of the 13 inputs: the place of those that are no 0/1, and the constants that bring them near to [-1, 1].
_NUMERIC = [0, 2, 3, 5, 7]  # age, pressure, cholesterol, heart rate, oldpeak
_BINARY = [1, 4, 6, *range(8, 13)]
_CENTRE = np.array([50.0, 130.0, 200.0, 150.0, 1.0])
_SCALE = np.array([10.0, 20.0, 50.0, 25.0, 1.0])


class HeartDisease(DataRule):
    """The four hospitals of the UCI heart disease data, shipped with the package.

    The inputs are age, sex, resting blood pressure, cholesterol, fasting blood sugar, maximum heart rate, exercise
    angina, oldpeak, then three indicators of the kind of chest pain and two of the resting ECG. The split into training
    and test rows is FLamby's and does not depend on the seed.

    Args:
      normalisation: "public_constants" scales the numeric inputs by fixed numbers that are no statistics of these rows:
        (age - 50) / 10, (pressure - 130) / 20, (cholesterol - 200) / 50, (heart rate - 150) / 25 and oldpeak - 1.
        "public_bounds" does the same, cuts them to [-1, 1], and makes 0 of the other inputs -1: no input is then much
        larger than others, which is what clipping the gradients of single rows asks for.
        "per_client" gives all 13 inputs mean 0 and standard deviation 1 over the client's own training rows. That mean
        and deviation are computed from private rows: what is published with them is an unaccounted release.
      folder: where the four `processed.*.data` files are, if not those of the package.
      public: whether anyone may download the files. By default only if they are those of the package: files of your own
        in this form are private.

    >>> data = HeartDisease().load(seed=0)
    >>> [(name, data.num_examples(i)) for i, name in enumerate(data.client_ids)]
    [('cleveland', 199), ('hungarian', 172), ('switzerland', 30), ('va', 85)]
    """

    kind: Literal["heart_disease"] = "heart_disease"
    normalisation: Literal["public_constants", "public_bounds", "per_client"] = "public_constants"
    folder: str | None = None
    public: bool | None = None

    @property
    def is_well_known(self) -> bool:
        try:
            return all((self._folder / name).read_bytes() == (_PACKAGED / name).read_bytes() for name in _FILES)
        except FileNotFoundError:
            return True  # loading says what is missing
        except (OSError, ValueError):
            return False

    @property
    def _folder(self) -> Path:
        return _PACKAGED if self.folder is None else expanded(self.folder, "data.folder")

    @property
    def private_statistics(self) -> str | None:
        return f"normalisation is {self.normalisation}" if self.normalisation == "per_client" else None

    def known_num_clients(self) -> int:
        return len(HOSPITALS)

    def load(self, seed: int) -> FederatedData:
        """Read the files. Raises `DataError` when one is missing or has a line that it should not have."""
        folder = self._folder
        return FederatedData.from_clients(
            {hospital: self._prepare(folder / name) for hospital, name in zip(HOSPITALS, _FILES, strict=True)},
            num_classes=2,
            class_names=("no disease", "disease"),
            public=self.is_public,
            as_read=partial(_as_read, folder),
        )

    def _prepare(self, file: Path) -> ClientExamples:
        table = _read(file)[:, _KEPT]
        table = table[~np.isnan(table).any(axis=1)]
        if len(table) < 2:
            raise DataError(
                f"{file}: {len(table)} row(s) without missing values, too few to split into training and test rows",
                hint=_MEND,
            )
        y = (table[:, 10] > 0).astype(np.int64)
        chest_pain, ecg = table[:, [2]], table[:, [6]]
        x = np.hstack([table[:, [0, 1, 3, 4, 5, 7, 8, 9]], chest_pain == [2, 3, 4], ecg == [1, 2]])
        train, test = _split(y)
        if self.normalisation != "per_client":
            x[:, _NUMERIC] = (x[:, _NUMERIC] - _CENTRE) / _SCALE
            if self.normalisation == "public_bounds":
                x[:, _BINARY] = 2 * x[:, _BINARY] - 1
                x = x.clip(-1, 1)
        else:
            deviation = x[train].std(axis=0)
            x = (x - x[train].mean(axis=0)) / np.where(deviation > 0, deviation, 1.0)
        x = x.astype(np.float32)
        return ClientExamples(x[train], y[train], x[test], y[test])


def _as_read(folder: Path, data: FederatedData, every_client: bool) -> Fingerprints:
    """Of all columns and rows of the files."""
    tables = {hospital: _read(folder / name) for hospital, name in zip(HOSPITALS, _FILES, strict=True)}
    return Fingerprints.of_tables(
        {hospital: dict(zip(_COLUMNS, table.T, strict=True)) for hospital, table in tables.items()}
    )


def _split(y: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """FLamby's split: 66 % to train on, stratified where each class has more than two rows."""
    from sklearn.model_selection import train_test_split  # a second to import: only when it is used

    _, counts = np.unique(y, return_counts=True)
    train, test = train_test_split(
        np.arange(len(y)),
        train_size=0.66,
        test_size=1.0 - 0.66,
        random_state=43,
        shuffle=True,
        stratify=y if len(counts) > 1 and counts.min() > 2 else None,
    )
    return np.sort(train), np.sort(test)


_MEND = "get the file anew from the UCI repository, or leave data.folder out to use the files of the package"


def _read(file: Path) -> NDArray[np.float64]:
    """The file's numbers [rows, 14], NaN where it has '?'."""
    try:
        lines = file.read_bytes().splitlines()
    except FileNotFoundError as error:
        raise DataError(f"{file} does not exist", hint=_MEND) from error
    except (OSError, ValueError) as error:
        raise unreadable(file, error) from error
    rows = [_parse(line, f"{file}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    return np.array(rows, dtype=np.float64).reshape(-1, len(_COLUMNS))


def _parse(line: bytes, where: str) -> list[float]:
    fields = line.split(b",")
    if len(fields) != len(_COLUMNS):
        raise DataError(f"{where}: {len(fields)} fields where there should be {len(_COLUMNS)}", hint=_MEND)
    return [_number(field.strip(), column, where) for column, field in enumerate(fields)]


def _number(field: bytes, column: int, where: str) -> float:
    if field == b"?":
        return math.nan
    try:
        number = float(field)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or number not in _ALLOWED.get(column, (number,)):
        text = field.decode(errors="replace")[:40]
        raise DataError(f"{where}: {text!r} cannot be the value of {_COLUMNS[column]}", hint=_MEND)
    return number
