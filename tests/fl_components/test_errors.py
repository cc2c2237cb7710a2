"""The error tree: each code is one class, drawn in the module's docstring with its exit code."""

from __future__ import annotations

import pickle
import re

import pytest

from fedrounds.fl_components import errors
from fedrounds.fl_components.errors import FedroundsError, StoreError, UpdateRejected
from fedrounds.fl_components.rejections import Rejection, RejectionCode


def tree(cls: type[FedroundsError] = FedroundsError) -> list[type[FedroundsError]]:
    ours = [sub for sub in cls.__subclasses__() if sub.__module__ == errors.__name__]
    return [cls, *(found for sub in ours for found in tree(sub))]


def test_codes_are_distinct() -> None:
    codes = [cls.code for cls in tree()]
    assert len(set(codes)) == len(codes)


def test_the_drawing_is_true() -> None:
    drawn = dict(re.findall(r"── (\w+) +(\d+)", errors.__doc__ or ""))
    assert drawn == {cls.__name__: str(cls.exit_code) for cls in tree()[1:]}


def test_the_store_s_errors_are_store_errors() -> None:
    for name in ("CorruptBlob", "JournalBroken", "LeaseHeld", "LeaseLost"):
        assert issubclass(getattr(errors, name), StoreError)


@pytest.mark.parametrize("cls", [cls for cls in tree() if cls is not UpdateRejected], ids=lambda cls: cls.code)
def test_an_error_carries_a_sentence_and_a_hint(cls: type[FedroundsError]) -> None:
    error = cls("it is broken", hint="repair it")
    assert (str(error), error.message, error.hint) == ("it is broken", "it is broken", "repair it")
    assert cls("it is broken").hint is None
    copy = pickle.loads(pickle.dumps(error))  # Prefect may carry an error between processes
    assert (type(copy), copy.message, copy.hint) == (cls, "it is broken", "repair it")


def test_a_rejected_update_carries_its_rejection() -> None:
    error = UpdateRejected(Rejection(RejectionCode.TOO_LARGE, "12 bytes, password=hunter2"))
    copy = pickle.loads(pickle.dumps(error))
    for each in (error, copy):
        assert each.rejection == Rejection(RejectionCode.TOO_LARGE, "12 bytes, password=***")
        assert (each.message, each.hint) == ("too_large: 12 bytes, password=***", None)
