"""Runs a module for many clients or examples under torch.func.vmap, where none can see another's values.

vmap runs the module's code once for all. It refuses code that branches on values, so no member can decide what is
computed for another. What it does not do is keep a lookup within a member's own table (torch's embedding reads on in
the next member's), or keep a module from writing to its parameters; both are checked here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fedrounds.fl_components.models import Watch, meeting_place, same_bits
from fedrounds.fl_components.models.state import refuse_changes


class VmappedModule:
    """A copy of a module that is run under vmap.

    Attributes:
      module: the copy, in training mode.
      is_rowwise: whether its layers' types say that it treats each row by itself (`meeting_place`).
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = copy.deepcopy(module).train()
        self.is_rowwise = meeting_place(module) is None
        self._watch = None if self.is_rowwise else Watch(self.module, [])

    def run(
        self, function: Callable[..., Any], params: dict[str, Tensor], x: Tensor, y: Tensor, *, census: bool = False
    ) -> Any:
        """`vmap(function)` of parameters, rows and targets, [C, ...] each.

        With `census` the operations are looked at as well, which is slow: raises `NotIsolated` for a lookup whose
        indices cannot be checked. Raises `IndexError` for an index outside its table, `ModelError` where the module
        changes its parameters or anything that it keeps, and what vmap or the module raise.
        """
        checked = CheckedIndices()
        own = params if self._watch is None else {name: each.clone() for name, each in params.items()}
        versions = {name: each._version for name, each in own.items()}
        if census:
            with _Census(checked), checked:
                out = vmap(function)(own, x, y)
        else:
            with checked:
                out = vmap(function)(own, x, y)
        if self._watch is not None:
            changed = [
                name
                for name, each in own.items()
                if each._version != versions[name] or not same_bits(each, params[name])
            ]
            refuse_changes([f"parameter {name!r}" for name in changed])
            self._watch.check()
        return out


class NotIsolated(Exception):
    """A module that could read another member's values under vmap."""


class CheckedIndices(TorchFunctionMode):
    """Raises `IndexError` for an index outside its table, as torch does outside of vmap.

    Under vmap, torch turns the tables of all members into one and adds an offset to the indices. Other lookups (gather,
    index_select, advanced indexing, scatter) keep an axis for the members, and torch checks their indices itself.

    >>> tables, tokens = torch.zeros(2, 3, 1), torch.tensor([[0], [3]])
    >>> with CheckedIndices():
    ...     vmap(lambda table, token: nn.functional.embedding(token, table))(tables, tokens)
    Traceback (most recent call last):
    IndexError: index out of range in a table of 3
    """

    def __init__(self) -> None:
        super().__init__()
        self.checking = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").partition(".")[0]
        if name == "embedding":
            _check_lookup([each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)])
            self.checking = True
            try:
                return func(*args, **kwargs)
            finally:
                self.checking = False
        if name == "one_hot":
            tokens, *sizes = (*args, *kwargs.values())
            if sizes and isinstance(sizes[0], int) and sizes[0] > 0:
                _check_range(tokens, sizes[0])
        return func(*args, **kwargs)


def _check_lookup(tensors: list[Tensor]) -> None:
    tokens = next((each for each in tensors if not each.is_floating_point()), None)
    table = next((each for each in tensors if each.is_floating_point()), None)
    if tokens is not None and table is not None:
        _check_range(tokens, table.shape[0])


def _check_range(tokens: Tensor, size: int) -> None:
    """Raise `IndexError` unless all of the members' tokens are in [0, size)."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tokens):
        tokens = torch._C._functorch.get_unwrapped(tokens)
    with torch._C._DisableFuncTorch():
        if tokens.numel():
            low, high = (int(each) for each in torch.aminmax(tokens))
            if low < 0 or high >= size:
                raise IndexError(f"index out of range in a table of {size}")


class _Census(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses a lookup in an embedding that `CheckedIndices` did not see, such as one in compiled code."""

    def __init__(self, checked: CheckedIndices) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._checked = checked

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket is torch.ops.aten.embedding and not self._checked.checking:
            raise NotIsolated("it looks up an embedding in a way whose indices cannot be checked")
        return func(*args, **(kwargs or {}))
