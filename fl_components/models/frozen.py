"""Copies of Python objects that compare equal for as long as nothing in the objects changes."""

from __future__ import annotations

import array
import contextvars
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
from functools import cache
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

LARGE: Final = 1 << 16
"""Tensors of more numbers than this are compared by storage and version where a comparison has to be fast."""

_SCALARS: Final = (bool, int, float, complex, str, bytes, type(None))
_CONSTANTS: Final = (types.CodeType, torch.dtype, torch.device, torch.layout)
_BUFFERS: Final = (bytearray, memoryview, array.array, mmap.mmap)
_NAMESPACES: Final = (types.SimpleNamespace, threading.local)

_LIBRARY_GENERATORS: Final = (random.random.__self__, np.random.random.__self__)  # type: ignore[attr-defined]
"""The generators that all code of a process shares: `check_fits` has an error of its own for models that draw from
them."""

_OPENED: Final = sys.stdlib_module_names | {"builtins", "numpy", "pandas", "torch"}
"""Packages whose objects are compared by what they would be pickled as, not by `repr`."""

_NO_STATE: Final = frozenset(
    {"__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__abstractmethods__", "_abc_impl"}
)
"""Entries of a class that hold nothing of the user's."""

_REACH_GLOBALS: Final = frozenset({"globals", "vars", "eval", "exec"})
_REACH_ATTRIBUTES: Final = frozenset({"getattr", "setattr", "vars", "eval", "exec"})
"""Functions by which code reaches what it does not name."""


class Freezer:
    """Makes copies of objects in one walk: an object that is met again is copied once.

    A copy holds the content of tensors, arrays, containers and iterators, the attributes of the user's objects and
    classes, and for the user's functions also what they refer to: globals, closures, default arguments, attributes of
    the user's modules. Objects of other packages are copied as they would be pickled, or else by identity and `repr`.

    Args:
      by_identity: ids of objects that are compared by identity alone, since somebody else watches their content.
      fast: compares tensors of more than `LARGE` numbers by storage and version, not by their bits.

    >>> totals = [1.0, {"mean": 2.0}]
    >>> before = Freezer().freeze(totals)
    >>> totals[1]["mean"] = 3.0
    >>> Freezer().freeze(totals) == before
    False
    """

    def __init__(self, by_identity: Set[int] = frozenset(), *, fast: bool = False) -> None:
        self._by_identity, self._fast = by_identity, fast
        self._met: dict[int, Any] = {}  # keeps what it has met: an id must not be used again during the walk

    def freeze(self, value: Any) -> Any:
        """Return the copy of one object."""
        if type(value) in _SCALARS:
            return (type(value).__name__, repr(value))
        if isinstance(value, _CONSTANTS) or id(value) in self._by_identity:
            return id(value)
        if any(value is each for each in _LIBRARY_GENERATORS):
            return id(value)
        if id(value) in self._met:
            return ("again", id(value) if isinstance(value, Tensor) else None)
        self._met[id(value)] = value
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, types.ModuleType):
            return id(value)  # code that refers to it names what it takes from it
        if isinstance(value, type):
            return self._class(value) if is_users(value.__module__) else id(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, (staticmethod, classmethod, types.MethodType)):
            return self._each((value.__func__, getattr(value, "__self__", None)))
        return (self._content(value), self._attributes(value))

    def attributes_of_tensor(self, tensor: Tensor) -> Any:
        """Return the copy of what a tensor holds besides its numbers: attributes, and the gradient."""
        gradient = tensor.grad if tensor.is_leaf else None
        return (self.freeze(vars(tensor)) if vars(tensor) else None, self.freeze(gradient))

    def _each(self, values: Iterable[Any]) -> list[Any]:
        return [self.freeze(value) for value in values]

    def _tensor(self, tensor: Tensor) -> Any:
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return ("a tensor of one call", id(tensor))
        attributes = self.attributes_of_tensor(tensor)
        if torch.nn.parameter.is_lazy(tensor) or tensor.layout != torch.strided:
            return (id(tensor), tensor._version, attributes)
        facts = (str(tensor.dtype), tuple(tensor.shape), tensor.requires_grad, attributes)
        if self._fast and tensor.numel() > LARGE:
            return (*facts, tensor.data_ptr(), tensor._version)
        return (*facts, bits(tensor.detach()).cpu().numpy().tobytes())

    def _content(self, value: Any) -> Any:
        """What an object holds besides its attributes."""
        match value:
            case np.ndarray():
                numbers = self.freeze(value.tolist()) if value.dtype.hasobject else value.tobytes()
                return (str(value.dtype), value.shape, numbers, self.freeze(getattr(value, "__dict__", None)))
            case Mapping():
                return [(self.freeze(key), self.freeze(each)) for key, each in value.items()]
            case list() | tuple() | deque():
                return (type(value).__name__, self._each(value))
            case Set():
                return (type(value).__name__, self._each(sorted(value, key=repr)))
            case io.BytesIO() | io.StringIO():
                return (value.getvalue(), value.tell())
            case torch.Generator() | np.random.Generator() | np.random.RandomState():
                return _generator_state(value)
            case property():
                return self._each((value.fget, value.fset, value.fdel))
            case functools.cached_property():
                return self.freeze(value.func)
            case functools._lru_cache_wrapper():
                return (self.freeze(value.__wrapped__), self._held_by_cache(value))
            case weakref.ref():
                return self.freeze(value())
            case contextvars.ContextVar():
                return self.freeze(value.get(None))
            case types.BuiltinFunctionType():
                owner = value.__self__
                return id(value) if isinstance(owner, types.ModuleType) else self.freeze(owner)
            case types.GeneratorType():
                frame = value.gi_frame
                return None if frame is None else (frame.f_lasti, self.freeze(frame.f_locals))
        if isinstance(value, _SCALARS):  # of a subclass
            return repr(value)
        if isinstance(value, _BUFFERS):
            return bytes(value)
        if hasattr(value, "getstate"):  # random.Random
            return repr(value.getstate())
        return None if is_users(type(value).__module__) else self._pickled(value)

    def _attributes(self, value: Any) -> Any:
        """The class and the attributes of an object of the user's, or of a namespace."""
        if is_users(type(value).__module__):
            kind = type(value)
            slots = [each for base in kind.__mro__ for each in vars(base).values() if isinstance(each, _Slot)]
            return (self.freeze(kind), self.freeze(getattr(value, "__dict__", None)), self._each(_filled(slots, value)))
        return self.freeze(vars(value)) if isinstance(value, _NAMESPACES) else None

    def _class(self, kind: type) -> Any:
        entries = [(name, self.freeze(each)) for name, each in vars(kind).items() if name not in _NO_STATE]
        return (entries, self._each((type(kind), *kind.__mro__)))

    def _function(self, function: types.FunctionType) -> Any:
        """The function, what it keeps, and what the user's code in it refers to."""
        if not is_users(function.__module__):
            return id(function)
        kept = (_cells(function), function.__defaults__, function.__kwdefaults__, function.__dict__)
        names, attributes, modules = _references(function.__code__)
        if names & _REACH_GLOBALS:
            names = names | {name for name in function.__globals__ if not name.startswith("__")}
        referred = {name: function.__globals__[name] for name in sorted(names) if name in function.__globals__}
        reaches_all = bool(names & _REACH_ATTRIBUTES) or "__dict__" in attributes
        waiting = deque([*referred.values(), *(sys.modules.get(name) for name in sorted(modules))])
        while waiting:
            module = waiting.popleft()
            if not isinstance(module, types.ModuleType) or not is_users(module.__name__):
                continue
            for name in sorted(vars(module).keys() if reaches_all else attributes & vars(module).keys()):
                path = f"{module.__name__}.{name}"
                if path not in referred and not name.startswith("__"):
                    referred[path] = vars(module)[name]
                    waiting.append(referred[path])
        copies = [(name, self.freeze(each)) for name, each in referred.items()]
        return (id(function.__code__), self._each(kept), copies)

    def _held_by_cache(self, cached: Any) -> Any:
        """What a function of `functools.lru_cache` holds.

        Its attributes, and its results in a dictionary or in links that a dictionary refers to.
        """
        held: list[Any] = []
        waiting = deque(each for each in gc.get_referents(cached) if each is not cached.__wrapped__)
        while waiting:
            each = waiting.popleft()
            if type(each) is dict:
                waiting += [*each.keys(), *each.values()]
            elif type(each).__name__ != "_lru_list_elem":
                held.append(self.freeze(each))
            elif id(each) not in self._met:
                self._met[id(each)] = each
                waiting += gc.get_referents(each)
        return held

    def _pickled(self, value: Any) -> Any:
        """An object of another package, by what it would be pickled as where that package's objects are known to tell
        their state in this way, and by `repr`."""
        if _package(type(value).__module__) in _OPENED:
            try:
                pickled = value.__reduce_ex__(4)
            except Exception:  # queues, files and others cannot be pickled
                return (id(value), repr(value), self.freeze(getattr(value, "__dict__", None)))
            if not isinstance(pickled, str):
                return (id(value), self._each(list(each) if isinstance(each, Iterator) else each for each in pickled))
        return (id(value), repr(value))


def bits(tensor: Tensor) -> Tensor:
    """The tensor's numbers as whole numbers, so that what is not a number equals itself."""
    flat = tensor.contiguous().flatten()
    return flat.view(torch.uint8) if flat.numel() else flat.to(torch.uint8)


@cache
def is_users(module_name: Any) -> bool:
    """Return whether a module's code is the user's own: installed packages may keep caches."""
    package, file = _package(module_name), getattr(sys.modules.get(module_name), "__file__", None) or ""
    installed = "site-packages" in file or "dist-packages" in file
    return not (installed or package == "fedrounds" or package in sys.stdlib_module_names)


def _package(module_name: Any) -> str:
    return module_name.partition(".")[0] if isinstance(module_name, str) else "builtins"  # in some compiled classes


@cache
def _references(code: types.CodeType) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """The globals that code names, the attributes that it may take from a module, and the modules that it imports.

    Strings may be any of them, as in ``globals()["total"]`` and ``sys.modules["helper"]``.
    """
    steps = [*dis.get_instructions(code)]
    strings = frozenset(each for each in code.co_consts if isinstance(each, str))
    names = strings.union(step.argval for step in steps if step.opname.endswith(("_GLOBAL", "LOAD_NAME")))
    modules = strings.union(step.argval for step in steps if step.opname == "IMPORT_NAME")
    attributes = strings.union(code.co_names)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            more_names, more_attributes, more_modules = _references(inner)
            names, attributes, modules = names | more_names, attributes | more_attributes, modules | more_modules
    return names, attributes, modules


_Slot: Final = types.MemberDescriptorType


def _filled(slots: Iterable[Any], value: Any) -> Iterator[Any]:
    for slot in slots:
        try:
            yield slot.__get__(value)
        except AttributeError:  # not filled yet
            yield None


def _cells(function: types.FunctionType) -> list[Any]:
    """What the variables of enclosing functions hold."""
    contents = []
    for cell in function.__closure__ or ():
        try:
            contents.append(cell.cell_contents)
        except ValueError:  # not filled yet
            contents.append(None)
    return contents


def _generator_state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state().numpy().tobytes()
    state: Callable[[], Any] = getattr(generator, "get_state", None) or (lambda: generator.bit_generator.state)
    return repr(state())
