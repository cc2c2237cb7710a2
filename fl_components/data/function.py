"""Function: a function of your own returns the clients' examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, JsonValue

from fl_components.data.base import DataRule
from fl_components.data.federated import ClientExamples, Features, FederatedData, Labels
from fl_components.errors import ConfigError, DataError, one_line
from fl_components.rules import import_attribute

_FORM = "return {client_id: (x_train, y_train) or (x_train, y_train, x_test, y_test)}"


class FunctionData(DataRule):
    """Examples from your function: `path` names it ("package.module:name"), `arguments` are its keyword arguments.

    The function returns ``{client_id: (x_train, y_train)}`` or, for clients with test rows, ``{client_id: (x_train,
    y_train, x_test, y_test)}``; arrays, tensors or lists. Features are [rows, ...]: floats and booleans become float32,
    whole numbers int64 tokens. Labels are whole numbers [rows] from 0. It must return the same for the same arguments,
    or a run that is resumed goes on with other data.

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

    def known_num_clients(self) -> None:
        return None

    def load(self, seed: int) -> FederatedData:
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
        clients = {client_id: _examples(self.path, client_id, value) for client_id, value in returned.items()}
        if not clients:
            raise DataError(f"{self.path} returned no clients", hint=_FORM)
        num_classes = self.num_classes
        if num_classes is None:
            labels = [y for example in clients.values() for y in (example.y_train, example.y_test) if len(y)]
            num_classes = 1 + max((int(y.max()) for y in labels), default=0)
        return FederatedData.from_clients(clients, num_classes=num_classes, public=self.public)


def _examples(path: str, client_id: Any, value: Any) -> ClientExamples:
    where = f"{path}, client {client_id!r}"
    if not isinstance(value, tuple | list) or len(value) not in (2, 4):
        found = f"{len(value)} values" if isinstance(value, tuple | list) else f"a {type(value).__name__}"
        raise DataError(f"{where}: {found}, not 2 or 4 arrays", hint=_FORM)
    x_train, y_train = _features(value[0], f"{where}: x_train"), _labels(value[1], f"{where}: y_train")
    if len(value) == 4:
        x_test, y_test = _features(value[2], f"{where}: x_test"), _labels(value[3], f"{where}: y_test")
    else:
        x_test, y_test = x_train[:0], y_train[:0]
    for part, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        if len(x) != len(y):
            raise DataError(
                f"{where}: x_{part} has {len(x)} rows and y_{part} has {len(y)}", hint="give one label for each row"
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
        return array.astype(np.int64)
    raise DataError(f"{where} is {array.dtype}, not numbers", hint="give numbers that numpy can hold in one array")


def _labels(value: Any, where: str) -> Labels:
    array = _array(value, where)
    if array.ndim != 1:
        raise DataError(f"{where} has the shape {list(array.shape)}", hint="labels are [rows], one for each row")
    if array.size and array.dtype.kind not in "iub":
        raise DataError(f"{where} is {array.dtype}", hint="labels are whole numbers from 0: cast them to int64")
    return array.astype(np.int64)


def _array(value: Any, where: str) -> NDArray[Any]:
    try:
        if hasattr(value, "detach"):  # a torch tensor, without importing torch
            value = value.detach().cpu().numpy()
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{where} cannot be made an array: {error}", hint="give an array, a tensor or a list of equally long rows"
        ) from error
