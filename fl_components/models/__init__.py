"""What is trained: a model rule builds a torch module for the data's input shape and number of classes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fl_components.models.base import ModelRule, build_seeded, check_fits
from fl_components.models.logistic_regression import LogisticRegression
from fl_components.models.mlp import Mlp
from fl_components.models.module import ModuleModel

Model = Annotated[LogisticRegression | Mlp | ModuleModel, Field(discriminator="kind")]

__all__ = ["LogisticRegression", "Mlp", "Model", "ModelRule", "ModuleModel", "build_seeded", "check_fits"]
