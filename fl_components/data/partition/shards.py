"""Shards: the pathological split, in which most clients have few labels."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from fedrounds.fl_components.data.federated import Array, Labels
from fedrounds.fl_components.data.partition.base import Assignment, PartitionRule, check_enough


class Shards(PartitionRule):
    """The rows are sorted by label, cut into equal shards, and each client is dealt `shards_per_client` of them.

    McMahan et al. (2017, "Communication-efficient learning of deep networks from decentralized data"): 100 clients with
    two of MNIST's 200 shards of 300 images each. Which rows of a label make up a shard is random.

    >>> labels = np.arange(1000) // 100
    >>> dealt = Shards(num_clients=10).deal(labels, np.random.default_rng(0))
    >>> max(len(set(labels[dealt.order[i * 100 : (i + 1) * 100]])) for i in range(10))
    2
    """

    kind: Literal["shards"] = "shards"
    num_clients: int = Field(ge=1)
    shards_per_client: int = Field(default=2, ge=1)

    def known_num_clients(self) -> int:
        return self.num_clients

    def deal(self, labels_M: Labels, generator: np.random.Generator, owners_M: Array | None = None) -> Assignment:
        num_rows, num_shards = len(labels_M), self.num_clients * self.shards_per_client
        hint = f"make num_clients times shards_per_client at most {num_rows}: a shard has at least one row"
        check_enough(num_rows, self.num_clients, self.shards_per_client, hint)
        shuffled = generator.permutation(num_rows)
        by_label = shuffled[np.argsort(labels_M[shuffled], kind="stable")]
        client_of_shard = generator.permutation(num_shards) // self.shards_per_client
        client_M = np.empty(num_rows, np.int64)
        client_M[by_label] = client_of_shard[np.arange(num_rows) * num_shards // num_rows]
        return Assignment.by_client(client_M, self.num_clients, generator)
