"""What all model rules share: what training starts from, and building from a seed."""

from __future__ import annotations

import difflib
import fnmatch
import re
from abc import abstractmethod
from typing import Final

import torch
from pydantic import field_validator

from fedrounds.fl_components.errors import ModelError
from fedrounds.fl_components.parameters import check_trainable
from fedrounds.fl_components.randomness import derive_key
from fedrounds.fl_components.rules import Rule

REGISTERED_MODEL: Final = re.compile(r"models:/(?P<name>[^/@:]+)(?:/(?P<version>[0-9]+)|@(?P<alias>[\w-]+))")
"""The address of a registered model in MLflow."""


class ModelRule(Rule):
    """Base of the model rules.

    Args:
      start_from: the parameters that training starts from: "fresh" (drawn from the configuration's seed), "latest" (the
        newest model of this name in the store) or an MLflow address: "models:/NAME/VERSION" (a number) or
        "models:/NAME@ALIAS".
      freeze: patterns of parameter names ("0.*") whose parameters stay as they were at the start and do not travel.
    """

    kind: str
    start_from: str = "fresh"
    freeze: tuple[str, ...] = ()

    @field_validator("start_from")
    @classmethod
    def _check_start_from(cls, value: str) -> str:
        if value not in ("fresh", "latest") and not REGISTERED_MODEL.fullmatch(value):
            raise ValueError("give fresh, latest, or an MLflow address: models:/NAME/VERSION or models:/NAME@ALIAS")
        return value

    @abstractmethod
    def build(self, input_shape: tuple[int, ...], output_shape: tuple[int, ...]) -> torch.nn.Module:
        """A new module that takes [B, *input_shape] and gives scores [B, *output_shape].

        `output_shape` is [C], one score a class, or [T, C] where each position has a label.

        Initial parameters are drawn from torch's global generator: use `build_seeded` to get the same ones again.
        """


def build_seeded(
    rule: ModelRule, input_shape: tuple[int, ...], output_shape: tuple[int, ...], seed: int
) -> torch.nn.Module:
    """Build the rule's module with initial parameters that depend on `seed` only; torch's generator is left as it was.

    Raises `ModelError` when the module cannot be built or trained (see `parameters.check_trainable`).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_key(seed, 0, "initial parameters") % 2**63)
        module = rule.build(input_shape, output_shape)
    for pattern in rule.freeze:
        _freeze(module, pattern)
    check_trainable(module)
    return module


def _freeze(module: torch.nn.Module, pattern: str) -> None:
    names = dict(module.named_parameters())
    matching = fnmatch.filter(names, pattern)
    if not matching:
        near = difflib.get_close_matches(pattern, names)
        some = f"its parameters are {', '.join(list(names)[:8])}{', ...' if len(names) > 8 else ''}"
        raise ModelError(
            f"model.freeze: {pattern!r} matches no parameter of the model",
            hint=f"did you mean {' or '.join(near)}?" if near else some,
        )
    for name in matching:
        names[name].requires_grad_(False)


def image_shape(input_shape: tuple[int, ...], kind: str, at_least: int) -> tuple[int, int, int]:
    """(channels, height, width) of the data's rows. Raises `ModelError` unless they are images of `at_least` pixels."""
    depth, height, width = (1, *input_shape) if len(input_shape) == 2 else (*input_shape, 0, 0)[:3]
    if len(input_shape) not in (2, 3) or min(height, width) < at_least:
        raise ModelError(
            f"model {kind} takes images [channels, height, width] of at least {at_least} x {at_least} pixels, and the "
            f"data has rows of {list(input_shape)}",
            hint="give each row as [channels, height, width] or [height, width], or choose model mlp",
        )
    return depth, height, width


def tokens_shape(input_shape: tuple[int, ...], output_shape: tuple[int, ...], kind: str) -> int:
    """T, the length of the data's rows of tokens. Raises `ModelError` when they are none."""
    if len(input_shape) != 1 or (len(output_shape) == 2 and output_shape[0] != input_shape[0]):
        raise ModelError(
            f"model {kind} takes rows of T tokens and gives scores for the last or for each of them, and the data has "
            f"rows of {list(input_shape)} with labels of {list(output_shape[:-1])}",
            hint="give each row as one sequence of int64 tokens, with one label, or one label a token",
        )
    return input_shape[0]


def shaped(output_shape: tuple[int, ...]) -> list[torch.nn.Module]:
    """The layer that cuts flat scores into `output_shape`; none where they are one row of classes already."""
    return [torch.nn.Unflatten(1, output_shape)] if len(output_shape) > 1 else []
