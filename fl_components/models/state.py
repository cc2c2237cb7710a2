"""What a module keeps from one call to the next.

Parameters, buffers and plain attributes, and whether a call changes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedrounds.fl_components.errors import ModelError
from fedrounds.fl_components.models.frozen import Freezer, bits, is_users


class ModuleState:
    """A snapshot of all that a module keeps.

    The tensors and attributes of its layers, and what the user's code that they run refers to: globals, closures,
    default arguments, attributes of functions, classes, tensors and other modules of the user's, and what
    `functools.lru_cache` holds.

    State that lies outside of the user's Python objects is not found: files, environment variables, and attributes that
    a model sets on other packages. Raises `ModelError` for what is nested too deeply.

    Args:
      module: it may be changed afterwards.
      without: tensors that somebody else watches.
      fast: compares tensors of more than `LARGE` numbers by storage and version, not by their bits.

    >>> layer = nn.Linear(2, 1)
    >>> state = ModuleState(layer)
    >>> layer.calls = 1
    >>> state.changes(layer)
    ["attribute 'calls' of the model (Linear)"]
    """

    def __init__(self, module: nn.Module, *, without: Set[int] = frozenset(), fast: bool = False) -> None:
        self._without, self._fast = without, fast
        with _nesting_refused():
            self._values = dict(self._walk(module))

    def changes(self, module: nn.Module) -> list[str]:
        """Return what differs now, named by layer; empty where nothing does."""
        with _nesting_refused():
            values = dict(self._walk(module))
            names = [name for name in self._values.keys() | values.keys() if self._values.get(name) != values.get(name)]
        layers = dict(module.named_modules())
        return sorted({_where(layers, *name) for name in names})

    def _walk(self, module: nn.Module) -> Iterator[tuple[tuple[str, str], Any]]:
        """(layer, attribute) and a copy of what it holds."""
        freezer = Freezer(self._without | {*map(id, module.modules())}, fast=self._fast)
        for layer_name, layer in module.named_modules():
            for kind, entries in (("parameter", layer._parameters), ("buffer", layer._buffers)):
                for name, tensor in entries.items():
                    is_watched = tensor is not None and id(tensor) in self._without
                    copy_of = freezer.attributes_of_tensor if is_watched else freezer.freeze
                    yield (layer_name, f"{kind} {name!r}"), copy_of(tensor)
            for name, value in vars(layer).items():
                if name not in ("_parameters", "_buffers", "_modules"):
                    yield (layer_name, f"attribute {name!r}"), freezer.freeze(value)
            yield (layer_name, "layers"), [(name, id(each)) for name, each in layer._modules.items()]
            for kind_of in type(layer).__mro__:
                if is_users(kind_of.__module__):
                    yield (layer_name, f"class {kind_of.__name__}"), freezer.freeze(kind_of)


class Watch:
    """Refuses a module that changes while it runs: `check` compares it with what it was when the watch began, or when
    `renew` was last called. The parameters are compared by version and by bits, the rest as `ModuleState` does.
    """

    def __init__(self, module: nn.Module, parameters: list[nn.Parameter]) -> None:
        self._module, self._parameters = module, parameters
        self._state = ModuleState(module, without=frozenset(map(id, parameters)), fast=True)
        self.renew()

    def renew(self) -> None:
        """The parameters were moved by whoever trains them."""
        self._before = [each.detach().clone() for each in self._parameters]
        self._versions = [each._version for each in self._parameters]

    def check(self) -> None:
        """Raise `ModelError` where the module has changed."""
        now = zip(self._parameters, self._before, self._versions, strict=True)
        changed = {id(each) for each, before, version in now if each._version != version or not same_bits(each, before)}
        named = [
            _where(dict(self._module.named_modules()), *_split(name))
            for name, each in self._module.named_parameters()
            if id(each) in changed
        ]
        refuse_changes(named or self._state.changes(self._module))


def refuse_changes(changes: list[str]) -> None:
    """Raise `ModelError` where there are changes, which name what a call of the model has changed."""
    if changes:
        more = f", and {len(changes) - 3} more" if len(changes) > 3 else ""
        raise ModelError(
            f"the model changes as it runs: {', '.join(changes[:3])}{more}",
            hint="a forward pass must leave the model as it is, for what it writes is neither averaged, clipped nor "
            "noised: leave out max_norm, running statistics and values set from a first batch; keep nothing on self",
        )


@contextmanager
def _nesting_refused() -> Iterator[None]:
    """Raise `ModelError` where what the model keeps is nested more deeply than Python's stack allows."""
    try:
        yield
    except RecursionError:
        raise ModelError(
            "the model keeps something that is nested too deeply to be compared",
            hint="keep chains of more than about 100 objects in flat lists",
        ) from None  # its traceback is a thousand equal lines


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape hold the same bits."""
    return torch.equal(bits(one.detach()), bits(other.detach()))


def _where(layers: Mapping[str, nn.Module], layer_name: str, what: str) -> str:
    layer = layers.get(layer_name)
    kind = type(layer).__name__ if layer is not None else "gone"
    max_norm = getattr(layer, "max_norm", None)
    options = "" if max_norm is None else f", max_norm={max_norm}"
    return f"{what} of {layer_name or 'the model'} ({kind}{options})"


def _split(parameter_name: str) -> tuple[str, str]:
    layer_name, _, name = parameter_name.rpartition(".")
    return layer_name, f"parameter {name!r}"
