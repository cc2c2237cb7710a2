"""A model's parameters as one float32 vector and back, and that vector's digest.

`params_D` holds the trainable parameters only, in `named_parameters` order, a tied tensor once. Frozen parameters and
buffers are constant: they are part of the model, not of what is trained.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import UninitializedParameter

from fedrounds.fl_components.arrays import check_vector
from fedrounds.fl_components.errors import ModelError


def _trainable(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]  # a tied one comes once


def num_parameters(module: torch.nn.Module) -> int:
    """D, the number of trainable parameters.

    >>> num_parameters(torch.nn.Linear(3, 2))
    8
    """
    return sum(parameter.numel() for parameter in _trainable(module))


def flatten(module: torch.nn.Module) -> NDArray[np.float32]:
    """The trainable parameters as a new float32 vector [D].

    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> load_into(layer, np.array([3.0, 4.0], dtype=np.float32))
    >>> flatten(layer)
    array([3., 4.], dtype=float32)
    """
    parts = [parameter.detach().cpu().numpy().ravel() for parameter in _trainable(module)]
    return np.concatenate(parts, dtype=np.float32) if parts else np.empty(0, dtype=np.float32)


def load_into(module: torch.nn.Module, params_D: NDArray[np.float32]) -> None:
    """Write `params_D` [D] into the module's trainable parameters; the inverse of `flatten`.

    Raises `ModelError` when the vector is not float32 or has another length than the module.
    """
    check_vector(params_D)
    if len(params_D) != num_parameters(module):
        raise ModelError(
            f"{len(params_D)} parameters do not fit a model that has {num_parameters(module)}",
            hint="use the model section of the configuration that the parameters were trained with",
        )
    start = 0
    with torch.no_grad():
        for parameter in _trainable(module):
            part = params_D[start : start + parameter.numel()].copy()  # torch must not share a caller's memory
            parameter.copy_(torch.from_numpy(part).view(parameter.shape))
            start += parameter.numel()


def constants_digest(module: torch.nn.Module) -> str:
    """The sha256, in hex, of all that is not trained: frozen parameters and buffers, with their names.

    >>> constants_digest(torch.nn.Linear(2, 1)) == constants_digest(torch.nn.Linear(3, 4))  # neither has any
    True
    """
    digest = hashlib.sha256()
    constants = [(name, tensor) for name, tensor in module.named_parameters() if not tensor.requires_grad]
    for name, tensor in [*constants, *module.named_buffers()]:
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {list(values.shape)}".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_trainable(module: torch.nn.Module) -> None:
    """Raise `ModelError` for a module whose training `params_D` cannot carry.

    Refused are layers with running statistics (they change in training, but are no parameters), lazy layers, trainable
    parameters of another type than float32, and a module with nothing to train.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, _NormBase) and layer.track_running_stats:
            raise ModelError(
                f"layer {name or 'model'!r} is a {type(layer).__name__} with running statistics, which every client "
                "would change in its own way",
                hint="use torch.nn.GroupNorm instead",
            )
    for name, parameter in module.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ModelError(
                f"parameter {name!r} belongs to a lazy layer, whose size is not known yet",
                hint="give the layer its sizes, for instance torch.nn.Linear(13, 2)",
            )
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise ModelError(
                f"parameter {name!r} is {_words(parameter.dtype)}; trainable parameters are float32",
                hint="build the model with torch.float32, or freeze the parameter (requires_grad=False)",
            )
    if not _trainable(module):
        raise ModelError(
            f"{type(module).__name__} has no trainable parameters",
            hint="give the model a layer with parameters, and requires_grad=True on what is to be trained",
        )


def _words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
