"""Wherever a model keeps something from one call to the next, it is refused."""

from __future__ import annotations

import contextvars
import copy
import datetime as dt
import functools
import itertools
import logging
import queue
import re
import sys
import threading
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedrounds.fl_components.errors import ModelError
from fedrounds.fl_components.models import RowFormat, check_fits
from fedrounds.fl_components.models.state import ModuleState
from fedrounds.fl_components.privacy import ExampleLevel
from fedrounds.fl_components.training import SGD, one_thread
from fedrounds.fl_components.training.chunk import ExampleTable, synthetic_like
from fedrounds.fl_components.training.private import choose_grad_sampler
from tests.fl_components.models import hidden_state

ROWS = RowFormat((4,))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


class Model(nn.Module):
    """Two scores of four features, shifted by what `keep` makes of the features and of the model."""

    def __init__(self, keep: Callable[[Any, Tensor], float] | None = None, **attributes: Any) -> None:
        super().__init__()
        self.first, self.last, self.keep = nn.Linear(4, 5), nn.Linear(5, 2), keep
        self.register_buffer("origin", torch.zeros(1))
        self.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        shift = 0.0 if self.keep is None else self.keep(self, x)
        return self.last(torch.tanh(self.first(x) + shift))


class Namespace:
    total = 0.0


class Counts:
    totals: ClassVar = {"total": 0.0}

    def add(self, value: float) -> float:
        self.totals["total"] += value
        return self.totals["total"]


class Slotted:
    __slots__ = ("total",)

    def __init__(self) -> None:
        self.total = 0.0

    def add(self, value: float) -> float:
        self.total += value
        return self.total


class Values(list[float]):
    total = 0.0


class Derived(Namespace):
    pass


class Hidden:
    """With a slot whose name Python mangles."""

    __slots__ = ("__total",)

    def __init__(self) -> None:
        self.__total = 0.0

    def add(self, value: float) -> float:
        self.__total += value
        return self.__total


class Mutable:
    total = 0.0


LOCAL = threading.local()
LOCAL.total = 0.0
PLAIN = SimpleNamespace(total=0.0)
UNREGISTERED = [Model()]
BUFFER = bytearray(1)
OBJECTS = {Mutable()}
ARRAY = np.array([[0.0], None], object)
QUEUE: queue.Queue[float] = queue.Queue()
VARIABLE: contextvars.ContextVar[float] = contextvars.ContextVar("total", default=0.0)
FRAME = pd.DataFrame({"total": np.zeros(100)})
CYCLE = itertools.cycle(range(1000))
APPEND = list[float]().append


def in_a_default(_: Any, x: Tensor, seen: dict[str, float] = {"total": 0.0}) -> float:  # noqa: B006
    seen["total"] += x.mean().item()
    return seen["total"]


def in_a_keyword_default(_: Any, x: Tensor, *, seen: list[float] = [0.0]) -> float:  # noqa: B006
    seen[0] += x.mean().item()
    return seen[0]


def in_an_attribute_of_a_function(_: Any, x: Tensor) -> float:
    function: Any = in_an_attribute_of_a_function
    function.total = getattr(function, "total", 0.0) + x.mean().item()
    return float(function.total)


def in_a_class(_: Any, x: Tensor) -> float:
    Namespace.total += x.mean().item()
    return Namespace.total


def in_another_module(_: Any, x: Tensor) -> float:
    hidden_state.total += x.mean().item()
    return hidden_state.total


def in_another_module_that_is_imported_late(_: Any, x: Tensor) -> float:
    from tests.fl_components.models import hidden_state as late

    late.total += x.mean().item()
    return late.total


def in_an_attribute_of_a_tensor(model: Any, x: Tensor) -> float:
    model.origin.total = getattr(model.origin, "total", 0.0) + x.mean().item()
    return float(model.origin.total)


def in_an_attribute_of_a_parameter(model: Any, x: Tensor) -> float:
    model.last.weight.total = getattr(model.last.weight, "total", 0.0) + x.mean().item()
    return float(model.last.weight.total)


def in_a_gradient(model: Any, x: Tensor) -> float:
    before = 0.0 if model.frozen.grad is None else float(model.frozen.grad)
    model.frozen.grad = torch.full((1,), before + x.mean().item())
    return float(model.frozen.grad)


def in_an_attribute_of_a_list(model: Any, x: Tensor) -> float:
    model.values.total += x.mean().item()
    return float(model.values.total)


@functools.cache
def table(_: str) -> dict[str, float]:
    return {"total": 0.0}


@functools.lru_cache(maxsize=4)
def bounded_table(_: str) -> dict[str, float]:
    return {"total": 0.0}


table("seen")
bounded_table("seen")


def in_what_a_cache_holds(_: Any, x: Tensor) -> float:
    table("seen")["total"] += x.mean().item()
    return table("seen")["total"]


def in_what_a_bounded_cache_holds(_: Any, x: Tensor) -> float:
    bounded_table("seen")["total"] += x.mean().item()
    return bounded_table("seen")["total"]


def in_a_thread(_: Any, x: Tensor) -> float:
    LOCAL.total += x.mean().item()
    return float(LOCAL.total)


def in_a_namespace(_: Any, x: Tensor) -> float:
    PLAIN.total += x.mean().item()
    return float(PLAIN.total)


def in_a_global_by_name(_: Any, x: Tensor) -> float:
    globals()["SOMEWHERE"] = globals().get("SOMEWHERE", 0.0) + x.mean().item()
    return float(globals()["SOMEWHERE"])


def in_a_global_by_a_computed_name(_: Any, x: Tensor) -> float:
    name = "".join(["SOME", "THING"])
    globals()[name] = globals().get(name, 0.0) + x.mean().item()
    return float(globals()[name])


def in_a_layer_that_is_not_registered(_: Any, x: Tensor) -> float:
    UNREGISTERED[0].total = getattr(UNREGISTERED[0], "total", 0.0) + x.mean().item()
    return float(UNREGISTERED[0].total)


def in_a_buffer(_: Any, x: Tensor) -> float:
    BUFFER[0] = (BUFFER[0] + 1 + int(x.abs().sum() > 0)) % 256
    return BUFFER[0] / 256


def in_a_base_class(_: Any, x: Tensor) -> float:
    Derived.__base__.total += x.mean().item()  # type: ignore[union-attr]
    return Derived.total


def in_an_object_of_a_set(_: Any, x: Tensor) -> float:
    (only,) = OBJECTS
    only.total += x.mean().item()
    return only.total


def in_an_array_of_objects(_: Any, x: Tensor) -> float:
    ARRAY[0][0] += x.mean().item()
    return float(ARRAY[0][0])


def in_a_queue(_: Any, x: Tensor) -> float:
    QUEUE.put(x.mean().item())
    return 0.0


def in_a_context(_: Any, x: Tensor) -> float:
    VARIABLE.set(VARIABLE.get() + x.mean().item())
    return VARIABLE.get()


def in_a_data_frame(_: Any, x: Tensor) -> float:
    FRAME.loc[50, "total"] += x.mean().item()
    return float(FRAME["total"].sum())


def in_an_iterator(_: Any, x: Tensor) -> float:
    return next(CYCLE) * 0.001


def in_an_attribute_of_a_cached_function(_: Any, x: Tensor) -> float:
    cached: Any = table
    cached.total = getattr(cached, "total", 0.0) + x.mean().item()
    return float(cached.total)


def in_another_module_by_a_computed_name(_: Any, x: Tensor) -> float:
    name = "".join(["to", "tal"])
    setattr(hidden_state, name, getattr(hidden_state, name) + x.mean().item())
    return hidden_state.total


def in_a_module_by_its_name(_: Any, x: Tensor) -> float:
    module = sys.modules["tests.fl_components.models.hidden_state"]
    module.total += x.mean().item()
    return float(module.total)


def through_a_bound_method(_: Any, x: Tensor) -> float:
    APPEND(x.mean().item())
    return 0.0


def _with_hook() -> nn.Module:
    def hook(_: nn.Module, arguments: Any, seen: list[float] = [0.0]) -> Any:  # noqa: B006
        seen[0] += arguments[0].mean().item()
        return (arguments[0] + seen[0],)

    model = Model()
    model.first.register_forward_pre_hook(hook)
    return model


PLACES: dict[str, Callable[[], nn.Module]] = {
    each.__name__.replace("_", " "): functools.partial(Model, each)
    for each in (
        in_a_default,
        in_a_keyword_default,
        in_an_attribute_of_a_function,
        in_a_class,
        in_another_module,
        in_another_module_that_is_imported_late,
        in_an_attribute_of_a_tensor,
        in_an_attribute_of_a_parameter,
        in_a_gradient,
        in_what_a_cache_holds,
        in_what_a_bounded_cache_holds,
        in_a_thread,
        in_a_namespace,
        in_a_global_by_name,
        in_a_global_by_a_computed_name,
        in_a_layer_that_is_not_registered,
        in_a_buffer,
        in_a_base_class,
        in_an_object_of_a_set,
        in_an_array_of_objects,
        in_a_queue,
        in_a_context,
        in_a_data_frame,
        in_an_iterator,
        in_an_attribute_of_a_cached_function,
        in_another_module_by_a_computed_name,
        in_a_module_by_its_name,
        through_a_bound_method,
    )
} | {
    "in an attribute of a list": lambda: Model(in_an_attribute_of_a_list, values=Values()),
    "in slots": lambda: Model(lambda model, x: model.helper.add(x.mean().item()), helper=Slotted()),
    "in a mangled slot": lambda: Model(lambda model, x: model.helper.add(x.mean().item()), helper=Hidden()),
    "in a helper's class": lambda: Model(lambda model, x: model.helper.add(x.mean().item()), helper=Counts()),
    "in a hook's default": _with_hook,
}


@pytest.mark.parametrize("place", PLACES)
def test_a_model_that_keeps_something_is_refused(place: str) -> None:
    with pytest.raises(ModelError, match="the model changes as it runs"):
        check_fits(PLACES[place](), ROWS, (2,))


class CountsOnItsClass(nn.Sequential):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return super().forward(x)  # type: ignore[no-any-return]


class ReplacesItsLayer(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        self[0] = copy.deepcopy(self[0])
        return super().forward(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "where"), [(CountsOnItsClass, "class CountsOnItsClass of the model"), (ReplacesItsLayer, "layers of")]
)
def test_a_change_of_a_layers_class_or_of_its_layers_is_named(kind: Any, where: str) -> None:
    model = kind(nn.Linear(4, 2))
    before = ModuleState(model)
    model(torch.zeros(1, 4))
    assert any(each.startswith(where) for each in before.changes(model))
    with pytest.raises(ModelError, match="the model changes as it runs"):
        check_fits(kind(nn.Linear(4, 2)), ROWS, (2,))


def of_unusual_rows(_: Any, x: Tensor, largest: list[float] = [1.0]) -> float:  # noqa: B006
    if 20 < x.max() < 300:
        largest[0] = max(largest[0], float(x.max()))
    return largest[0]


def test_what_is_kept_of_an_unusual_row_alone_is_refused_when_it_happens() -> None:
    """No synthetic row reaches the branch: the row that does ends the training."""
    privacy = ExampleLevel(noise_multiplier=1.0, max_grad_norm=1.0, sampling_rate=1.0)
    rule, model = SGD(learning_rate=0.1, steps=1, privacy=privacy), Model(of_unusual_rows)
    x, y = torch.zeros(6, 4), torch.tensor([0, 1] * 3)
    params_D = np.concatenate([each.detach().flatten() for each in model.parameters() if each.requires_grad])
    rule.train(model, params_D, x, y, 1, bytes(32))
    x[3] = 100.0
    with pytest.raises(ModelError, match="the model changes as it runs"):
        rule.train(model, params_D, x, y, 1, bytes(32))


class Kind(Enum):
    PLAIN = "plain"


logger = logging.getLogger(__name__)
SCALE = torch.full((1,), 0.5)
PATTERN, HERE, STARTED, LOCK = re.compile("a+"), Path(__file__), dt.datetime(2026, 1, 1), threading.Lock()
NORMAL = torch.distributions.Normal(torch.zeros(2), torch.ones(2))
unrelated = {"count": 0}


def _is_constant(model: Any, x: Tensor) -> float:
    logger.debug("called")
    unrelated["count"] += 0
    _ = PATTERN.match("a"), HERE.name, STARTED.year, LOCK.locked(), functional.tanh(x), NORMAL.mean
    return float(SCALE) * model.helper.total * (Kind.PLAIN.value == "plain") * min(1.0, len(x))


def test_what_stays_as_it_is_is_not_refused() -> None:
    check_fits(Model(_is_constant, helper=Slotted()), ROWS, (2,))


def test_an_attribute_with_the_name_of_a_global_is_not_that_global() -> None:
    def reads_last(model: Any, x: Tensor) -> float:
        unrelated["count"] = unrelated["count"]
        return float(model.last.bias.detach().sum()) * 0

    globals()["bias"] = 0.0
    from fedrounds.fl_components.models.state import ModuleState

    model = Model(reads_last)
    state = ModuleState(model)
    globals()["bias"] = 1.0
    assert state.changes(model) == []


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_recurrent_layers_do_not_change_as_they_run(kind: Any) -> None:
    """torch keeps views of their parameters in lists of their own."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = kind(2, 3, batch_first=True), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.layer(x.unflatten(1, (2, 2)))[0][:, -1])

    examples = ExampleTable(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64), np.array([0]), np.array([1]))
    check_fits(Recurrent(), ROWS, (2,))
    assert choose_grad_sampler(Recurrent(), synthetic_like(examples)).name in ("vmap", "one example at a time")


def _hooked() -> nn.Module:
    layer = nn.Linear(4, 2)
    layer.weight.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
    return layer


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (_hooked, "the parameter weight has a gradient hook, which a copy of the model loses"),
        (lambda: nn.Sequential(nn.LazyLinear(2)), "the parameter 0.weight is lazy"),
        (lambda: torch.jit.script(nn.Linear(4, 2)), "the model is compiled by TorchScript"),
    ],
    ids=["gradient hook", "lazy", "TorchScript"],
)
def test_what_cannot_be_checked_or_copied_is_refused(make: Callable[[], nn.Module], sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        check_fits(make(), ROWS, (2,))


def test_what_is_nested_too_deeply_is_refused_by_its_own_sentence() -> None:
    chain: list[Any] = []
    for _ in range(300):  # copy.deepcopy takes about 450
        chain = [chain]
    layer = nn.Linear(2, 1)
    layer.chain = chain  # type: ignore[assignment]
    with pytest.raises(ModelError, match="nested too deeply"):
        ModuleState(layer).changes(layer)
