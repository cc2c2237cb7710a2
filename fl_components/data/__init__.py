"""Where clients' examples come from. Each rule is a file; another package adds one by an entry point."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedrounds.fl_components.data.base import DataRule, TargetReader
from fedrounds.fl_components.data.client_ids import NumberedIds
from fedrounds.fl_components.data.digits import Digits
from fedrounds.fl_components.data.emnist import Emnist
from fedrounds.fl_components.data.federated import ClientExamples, FederatedData, RowRanges
from fedrounds.fl_components.data.femnist import Femnist
from fedrounds.fl_components.data.function import FunctionData
from fedrounds.fl_components.data.heart_disease import HeartDisease
from fedrounds.fl_components.data.leaf import Leaf
from fedrounds.fl_components.data.mnist import Mnist
from fedrounds.fl_components.data.shakespeare import Shakespeare
from fedrounds.fl_components.data.tables import Tables
from fedrounds.fl_components.rules import union

if TYPE_CHECKING:
    Data = DataRule
else:
    Data = union("data", HeartDisease, Digits, Mnist, Emnist, Femnist, Shakespeare, Leaf, Tables, FunctionData)

__all__ = [
    "ClientExamples",
    "Data",
    "DataRule",
    "Digits",
    "Emnist",
    "FederatedData",
    "Femnist",
    "FunctionData",
    "HeartDisease",
    "Leaf",
    "Mnist",
    "NumberedIds",
    "RowRanges",
    "Shakespeare",
    "Tables",
    "TargetReader",
]
