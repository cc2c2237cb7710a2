"""Module: any torch module of your own."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, JsonValue

from fedrounds.fl_components.errors import ModelError, one_line
from fedrounds.fl_components.models.base import ModelRule
from fedrounds.fl_components.rules import import_attribute

_FORM = "name a torch.nn.Module class, or a function that returns a new module"


class ModuleModel(ModelRule):
    """Your module: `path` names its class or a function that returns one ("package.module:Net").

    It is called with `arguments` by name and nothing else: sizes of input and output are among them, or fixed.

    >>> ModuleModel(path="torch.nn:Linear", arguments={"in_features": 13, "out_features": 2}).build((13,), (2,))
    Linear(in_features=13, out_features=2, bias=True)
    """

    kind: Literal["module"] = "module"
    path: str
    arguments: dict[str, JsonValue] = Field(default_factory=dict)

    def build(self, input_shape: tuple[int, ...], output_shape: tuple[int, ...]) -> torch.nn.Module:
        """Call what `path` names.

        Raises `ConfigError` when `path` names nothing, `ModelError` when the call fails or returns no module.
        """
        with torch.random.fork_rng(devices=[]):  # what the first import draws must not change the initial parameters
            factory = import_attribute(self.path, "model.path")
        if isinstance(factory, torch.nn.Module) or not callable(factory):
            raise ModelError(f"model.path: {self.path} is a {type(factory).__name__} object", hint=_FORM)
        try:
            module = factory(**self.arguments)
        except (Exception, SystemExit) as error:
            raise ModelError(
                f"{self.path} failed with model.arguments {sorted(self.arguments)}: {one_line(error)}",
                hint="call it by hand with these arguments",
            ) from error
        if not isinstance(module, torch.nn.Module):
            raise ModelError(f"{self.path} returned a {type(module).__name__}, not a torch module", hint=_FORM)
        return module
