"""What is trained: a model rule builds a torch module for rows of one shape and scores of another."""

from __future__ import annotations

from fedrounds.fl_components.models.base import ModelRule, build_seeded
from fedrounds.fl_components.models.cnn import Cnn
from fedrounds.fl_components.models.families import Model
from fedrounds.fl_components.models.fit import Mode, RowFormat, check_fits, check_scores, failing_layer
from fedrounds.fl_components.models.gru import Gru
from fedrounds.fl_components.models.logistic_regression import LogisticRegression
from fedrounds.fl_components.models.mlp import Mlp
from fedrounds.fl_components.models.module import ModuleModel
from fedrounds.fl_components.models.resnet import ResNet
from fedrounds.fl_components.models.rowwise import meeting_place, rowwise
from fedrounds.fl_components.models.spec import ModelSpec
from fedrounds.fl_components.models.state import Watch, same_bits
from fedrounds.fl_components.models.transformer import Transformer

__all__ = [
    "Cnn",
    "Gru",
    "LogisticRegression",
    "Mlp",
    "Mode",
    "Model",
    "ModelRule",
    "ModelSpec",
    "ModuleModel",
    "ResNet",
    "RowFormat",
    "Transformer",
    "Watch",
    "build_seeded",
    "check_fits",
    "check_scores",
    "failing_layer",
    "meeting_place",
    "rowwise",
    "same_bits",
]
