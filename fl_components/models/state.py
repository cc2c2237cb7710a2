"""What a module keeps from one call to the next: parameters, buffers and plain attributes, and whether a call changes
them."""

from __future__ import annotations

import sys
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Set
from functools import cache, partial
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from fl_components.errors import ModelError

LARGE: Final = 1 << 16
"""Tensors of more numbers than this are compared by storage and version where a comparison has to be fast."""

_SCALARS: Final = (bool, int, float, complex, str, bytes, type(None))
_CODE: Final = (types.ModuleType, types.BuiltinFunctionType, torch.dtype, torch.device, torch.layout)


class ModuleState:
    """A snapshot of all that a module keeps: the tensors and attributes of its layers, of what these refer to, and the
    globals, closures and class attributes of the user's code that they run.

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
        for layer_name, layer in module.named_modules():
            for kind, entries in (("parameter", layer._parameters), ("buffer", layer._buffers)):
                for name, tensor in entries.items():
                    if id(tensor) not in self._without:
                        yield (layer_name, f"{kind} {name!r}"), self._freeze(tensor, seen)
            for name, value in vars(layer).items():
                if name not in ("_parameters", "_buffers", "_modules"):
                    yield (layer_name, f"attribute {name!r}"), self._freeze(value, seen)
            yield (layer_name, "layers"), [(name, id(each)) for name, each in layer._modules.items()]
            for kind_of in type(layer).__mro__:
                if _is_users(kind_of.__module__):
                    yield (layer_name, f"class {kind_of.__name__}"), self._freeze_class(kind_of, seen)

    def _freeze_class(self, kind: type, seen: dict[int, Any]) -> Any:
        if id(kind) in seen:
            return None
        seen[id(kind)] = None
        return [(name, self._freeze(value, seen)) for name, value in vars(kind).items() if not name.startswith("__")]

    def _freeze(self, value: Any, seen: dict[int, Any]) -> Any:
        """A copy of `value` that compares equal where it has not changed."""
        if isinstance(value, _SCALARS):
            return (type(value).__name__, repr(value))
        if isinstance(value, (nn.Module, type, *_CODE)) or id(value) in self._without:
            return id(value)
        if id(value) in seen:
            return ("again", id(value) if isinstance(value, Tensor) else None)
        seen[id(value)] = value
        if isinstance(value, Tensor):
            return self._freeze_tensor(value)
        if isinstance(value, np.ndarray):
            return (str(value.dtype), value.shape, value.tobytes() if value.dtype != object else repr(value))
        if isinstance(value, Mapping):
            items = [(self._freeze(key, seen), self._freeze(each, seen)) for key, each in value.items()]
            return (type(value).__name__, items)
        if isinstance(value, (list, tuple, deque)):
            return (type(value).__name__, [self._freeze(each, seen) for each in value])
        if isinstance(value, Set):
            return (type(value).__name__, sorted(map(repr, value)))
        if isinstance(value, (torch.Generator, np.random.Generator, np.random.RandomState)):
            return _generator_state(value)
        if isinstance(value, (staticmethod, classmethod, types.MethodType)):
            return self._freeze(value.__func__, seen)
        if isinstance(value, types.FunctionType):
            return self._freeze_function(value, seen)
        if isinstance(value, property):
            return [self._freeze(each, seen) for each in (value.fget, value.fset)]
        if isinstance(value, partial):
            return [self._freeze(each, seen) for each in (value.func, value.args, value.keywords)]
        if hasattr(value, "getstate"):  # random.Random
            return repr(value.getstate())
        if hasattr(value, "__next__"):
            return (id(value), _position(value))
        attributes = getattr(value, "__dict__", None)
        if attributes is not None and _is_users(type(value).__module__):
            return (type(value).__name__, self._freeze(dict(attributes), seen))
        return (id(value), repr(value))

    def _freeze_tensor(self, tensor: Tensor) -> Any:
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return ("a tensor of one call", id(tensor))
        if torch.nn.parameter.is_lazy(tensor) or tensor.layout != torch.strided:
            return (id(tensor), tensor._version)
        facts = (str(tensor.dtype), tuple(tensor.shape), tensor.requires_grad)
        if self._fast and tensor.numel() > LARGE:
            return (*facts, tensor.data_ptr(), tensor._version)
        return (*facts, bits(tensor.detach()).cpu().numpy().tobytes())

    def _freeze_function(self, function: types.FunctionType, seen: dict[int, Any]) -> Any:
        """The function, and what the user's code in it refers to."""
        if not _is_users(function.__module__):
            return id(function)
        cells = [_cell(cell) for cell in function.__closure__ or ()]
        names = sorted(_names(function.__code__))
        referred = [(name, function.__globals__[name]) for name in names if name in function.__globals__]
        return (id(function.__code__), self._freeze(cells, seen), [(n, self._freeze(v, seen)) for n, v in referred])


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


def _names(code: types.CodeType) -> set[str]:
    inner = [each for each in code.co_consts if isinstance(each, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _position(iterator: Any) -> str:
    frame = getattr(iterator, "gi_frame", None)
    if frame is not None:
        return f"{frame.f_lasti} {frame.f_locals!r}"
    try:
        return repr(iterator.__reduce__())
    except TypeError:
        return ""


def _generator_state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state().numpy().tobytes()
    state: Callable[[], Any] = getattr(generator, "get_state", None) or (lambda: generator.bit_generator.state)
    return repr(state())
