"""ModelSpec: how another process builds the same model."""

from __future__ import annotations

import torch

from fedrounds.fl_components.errors import ModelError
from fedrounds.fl_components.models.base import build_seeded
from fedrounds.fl_components.models.families import Model
from fedrounds.fl_components.parameters import constants_digest
from fedrounds.fl_components.rules import Rule


class ModelSpec(Rule):
    """A model rule with what it needs to build a module whose constants are the same everywhere.

    Args:
      rule: the section `model` of the configuration.
      input_shape, output_shape: of one row and of its scores.
      seed: of the initial parameters and constants.
      constants_digest: of the frozen parameters and buffers.
    """

    rule: Model
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    seed: int
    constants_digest: str

    @classmethod
    def of(
        cls,
        rule: Model,
        input_shape: tuple[int, ...],
        output_shape: tuple[int, ...],
        seed: int,
        module: torch.nn.Module,
    ) -> ModelSpec:
        """Return the specification of a module that this rule built."""
        return cls(
            rule=rule,
            input_shape=input_shape,
            output_shape=output_shape,
            seed=seed,
            constants_digest=constants_digest(module),
        )

    def build(self) -> torch.nn.Module:
        """Return a new module with its initial parameters.

        Raises:
          ModelError: its frozen parameters or buffers are others than those of the specification.
        """
        module = build_seeded(self.rule, self.input_shape, self.output_shape, self.seed)
        if constants_digest(module) != self.constants_digest:
            raise ModelError(
                "the model's frozen parameters or buffers differ between the processes that build it",
                hint="draw them from torch's generator, which is seeded, or set execution.processes to 1",
            )
        return module
