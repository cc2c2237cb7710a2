"""Function: a function of your own returns the clients' examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from numbers import Integral, Real
from typing import Any, ClassVar, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, JsonValue

from fedrounds.fl_components.data.base import TargetReader
from fedrounds.fl_components.data.federated import ClientExamples, Features, FederatedData, Labels, Targets
from fedrounds.fl_components.data.masked import check_unmasked
from fedrounds.fl_components.errors import ConfigError, DataError, FedroundsError, one_line
from fedrounds.fl_components.rules import import_attribute
from fedrounds.fl_components.targets import TargetType

REGRESSION_HINT: Final = "To predict a quantity, set task: {kind: regression}"
_FORM: Final = "return {client_id: (x_train, y_train) or (x_train, y_train, x_test, y_test)}"


class FunctionData(TargetReader):
    """Examples from your function: `path` names it ("package.module:name"), `arguments` are its keyword arguments.

    The function returns ``{client_id: (x_train, y_train)}`` or, for clients with test rows, ``{client_id: (x_train,
    y_train, x_test, y_test)}``; arrays, tensors, data frames or lists. Features are [rows, ...]: floats and booleans
    become float32, whole numbers int64 tokens. Targets are [rows]: whole numbers from 0 (labels) or, where the learning
    task is regression, numbers, which become float32. Missing values (masked elements,
    NaN, nulls of data frames, None) are refused. The function must return the same for the same arguments, or a run
    that is resumed would continue with other data.

    Args:
      path: the import path of the function.
      arguments: passed to the function by name.
      num_classes: how many labels there are. By default one more than the largest label found: with private data
        give it, so that the model's size does not tell which labels occur.
      public: True only for data that anyone may download.
    """

    kind: Literal["function"] = "function"
    path: str
    arguments: dict[str, JsonValue] = Field(default_factory=dict)
    num_classes: int | None = Field(default=None, ge=2)
    public: bool = False

    class_field: ClassVar[str] = "num_classes"

    def known_num_clients(self) -> None:
        return None

    def load(self, seed: int, targets: TargetType = TargetType.CLASS) -> FederatedData:
        """Call the function and check what it returns.

        Raises `ConfigError` when `path` names no function, `DataError` when the function fails or what it returns
        cannot be used.
        """
        function = import_attribute(self.path, "data.path")
        if not callable(function):
            raise ConfigError(f"data.path: {self.path} is a {type(function).__name__}, not a function", hint=_FORM)
        try:
            returned = function(**self.arguments)
        except (Exception, SystemExit) as error:
            raise DataError(
                f"{self.path} failed with data.arguments {sorted(self.arguments)}: {one_line(error)}",
                hint="call the function by hand with these arguments",
            ) from error
        if not isinstance(returned, Mapping):
            raise DataError(f"{self.path} returned a {type(returned).__name__}, not a mapping", hint=_FORM)
        try:
            clients = {
                client_id: _examples(self.path, client_id, value, targets) for client_id, value in returned.items()
            }
        except FedroundsError:
            raise
        except Exception as error:  # a mapping that reads its values when it is asked for them, for instance
            raise DataError(
                f"what {self.path} returned cannot be read: {one_line(error)}",
                hint=f"{_FORM}, with arrays that are in memory",
            ) from error
        if not clients:
            raise DataError(f"{self.path} returned no clients", hint=_FORM)
        num_classes = self.num_classes or 0
        if targets is TargetType.CLASS and not num_classes:
            num_classes = _num_classes(self.path, clients)
        return FederatedData.from_clients(clients, num_classes=num_classes, public=self.public)


def _num_classes(path: str, clients: Mapping[str, ClientExamples]) -> int:
    """Return one more than the largest label. Raises `DataError` when some label below it never occurs."""
    labels = np.unique(np.concatenate([y for each in clients.values() for y in (each.y_train, each.y_test)]))
    skipped = np.flatnonzero(labels != np.arange(len(labels)))
    if skipped.size and labels[0] >= 0:  # a negative label is refused later, with its row
        place, largest = int(skipped[0]), int(labels[-1])
        raise DataError(
            f"{path}: no row of any client has the label {place}, and the labels go up to {largest}",
            hint=f"number the classes from 0 without gaps or, if a class may be absent, set data.num_classes: "
            f"{largest + 1}. {REGRESSION_HINT}",
        )
    return int(labels.max(initial=-1)) + 1


def _examples(path: str, client_id: Any, value: Any, targets: TargetType) -> ClientExamples:
    where = f"{path}, client {client_id!r}"
    if not isinstance(value, tuple | list) or len(value) not in (2, 4):
        found = f"{len(value)} values" if isinstance(value, tuple | list) else f"a {type(value).__name__}"
        raise DataError(f"{where}: {found}, not 2 or 4 arrays", hint=_FORM)
    read: Callable[[Any, str], Targets] = _labels if targets is TargetType.CLASS else _numbers
    x_train, y_train = _features(value[0], f"{where}: x_train"), read(value[1], f"{where}: y_train")
    if len(value) == 4:
        x_test, y_test = _features(value[2], f"{where}: x_test"), read(value[3], f"{where}: y_test")
    else:
        x_test, y_test = x_train[:0], y_train[:0]
    for part, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        if len(x) != len(y):
            raise DataError(
                f"{where}: x_{part} has {len(x)} rows and y_{part} has {len(y)}", hint="give one target for each row"
            )
    return ClientExamples(x_train, y_train, x_test, y_test)


def _features(value: Any, where: str) -> Features:
    array = _array(value, where)
    if array.ndim < 2 and array.size:
        raise DataError(
            f"{where} has the shape {list(array.shape)}",
            hint="features are [rows, ...]; for a single feature, reshape to [rows, 1]",
        )
    if array.dtype.kind in "fb":
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes Inf, which is refused by name
            return array.astype(np.float32)
    if array.dtype.kind in "iu":
        return _int64(array, where)
    raise DataError(
        f"{where} is {array.dtype}, not numbers",
        hint="give numbers: encode text and categories, and give dates as days since a fixed date",
    )


def _labels(value: Any, where: str) -> Labels:
    array = _array(value, where)
    if array.ndim != 1:
        one_hot = array.ndim == 2 and array.shape[1] > 1 and array.dtype.kind in "iufb" and (array.sum(1) == 1).all()
        raise DataError(
            f"{where} has the shape {list(array.shape)}",
            hint="labels are [rows], one for each row"
            + (": for one-hot labels give y.argmax(axis=1)" if one_hot else ": give y.ravel()" * (array.ndim == 2)),
        )
    if array.size and array.dtype.kind not in "iub":
        hint = "labels are whole numbers from 0: cast them to int64"
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            row = int(np.flatnonzero(~np.isfinite(array))[0])
            raise DataError(f"{where}, row {row} (from 0) is {array[row]}", hint="leave out rows without a label")
        if array.dtype.kind == "f" and (array != np.floor(array)).any():
            row = int(np.flatnonzero(array != np.floor(array))[0])
            hint = f"row {row} (from 0) is {array[row]}, and labels are whole numbers from 0. {REGRESSION_HINT}"
        if array.dtype.kind in "US":
            hint = "labels are whole numbers from 0: number the classes in the same way for all clients"
        raise DataError(f"{where} is {array.dtype}", hint=hint)
    return _int64(array, where)


def _numbers(value: Any, where: str) -> NDArray[np.float32]:
    """Return targets that are numbers."""
    array = _array(value, where)
    if array.ndim != 1:
        raise DataError(
            f"{where} has the shape {list(array.shape)}",
            hint="targets are [rows], one number for each row" + ": give y.ravel()" * (array.ndim == 2),
        )
    if array.size and array.dtype.kind not in "iufb":
        raise DataError(f"{where} is {array.dtype}, not numbers", hint="with task regression, targets are numbers")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes Inf, which is refused by its row
        return array.astype(np.float32)


def _int64(array: NDArray[Any], where: str) -> NDArray[np.int64]:
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise DataError(f"{where} holds {array.max()}, which int64 cannot hold", hint="give smaller whole numbers")
    return array.astype(np.int64)


def _array(value: Any, where: str) -> NDArray[Any]:
    """Return what a function gave as an array. Raises `DataError` for what is no array, and for missing values."""
    try:
        return _as_array(value, where)
    except FedroundsError:
        raise
    except Exception as error:  # whatever the object itself raises
        raise DataError(
            f"{where} cannot be made an array: {_unlike(value) or one_line(error)}",
            hint="give an array, a tensor or a list of equally long rows",
        ) from error


def _as_array(value: Any, where: str) -> NDArray[Any]:
    if hasattr(value, "toarray"):  # scipy's sparse matrices
        raise DataError(f"{where} is a sparse {type(value).__name__}", hint="give it as a dense array: x.toarray()")
    if hasattr(value, "isna") and hasattr(value, "to_numpy"):  # pandas, without importing it
        return _of_pandas(value, where)
    check_unmasked(value, where)
    if hasattr(value, "detach"):  # a torch tensor, without importing torch
        value = value.detach().cpu().numpy()
    array = np.asarray(value)
    return _of_objects(array, where) if array.dtype == object else array


def _of_pandas(value: Any, where: str) -> NDArray[Any]:
    """Return a data frame, a series or an extension array as an array."""
    is_frame = hasattr(value, "columns")
    names = list(value.columns) if is_frame else []
    missing = np.asarray(value.isna())
    if missing.any():
        row, *position = (int(index) for index in np.argwhere(missing)[0])
        column = f", column {names[position[0]]!r}" if position else ""
        raise DataError(
            f"{where}: row {row} (from 0){column}: the value is missing",
            hint="fill in missing values, or leave these rows out",
        )
    dtypes = list(value.dtypes) if is_frame else [value.dtype]
    for place, dtype in enumerate(dtypes):
        if dtype.kind not in "iufbO":
            column = f", column {names[place]!r}" if names else ""
            raise DataError(
                f"{where}{column} is {dtype}, not numbers", hint="give dates as days since a fixed date, for instance"
            )
    kinds = {dtype.kind for dtype in dtypes}
    if (names and len(kinds) > 1) or any(
        not isinstance(dtype, np.dtype) for dtype in dtypes
    ):  # else an array of objects
        if kinds <= {"i", "u", "f", "b"}:
            whole = kinds <= {"i", "u"}
            return np.asarray(value.to_numpy(np.bool_ if kinds == {"b"} else np.int64 if whole else np.float64))
        value = value.astype(object)
    array = np.asarray(value)
    return _of_objects(array, where, names) if array.dtype == object else array


def _of_objects(array: NDArray[Any], where: str, names: Sequence[Any] = ()) -> NDArray[Any]:
    """Return an array of Python's numbers as an array of numpy's. Raises `DataError` for any other object in it."""
    for index, element in np.ndenumerate(array):
        signalling = isinstance(element, Decimal) and element.is_snan()  # a NaN that raises an error where it is used
        if signalling or not isinstance(element, Real | Decimal | np.bool_):
            place = f"row {index[0]} (from 0)" if index else "it"
            if len(index) > 1:
                place += f", column {repr(names[index[1]]) if names else index[1] if len(index) == 2 else index[1:]}"
            nulls = ("NAType", "NaTType")  # of pandas
            if signalling or element is None or element is np.ma.masked or type(element).__name__ in nulls:
                raise DataError(
                    f"{where}: {place} is {element}: a missing value",
                    hint="fill in missing values, or leave these rows out",
                )
            raise DataError(
                f"{where}: {place} is a {type(element).__name__}, not a number",
                hint="give numbers that numpy can hold in one array: encode text and categories as numbers",
            )
    kinds = {type(element) for element in array.flat}
    if all(issubclass(kind, bool | np.bool_) for kind in kinds):
        return array.astype(np.bool_)
    if not all(issubclass(kind, Integral) for kind in kinds):
        return array.astype(np.float64)
    try:
        return array.astype(np.int64)
    except OverflowError as error:
        raise DataError(f"{where} holds whole numbers that int64 cannot hold", hint="give smaller ones") from error


def _unlike(value: Any) -> str | None:
    """Return in which row a list of lists is not as long as in its first one."""
    if not isinstance(value, list | tuple) or not all(hasattr(row, "__len__") for row in value):
        return None
    lengths = [len(row) for row in value]
    row = next((row for row, length in enumerate(lengths) if length != lengths[0]), None)
    return None if row is None else f"row {row} (from 0) has {lengths[row]} values, and row 0 has {lengths[0]}"
