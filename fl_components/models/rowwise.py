"""Which modules treat each row of a batch by itself, as their types alone say."""

from __future__ import annotations

from typing import Any, Final, TypeVar

from torch import nn

_ACTIVATIONS: Final[tuple[type[nn.Module], ...]] = (
    *(nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid),
    *(nn.Mish, nn.PReLU, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink, nn.Softsign),
    *(nn.Tanh, nn.Tanhshrink, nn.Threshold),
)
_LAYERS: Final[tuple[type[nn.Module], ...]] = (
    *(nn.Sequential, nn.Identity, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm, nn.GroupNorm, nn.Dropout),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    nn.GRU,
)
_ROWWISE: Final[set[type[nn.Module]]] = {*_ACTIVATIONS, *_LAYERS}

_NO_CODE: Final = {
    "__init__",
    *vars(type("Empty", (), {})),
    "__annotations__",
    "__firstlineno__",
    "__static_attributes__",
}

Kind = TypeVar("Kind", bound=type[nn.Module])


def rowwise(kind: Kind) -> Kind:
    """Declare that a module's own code treats each row of a batch by itself, whatever the rows hold, and keeps nothing.

    A privacy claim rests on it: only for modules of this project, which are reviewed.
    """
    _ROWWISE.add(kind)
    return kind


def meeting_place(module: nn.Module) -> str | None:
    """The first layer whose code might let rows of a batch meet, look at their values or keep something, in words.

    None where all layers are of types that are known to treat each row by itself.

    Such a module computes the same for a row whatever the other rows hold. That follows from the code, not from trials.

    >>> meeting_place(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))) is None
    True
    >>> class Net(nn.Sequential):
    ...     def __init__(self, width):
    ...         super().__init__(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))
    >>> meeting_place(Net(4)) is None
    True
    >>> meeting_place(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)))
    '1 (BatchNorm1d)'
    """
    for name, layer in module.named_modules():
        if not _is_rowwise(layer):
            return f"{name or 'the model'} ({type(layer).__name__})"
    return None


def _is_rowwise(layer: Any) -> bool:
    hooks: list[Any] = [
        *(layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks),
    ]
    if any(hooks) or any(callable(getattr(type(layer), name, None)) for name in vars(layer)):
        return False  # an attribute of its own takes a method's place
    if any(type(each) is not nn.Parameter for each in layer._parameters.values() if each is not None):
        return False
    code = _code_of(type(layer))
    if code is nn.Embedding:
        return layer.max_norm is None
    if code is nn.Flatten:
        return bool(layer.start_dim >= 1)
    if code is nn.Unflatten:
        return isinstance(layer.dim, int) and layer.dim >= 1
    if code in (nn.Softmax, nn.LogSoftmax):
        return bool(layer.dim == -1)
    if code is nn.GRU:
        return bool(layer.batch_first)
    return code in _ROWWISE


def _code_of(kind: type[nn.Module]) -> type[nn.Module]:
    """The class whose code a module of this class runs.

    A base class where the class defines no more than how it is built.
    """
    while set(vars(kind)) <= _NO_CODE and len(kind.__bases__) == 1:
        (kind,) = kind.__bases__
    return kind
