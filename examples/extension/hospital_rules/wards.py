"""A data set: points in the plane, inside or outside a ring, which every ward sees from another side."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from fedrounds.fl_components.data import ClientExamples, DataRule, FederatedData
from fedrounds.fl_components.randomness import generator


class Wards(DataRule):
    """`num_wards` clients with `rows` points each; the label says whether a point lies outside the ring."""

    kind: Literal["wards"] = "wards"
    num_wards: int = Field(default=8, ge=1)
    rows: int = Field(default=100, ge=10)

    def known_num_clients(self) -> int:
        return self.num_wards

    def load(self, seed: int) -> FederatedData:
        clients = {}
        for number in range(self.num_wards):
            draw = generator(seed, 0, "wards", str(number))
            angle = 2 * np.pi * number / self.num_wards
            x = draw.normal([np.cos(angle), np.sin(angle)], 0.8, (self.rows, 2)).astype(np.float32)
            y = (np.square(x).sum(axis=1) > 1).astype(np.int64)
            train, test = slice(None, self.rows * 4 // 5), slice(self.rows * 4 // 5, None)
            clients[f"ward-{number}"] = ClientExamples(x[train], y[train], x[test], y[test])
        return FederatedData.from_clients(clients, num_classes=2, public=True)
