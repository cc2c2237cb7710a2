"""A copy differs once anything in the object has changed, and only then."""

from __future__ import annotations

import array
import io
import operator
import random
import threading
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np
import pytest
import torch

from fedrounds.fl_components.models.frozen import LARGE, Freezer


class Slotted:
    __slots__ = ("held",)

    def __init__(self) -> None:
        self.held = [0]


class SlottedBelow(Slotted):
    """Whose slot is in its base class."""

    __slots__ = ()


class Queue(deque[int]):
    pass


class Numbers(set[int]):
    pass


class Text(io.StringIO):
    pass


class Bytes(bytearray):
    pass


class Generator(random.Random):
    pass


class WithProperty:
    def __init__(self) -> None:
        self.held = [0]

    @cached_property
    def first(self) -> int:
        return self.held[0]


class Target:
    held = 0


TARGET = Target()


def counting() -> Iterator[int]:
    total = 0
    while True:
        total += 1
        yield total


def started() -> Iterator[int]:
    counter = counting()
    next(counter)
    return counter


HELPER: Any = types.ModuleType("a_module_of_the_users")
HELPER.total = 0


def read_helper() -> Any:
    return max(each for each in HELPER.__dict__.values() if isinstance(each, int))


def read_helper_by_name() -> Any:
    return operator.attrgetter("total")(HELPER)


def read_helper_inside() -> Any:
    def read() -> Any:
        return HELPER.total

    return read()


def count_in_helper(_: Any) -> None:
    HELPER.total += 1


def with_cell() -> Callable[[int], int]:
    total = 0

    def add(more: int) -> int:
        nonlocal total
        total += more
        return total

    return add


def cached(size: int | None) -> Callable[[int], list[int]]:
    @lru_cache(size)
    def numbers_below(limit: int) -> list[int]:
        return list(range(limit))

    numbers_below(2)
    return numbers_below


def set_held(each: Any) -> None:
    each.held[0] = 1


CASES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "list": (lambda: [[0]], lambda each: each[0].append(1)),
    "tuple": (lambda: ([0],), lambda each: each[0].append(1)),
    "dictionary": (lambda: {"a": 0}, lambda each: each.update(a=1)),
    "order of a dictionary": (lambda: OrderedDict(a=0, b=0), lambda each: each.move_to_end("a")),
    "defaultdict": (lambda: defaultdict(int), lambda each: each["a"]),
    "deque": (lambda: deque([0]), lambda each: each.append(1)),
    "deque of the user's": (lambda: Queue([0]), lambda each: each.append(1)),
    "set": (lambda: {0}, lambda each: each.add(1)),
    "set of the user's": (lambda: Numbers({0}), lambda each: each.add(1)),
    "text": (lambda: io.StringIO("a"), lambda each: each.write("b")),
    "text of the user's": (lambda: Text("a"), lambda each: each.write("b")),
    "place in bytes": (lambda: io.BytesIO(b"ab"), lambda each: each.read(1)),
    "bytes of the user's": (lambda: Bytes(b"a"), lambda each: each.extend(b"b")),
    "array": (lambda: array.array("d", [0.0]), lambda each: each.append(1.0)),
    "memory": (lambda: memoryview(bytearray(1)), lambda each: each.__setitem__(0, 1)),
    "numbers": (lambda: np.zeros(2), lambda each: each.__setitem__(0, 1)),
    "not a number": (lambda: np.array([np.nan, 0.0]), lambda each: each.__setitem__(1, 1)),
    "tensor": (lambda: torch.zeros(2), lambda each: each.add_(1)),
    "tensor by its version": (lambda: torch.zeros(LARGE + 1), lambda each: each[0].add_(1)),
    "slot": (Slotted, set_held),
    "slot of a base class": (SlottedBelow, set_held),
    "a thread's local": (threading.local, lambda each: setattr(each, "held", 1)),
    "namespace": (types.SimpleNamespace, lambda each: setattr(each, "held", 1)),
    "attribute": (WithProperty, set_held),
    "cached property": (WithProperty, lambda each: each.first),
    "Python's generator": (lambda: random.Random(0), lambda each: each.random()),
    "generator of the user's": (lambda: Generator(0), lambda each: each.random()),
    "numpy's generator": (lambda: np.random.default_rng(0), lambda each: each.random()),
    "numpy's old generator": (lambda: np.random.RandomState(0), lambda each: each.rand()),
    "torch's generator": (torch.Generator, lambda each: torch.rand(1, generator=each)),
    "generator function": (started, next),
    "iterator": (lambda: iter([1, 2]), next),
    "map": (lambda: map(abs, [1, 2]), next),
    "partial": (lambda: partial(max, [0]), lambda each: each.args[0].append(1)),
    "bound method of a list": (lambda: [0].append, lambda each: each(1)),
    "variable of an enclosing function": (with_cell, lambda each: each(1)),
    "module that a function reads as a whole": (lambda: read_helper, count_in_helper),
    "module that a function reads by a name": (lambda: read_helper_by_name, count_in_helper),
    "module that an inner function reads": (lambda: read_helper_inside, count_in_helper),
    "new result in a cache": (lambda: cached(None), lambda each: each(3)),
    "new result in a bounded cache": (lambda: cached(8), lambda each: each(3)),
    "result of a cache": (lambda: cached(None), lambda each: each(2).append(1)),
    "result of a bounded cache": (lambda: cached(8), lambda each: each(2).append(1)),
    "weak reference": (lambda: weakref.ref(TARGET), lambda each: setattr(each(), "held", each().held + 1)),
}


@pytest.mark.parametrize("fast", [False, True], ids=["bits", "fast"])
@pytest.mark.parametrize("case", CASES)
def test_a_change_is_seen_and_nothing_else(case: str, fast: bool) -> None:
    make, change = CASES[case]
    value = make()
    before = Freezer(fast=fast).freeze(value)
    assert Freezer(fast=fast).freeze(value) == before
    change(value)
    assert Freezer(fast=fast).freeze(value) != before


def test_what_is_compared_by_identity_may_change() -> None:
    inner = [0]
    before = Freezer({id(inner)}).freeze([inner])
    inner.append(1)
    assert Freezer({id(inner)}).freeze([inner]) == before
    assert Freezer({id(inner)}).freeze([[0, 1]]) != before


def test_objects_that_hold_each_other_end() -> None:
    one: list[Any] = [0]
    one.append(one)
    before = Freezer().freeze(one)
    assert Freezer().freeze(one) == before
    one[0] = 1
    assert Freezer().freeze(one) != before
