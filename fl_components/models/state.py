"""What a module keeps from one call to the next: parameters, buffers and plain attributes, and whether a call changes
them."""

from __future__ import annotations

import array
import dis
import functools
import gc
import io
import mmap
import random
import sys
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from functools import cache, partial
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from fl_components.errors import ModelError

LARGE: Final = 1 << 16
"""Tensors of more numbers than this are compared by storage and version where a comparison has to be fast."""

_SCALARS: Final = (bool, int, float, complex, str, bytes, type(None))
_CODE: Final = (types.CodeType, torch.dtype, torch.device, torch.layout)
_BUFFERS: Final = (bytearray, memoryview, array.array, mmap.mmap)
_NAMESPACES: Final = (types.SimpleNamespace, threading.local)
_CONTAINERS: Final = (list, tuple, deque)

_LIBRARY_GENERATORS: Final = (random.random.__self__, np.random.random.__self__)  # type: ignore[attr-defined]

_NO_STATE: Final = frozenset(
    {"__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__abstractmethods__", "_abc_impl"}
)
"""Entries of a class that hold nothing of the user's."""

_VIEWS_OF_PARAMETERS: Final = frozenset({"_flat_weights", "_flat_weight_refs"})
"""Attributes of torch's recurrent layers, which follow their parameters."""

_BY_NAME: Final = frozenset({"globals", "vars", "eval", "exec"})
"""Functions by which code reaches globals whose names it does not spell."""


class ModuleState:
    """A snapshot of all that a module keeps: the tensors and attributes of its layers, and what the user's code that
    they run refers to: globals, closures, default arguments, attributes of functions, classes, tensors and other
    modules of the user's, and what `functools.lru_cache` holds.

    State that lies outside of the user's Python objects is not found: files, environment variables, and attributes that
    a model sets on other packages.

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
        self._layers: Set[int] = frozenset()
        self._values = dict(self._walk(module))

    def changes(self, module: nn.Module) -> list[str]:
        """What differs now, named by layer; empty where nothing does."""
        values = dict(self._walk(module))
        names = [name for name in self._values.keys() | values.keys() if self._values.get(name) != values.get(name)]
        layers = dict(module.named_modules())
        return sorted({_where(layers, *name) for name in names})

    def _walk(self, module: nn.Module) -> Iterator[tuple[tuple[str, str], Any]]:
        """(layer, attribute) and what it holds."""
        seen: dict[int, Any] = {}
        self._layers = frozenset(map(id, module.modules()))
        for layer_name, layer in module.named_modules():
            for kind, entries in (("parameter", layer._parameters), ("buffer", layer._buffers)):
                for name, tensor in entries.items():
                    key = (layer_name, f"{kind} {name!r}")
                    if tensor is not None and id(tensor) in self._without:
                        yield key, self._freeze_attributes_of_tensor(tensor, seen)
                    else:
                        yield key, self._freeze(tensor, seen)
            skipped = _VIEWS_OF_PARAMETERS if isinstance(layer, nn.RNNBase) else frozenset[str]()
            for name, value in vars(layer).items():
                if name not in ("_parameters", "_buffers", "_modules") and name not in skipped:
                    yield (layer_name, f"attribute {name!r}"), self._freeze(value, seen)
            yield (layer_name, "layers"), [(name, id(each)) for name, each in layer._modules.items()]
            for kind_of in type(layer).__mro__:
                if _is_users(kind_of.__module__):
                    yield (layer_name, f"class {kind_of.__name__}"), self._freeze(kind_of, seen)

    def _freeze(self, value: Any, seen: dict[int, Any]) -> Any:
        """A copy of `value` that compares equal where it has not changed."""
        if type(value) in _SCALARS:
            return (type(value).__name__, repr(value))
        if isinstance(value, _CODE) or id(value) in self._without or id(value) in self._layers:
            return id(value)
        if id(value) in seen:
            return ("again", id(value) if isinstance(value, Tensor) else None)
        seen[id(value)] = value
        if isinstance(value, Tensor):
            return self._freeze_tensor(value, seen)
        if isinstance(value, np.ndarray):
            return (str(value.dtype), value.shape, value.tobytes() if value.dtype != object else repr(value))
        if isinstance(value, types.ModuleType):
            return id(value)  # the code that refers to it names what it takes from it
        if any(value is each for each in _LIBRARY_GENERATORS):
            return id(value)  # `check_fits` has an error of its own for those who draw from them
        if isinstance(value, type):
            return self._freeze_class(value, seen) if _is_users(value.__module__) else id(value)
        if isinstance(value, types.FunctionType):
            return self._freeze_function(value, seen)
        if isinstance(value, (staticmethod, classmethod, types.MethodType)):
            return [self._freeze(each, seen) for each in (value.__func__, getattr(value, "__self__", None))]
        return (self._freeze_content(value, seen), self._freeze_attributes(value, seen))

    def _freeze_content(self, value: Any, seen: dict[int, Any]) -> Any:
        """What an object holds besides its attributes."""
        if isinstance(value, Mapping):
            return [(self._freeze(key, seen), self._freeze(each, seen)) for key, each in value.items()]
        if isinstance(value, _CONTAINERS):
            return (type(value).__name__, [self._freeze(each, seen) for each in value])
        if isinstance(value, Set):
            return (type(value).__name__, sorted(map(repr, value)))
        if isinstance(value, _SCALARS):  # of a subclass
            return repr(value)
        if isinstance(value, _BUFFERS):
            return bytes(value)
        if isinstance(value, (io.BytesIO, io.StringIO)):
            return (value.getvalue(), value.tell())
        if isinstance(value, (torch.Generator, np.random.Generator, np.random.RandomState)):
            return _generator_state(value)
        if isinstance(value, property):
            return [self._freeze(each, seen) for each in (value.fget, value.fset)]
        if isinstance(value, partial):
            return [self._freeze(each, seen) for each in (value.func, value.args, value.keywords)]
        if isinstance(value, functools._lru_cache_wrapper):
            held = [each for each in gc.get_referents(value) if each is not value.__wrapped__]
            return (self._freeze(value.__wrapped__, seen), self._freeze_links(held, seen))
        if isinstance(value, weakref.ref):
            return self._freeze(value(), seen)
        if isinstance(value, types.BuiltinFunctionType):
            owner = value.__self__
            return id(value) if isinstance(owner, types.ModuleType) else self._freeze(owner, seen)
        if isinstance(value, types.GeneratorType):
            frame = value.gi_frame
            return None if frame is None else (frame.f_lasti, self._freeze(frame.f_locals, seen))
        if hasattr(value, "getstate"):  # random.Random
            return repr(value.getstate())
        if hasattr(value, "__next__"):
            return (id(value), _position(value))
        return None if _has_users_class(value) else (id(value), repr(value))

    def _freeze_attributes(self, value: Any, seen: dict[int, Any]) -> Any:
        """The class and the attributes of an object of the user's, or of a namespace."""
        if _has_users_class(value):
            slots = [name for kind in type(value).__mro__ for name in _slots(kind)]
            in_slots = [(name, self._freeze(getattr(value, name), seen)) for name in slots if hasattr(value, name)]
            kinds = [self._freeze(kind, seen) for kind in type(value).__mro__]
            return (kinds, self._freeze(getattr(value, "__dict__", None), seen), in_slots)
        return self._freeze(value.__dict__, seen) if isinstance(value, _NAMESPACES) else None

    def _freeze_links(self, values: Iterable[Any], seen: dict[int, Any]) -> Any:
        """What a cache holds, which keeps its results in links."""
        results: list[Any] = []
        for each in values:
            if type(each).__name__ == "_lru_list_elem":
                if id(each) not in seen:
                    seen[id(each)] = each
                    results.append(self._freeze_links(gc.get_referents(each), seen))
            elif isinstance(each, dict):
                results.append(self._freeze_links([*each.keys(), *each.values()], seen))
            else:
                results.append(self._freeze(each, seen))
        return results

    def _freeze_class(self, kind: type, seen: dict[int, Any]) -> Any:
        return [(name, self._freeze(value, seen)) for name, value in vars(kind).items() if name not in _NO_STATE]

    def _freeze_tensor(self, tensor: Tensor, seen: dict[int, Any]) -> Any:
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return ("a tensor of one call", id(tensor))
        attributes = self._freeze_attributes_of_tensor(tensor, seen)
        if torch.nn.parameter.is_lazy(tensor) or tensor.layout != torch.strided:
            return (id(tensor), tensor._version, attributes)
        facts = (str(tensor.dtype), tuple(tensor.shape), tensor.requires_grad, attributes)
        if self._fast and tensor.numel() > LARGE:
            return (*facts, tensor.data_ptr(), tensor._version)
        return (*facts, bits(tensor.detach()).cpu().numpy().tobytes())

    def _freeze_attributes_of_tensor(self, tensor: Tensor, seen: dict[int, Any]) -> Any:
        gradient = tensor.grad if tensor.is_leaf else None
        return (self._freeze(vars(tensor), seen) if vars(tensor) else None, self._freeze(gradient, seen))

    def _freeze_function(self, function: types.FunctionType, seen: dict[int, Any]) -> Any:
        """The function, what it keeps, and what the user's code in it refers to."""
        if not _is_users(function.__module__):
            return id(function)
        kept = (
            [_cell(cell) for cell in function.__closure__ or ()],
            function.__defaults__,
            function.__kwdefaults__,
            function.__dict__,
        )
        names, attributes, imported = _references(function.__code__)
        if names & _BY_NAME:
            names = names | {name for name in function.__globals__ if not name.startswith("__")}
        referred = {name: function.__globals__[name] for name in sorted(names) if name in function.__globals__}
        modules = deque([*referred.values(), *(sys.modules.get(name) for name in sorted(imported))])
        while modules:
            module = modules.popleft()
            if not isinstance(module, types.ModuleType) or not _is_users(module.__name__):
                continue
            for name in sorted(attributes & vars(module).keys()):
                path = f"{module.__name__}.{name}"
                if path not in referred and not name.startswith("__"):
                    referred[path] = vars(module)[name]
                    modules.append(referred[path])
        return (
            id(function.__code__),
            [self._freeze(each, seen) for each in kept],
            [(name, self._freeze(each, seen)) for name, each in referred.items()],
        )


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


def bits(tensor: Tensor) -> Tensor:
    """The tensor's numbers as whole numbers, so that what is not a number equals itself."""
    flat = tensor.contiguous().flatten()
    return flat.view(torch.uint8) if flat.numel() else flat.to(torch.uint8)


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


@cache
def _is_users(module_name: str | None) -> bool:
    """Whether a module's code is the user's own: installed packages may keep caches."""
    root = (module_name or "builtins").partition(".")[0]
    file = getattr(sys.modules.get(module_name or ""), "__file__", None) or ""
    installed = "site-packages" in file or "dist-packages" in file
    return not (installed or root == "fl_components" or root in sys.stdlib_module_names)


@cache
def _references(code: types.CodeType) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """The globals that code names, the attributes that it may take from one, and the modules that it imports."""
    names, attributes, imported = set[str](), set[str](), set[str]()
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL", "DELETE_GLOBAL"):
            names.add(step.argval)
        elif step.opname == "IMPORT_NAME":
            imported.add(step.argval)
    for each in code.co_consts:
        if isinstance(each, str):  # such as globals()["total"], or getattr(helper, "total")
            names.add(each)
            attributes.add(each)
        elif isinstance(each, types.CodeType):
            inner = _references(each)
            names, attributes, imported = names | inner[0], attributes | inner[1], imported | inner[2]
    return frozenset(names), frozenset(attributes.union(code.co_names)), frozenset(imported)


def _has_users_class(value: Any) -> bool:
    return _is_users(type(value).__module__)


def _slots(kind: type) -> list[str]:
    slots = vars(kind).get("__slots__", ())
    return [slots] if isinstance(slots, str) else [name for name in slots if name not in ("__dict__", "__weakref__")]


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _position(iterator: Any) -> str:
    try:
        return repr(iterator.__reduce__())
    except TypeError:
        return ""


def _generator_state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state().numpy().tobytes()
    state: Callable[[], Any] = getattr(generator, "get_state", None) or (lambda: generator.bit_generator.state)
    return repr(state())
