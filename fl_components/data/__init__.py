"""Where clients' examples come from.

A data rule has `load(seed) -> FederatedData`, the same bits for the same seed, and `known_num_clients() -> int | None`,
which answers without loading where it can. All raise `DataError` for data that cannot be used.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fl_components.data.digits import Digits
from fl_components.data.federated import FederatedData
from fl_components.data.function import FunctionData
from fl_components.data.heart_disease import HeartDisease

Data = Annotated[HeartDisease | Digits | FunctionData, Field(discriminator="kind")]

__all__ = ["Data", "Digits", "FederatedData", "FunctionData", "HeartDisease"]
