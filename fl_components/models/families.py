"""The family of model rules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedrounds.fl_components.models.base import ModelRule
from fedrounds.fl_components.models.cnn import Cnn
from fedrounds.fl_components.models.gru import Gru
from fedrounds.fl_components.models.logistic_regression import LogisticRegression
from fedrounds.fl_components.models.mlp import Mlp
from fedrounds.fl_components.models.module import ModuleModel
from fedrounds.fl_components.models.resnet import ResNet
from fedrounds.fl_components.models.transformer import Transformer
from fedrounds.fl_components.rules import union

if TYPE_CHECKING:
    Model = ModelRule
else:
    Model = union("models", LogisticRegression, Mlp, Cnn, ResNet, Gru, Transformer, ModuleModel)
