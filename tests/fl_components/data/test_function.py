from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedrounds.fl_components.data import ClientExamples, FederatedData, FunctionData
from fedrounds.fl_components.errors import ConfigError, DataError


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """Loads what the given body of a function `load(**arguments)` returns, as a user would write it in a module."""
    monkeypatch.syspath_prepend(tmp_path)
    calls = itertools.count()

    def call(body: str, **fields: Any) -> FederatedData:
        # Each body is a module of its own: one that changes after it was imported is refused.
        module = f"clinic_{abs(hash(request.node.nodeid))}_{next(calls)}"
        source = "import numpy as np, torch\n\nconstant = 3\n\ndef load(rows=2, **others):\n"
        (tmp_path / f"{module}.py").write_text(source + "".join(f"    {line}\n" for line in body.splitlines()))
        return FunctionData.model_validate({"path": f"{module}:load"} | fields).load(seed=0)

    return call


def test_arguments_arrive_and_labels_are_counted(load: Any) -> None:
    data = load("return {'a': (np.zeros((rows, 2)), np.arange(rows))}", arguments={"rows": 4})
    assert (data.num_examples(0), data.num_classes, data.public) == (4, 4, False)
    assert load("return {'a': ([[1.0], [2.0]], [0, 1])}", num_classes=7, public=True).num_classes == 7


@pytest.mark.parametrize(
    "value",
    [
        "[[1.5, 2], [3, 4]], [0, 1]",
        "np.array([[1.5, 2], [3, 4]]), np.array([0, 1], np.uint8)",
        "torch.tensor([[1.5, 2], [3, 4]], requires_grad=True), torch.tensor([0, 1])",
        "torch.tensor([[1.5, 2], [3, 4]]).half(), np.array([False, True])",
        "((1.5, 2), (3, 4)), (0, 1), [], []",
    ],
)
def test_arrays_tensors_and_lists_are_the_same(load: Any, value: str) -> None:
    data = load(f"return {{'a': ({value})}}")
    assert data.x_train.dtype == np.float32 and data.x_train.tolist() == [[1.5, 2], [3, 4]]
    assert data.y_train.dtype == np.int64 and data.y_train.tolist() == [0, 1]
    assert data.x_test.shape == (0, 2)


def test_whole_numbers_are_tokens(load: Any) -> None:
    data = load("return {'a': (torch.tensor([[1, 2], [3, 4]], dtype=torch.int32), [0, 1])}")
    assert data.x_train.dtype == np.int64


def test_some_clients_have_test_rows(load: Any) -> None:
    data = load("x = np.ones((2, 3))\nreturn {'a': (x, [0, 1]), 'b': [x, [0, 1], x[:1], [1]]}")
    assert [len(data.test(i)[1]) for i in range(2)] == [0, 1]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return None", "returned a NoneType, not a mapping"),
        ("return [([[1.0]], [0])]", "returned a list, not a mapping"),
        ("return {}", "returned no clients"),
        ("return {'a': None}", "client 'a': a NoneType, not 2 or 4 arrays"),
        ("return {'a': np.ones((2, 2))}", "client 'a': a ndarray, not 2 or 4"),
        ("return {'a': ([[1.0]], [0], [[1.0]])}", "client 'a': 3 values, not 2 or 4"),
        ("return {7: ([[1.0], [2.0]], [0, 1])}", "client id 7 cannot be used"),
        ("return {'a': ([1.0, 2.0], [0, 1])}", r"x_train has the shape \[2\]"),
        ("return {'a': (3.0, [0])}", r"x_train has the shape \[\]"),
        ("return {'a': ([[1.0], [2.0, 3.0]], [0, 1])}", "x_train cannot be made an array"),
        ("return {'a': (torch.ones(2, 2).bfloat16(), [0, 1])}", "x_train cannot be made an array"),
        ("return {'a': ([['x'], ['y']], [0, 1])}", "x_train is <U1, not numbers"),
        ("return {'a': ([[None], [1.0]], [0, 1])}", r"x_train: row 0 \(from 0\), column 0 is None: a missing value"),
        ("return {'a': ([[1.0], [2.0]], [0.0, 1.0])}", "y_train is float64"),
        ("return {'a': ([[1.0], [2.0]], ['no', 'yes'])}", "y_train is <U3"),
        ("return {'a': ([[1.0], [2.0]], [[0], [1]])}", r"y_train has the shape \[2, 1\]"),
        ("return {'a': ([[1.0], [2.0]], [0])}", "x_train has 2 rows and y_train has 1"),
        ("return {'a': ([[1.0], [2.0]], [0, 1], [[1.0]], [])}", "x_test has 1 rows and y_test has 0"),
        ("return {'a': ([], [])}", "client 'a' has no training rows"),
        ("return {'a': ([[1.0], [2.0]], [0, 1]), 'b': ([[1.0, 2.0]], [0])}", "'b' has rows of float32"),
        ("return {'a': ([[1.0], [2.0]], [0, 1]), 'b': ([[1]], [0])}", "'b' has rows of int64"),
        (
            "return {'a': ([[1.0], [2.0]], [0, 1], [[1.0, 2.0]], [0])}",
            r"'a' has test rows of float32 \[2\], and training",
        ),
        (
            "return {'a': ([[1.0], [2.0]], [0, 1], [[1]], [0])}",
            r"'a' has test rows of int64 \[1\], and training rows of",
        ),
        ("return {'a': ([[1.0], [np.nan]], [0, 1])}", "client 'a', training row 1 .* nan"),
        ("return {'a': ([[1.0], [1e300]], [0, 1])}", "client 'a', training row 1 .* inf"),
        ("return {'a': ([[1.0], [2.0]], [0, 0])}", r"1 class\(es\)"),
        ("return {'a': ([[1.0], [2.0]], [-1, 1])}", "client 'a', training row 0 .* label -1"),
        ("raise OSError('no such folder')", "failed .* OSError: no such folder"),
    ],
)
def test_a_wrong_return_is_refused(load: Any, body: str, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        load(body)
    assert caught.value.hint


def test_labels_beyond_the_given_number_of_classes(load: Any) -> None:
    with pytest.raises(DataError, match="label 2"):
        load("return {'a': ([[1.0], [2.0]], [0, 2])}", num_classes=2)


def test_arguments_that_the_function_does_not_take(load: Any) -> None:
    with pytest.raises(DataError, match=r"failed with data\.arguments \['rows'\]: TypeError"):
        load("return np.zeros(rows)", arguments={"rows": "two"})


@pytest.mark.parametrize("path", ["nowhere_at_all:load", "math:no_such_name", "math", "math:pi"])
def test_a_path_that_names_no_function(path: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.path"):
        FunctionData(path=path).load(seed=0)


MASKED = "m = np.ma.masked_equal([[1.0, -9.0], [2.0, 3.0]], -9.0)\n"
FRAME = "import pandas as pd\nf = pd.DataFrame({'age': pd.array([50, None], '%s'), 'bmi': [20.5, 31.0]})\n"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (MASKED + "return {'a': (m, [0, 1])}", r"client 'a': x_train: row 0 \(from 0\), column 1 is masked"),
        (MASKED + "return {'a': ([m[1], m[0]], [0, 1])}", r"x_train: row 1 \(from 0\), column 1 is masked"),
        (MASKED + "return {'a': (m.filled(0), [0, 1], m, [0, 1])}", r"x_test: row 0 \(from 0\), column 1 is masked"),
        ("return {'a': ([[1.0], [2.0]], [0, np.ma.masked])}", r"y_train: row 1 \(from 0\) is masked"),
        ("return {'a': ([[1.0], [2.0]], np.ma.array([0, 1], mask=[1, 0]))}", r"y_train: row 0 \(from 0\) is masked"),
        (
            FRAME % "Int64" + "return {'a': (f, [0, 1])}",
            r"x_train: row 1 \(from 0\), column 'age': the value is missing",
        ),
        (FRAME % "Float64" + "return {'a': (f, [0, 1])}", r"column 'age': the value is missing"),
        (
            "import pandas as pd\nreturn {'a': (pd.DataFrame({'b': pd.array([True, None], 'boolean')}), [0, 1])}",
            "row 1 .*column 'b': the value is missing",
        ),
        (
            FRAME % "Int64" + "return {'a': ([[1.0], [2.0]], f['age'])}",
            r"y_train: row 1 \(from 0\): the value is missing",
        ),
        ("import pandas as pd\nreturn {'a': (pd.DataFrame({'sex': ['f', 'm']}), [0, 1])}", "column 'sex' is a str"),
        (
            "import pyarrow as pa\nreturn {'a': (pa.table({'x': [1, None]}), [0, 1])}",
            "client 'a', training row 1 .* nan",
        ),
        ("from scipy import sparse\nreturn {'a': (sparse.eye(2).tocsr(), [0, 1])}", "x_train is a sparse csr_matrix"),
        ("return {'a': (torch.eye(2).to_sparse(), [0, 1])}", r"Sparse .* Use Tensor.to_dense\(\)"),
        ("return {'a': ([[1.0, 2.0], [3.0]], [0, 1])}", r"row 1 \(from 0\) has 1 values, and row 0 has 2"),
        ("return {'a': ([[1.0], [2.0]], [1, 2])}", "no row of any client has the label 0, and the labels go up to 2"),
        ("return {'a': ([[1.0], [2.0]], [0, 2])}", "no row of any client has the label 1"),
        ("return {'a': (np.array([[2**63]], np.uint64), [0])}", "x_train holds 9223372036854775808, which int64"),
    ],
)
def test_what_is_missing_or_no_array_is_refused_by_client_and_row(load: Any, body: str, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        load(body)
    assert caught.value.hint


ODD = {
    "array": ("def __array__(self, *args, **kwargs):", "raise KeyError('no such table')"),
    "columns": ("def __getattr__(self, name):", "raise LookupError('no such table')"),
    "str": ("def __init__(self):", "raise type('Odd', (Exception,), {'__str__': lambda self: 1 / 0})()"),
}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("array", "client 'a': x_train cannot be made an array: KeyError: 'no such table'"),
        ("columns", "client 'a': x_train cannot be made an array: LookupError: no such table"),
        ("str", "failed with data.arguments .*: Odd$"),
        ("raise ValueError('K\\udcf6ln')", r"ValueError: K\\udcf6ln$"),
        ("import pandas as pd\nreturn {'a': (pd.DataFrame(index=[0, 1]), [0, 1])}", r"the shape \[2, 0\]"),
        (
            "from decimal import Decimal\nreturn {'a': ([[Decimal('sNaN')], [1]], [0, 1])}",
            "column 0 is sNaN: a missing",
        ),
        ("return {'a': ([[1.5], [10**400]], [0, 1])}", "x_train cannot be made an array: OverflowError"),
        (
            "from collections import UserDict\n"
            "class Lazy(UserDict):\n    def __getitem__(self, key):\n        raise OSError('no such disk')\n"
            "return Lazy(a=1)",
            "returned cannot be read: OSError: no such disk",
        ),
        (
            "name = type('Name', (str,), {'__repr__': lambda self: 1 / 0})('a')\n"
            "return {name: ([[1.0], [2.0]], [0, 1])}",
            "returned cannot be read: ZeroDivisionError",
        ),
    ],
)
def test_objects_that_fail_in_ways_of_their_own_are_refused(load: Any, body: str, words: str) -> None:
    if body in ODD:
        head, statement = ODD[body]
        body = f"class Odd:\n    {head}\n        {statement}\nreturn {{'a': (Odd(), [0, 1])}}"
    with pytest.raises(DataError, match=words) as caught:
        load(body)
    assert caught.value.hint
    caught.value.message.encode()


@pytest.mark.parametrize(
    ("labels", "hint"),
    [
        ("np.eye(2)", r"y\.argmax\(axis=1\)"),
        ("[[0], [1]]", r"y\.ravel\(\)"),
        ("[0.5, 1.0]", "row 0 .* is 0.5, .* set task: {kind: regression}"),
        ("[0.0, 1.0]", "cast them to int64"),
        ("['no', 'yes']", "number the classes"),
        ("[1, 2]", "set data.num_classes: 3"),
    ],
)
def test_labels_of_another_form_are_explained(load: Any, labels: str, hint: str) -> None:
    with pytest.raises(DataError) as caught:
        load(f"return {{'a': ([[1.0], [2.0]], {labels})}}")
    assert re.search(hint, caught.value.hint or "")


@pytest.mark.parametrize(
    "value",
    [
        "np.ma.array([[1.5, 2], [3, 4]]), np.ma.array([0, 1])",
        "pd.DataFrame({'a': pd.array([1.5, 3], 'Float64'), 'b': pd.array([2, 4], 'Int64')}), pd.array([0, 1], 'Int64')",
        "pd.DataFrame({'a': [1.5, 3], 'b': [2, 4]}, dtype=object), pd.Series([False, True], dtype='boolean')",
        "np.array([[Decimal('1.5'), 2], [3, 4]]), np.array([0, 1], object)",
    ],
)
def test_masks_and_nullable_types_without_gaps_are_read(load: Any, value: str) -> None:
    data = load(f"import pandas as pd\nfrom decimal import Decimal\nreturn {{'a': ({value})}}")
    assert data.x_train.dtype == np.float32 and data.x_train.tolist() == [[1.5, 2], [3, 4]]
    assert data.y_train.tolist() == [0, 1]


def test_given_classes_need_not_all_occur(load: Any) -> None:
    assert load("return {'a': ([[1.0], [2.0]], [1, 2])}", num_classes=3).num_classes == 3


def test_other_data_rules_cannot_lose_a_mask_either() -> None:
    x = np.ma.masked_equal(np.float32([[1, -9], [2, 3]]), -9)
    y = np.array([0, 1])
    with pytest.raises(DataError, match=r"client 'a', x_train: row 0 \(from 0\), column 1 is masked"):
        FederatedData.from_clients({"a": ClientExamples(x, y, x[:0], y[:0])}, num_classes=2, public=True)
