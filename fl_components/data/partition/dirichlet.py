"""Dirichlet label skew: each label's rows are spread over the clients unevenly."""

from __future__ import annotations

from typing import Final, Literal

import numpy as np
from pydantic import Field

from fedrounds.fl_components.data.federated import Array, Labels
from fedrounds.fl_components.data.partition.base import Assignment, PartitionRule, check_enough
from fedrounds.fl_components.errors import DataError

_TRIES: Final = 100
_HOPELESS: Final = 20


class Dirichlet(PartitionRule):
    """For each label the clients' shares of its rows are drawn from a symmetric Dirichlet distribution.

    The smaller `alpha`, the fewer labels a client has; a large `alpha` comes near to IID. This is the allocation of
    Yurochkin et al. (2019, "Bayesian nonparametric federated learning of neural networks") and Li et al. (2022,
    "Federated learning on non-IID data silos: an experimental study"), not the one of Hsu et al. (2019) in which all
    clients are of one size: here the sizes are random too. As there, shares are drawn anew until every client has
    `min_examples` rows; where that does not come about (100 draws, or one that leaves more than 20 clients short) it is
    a `DataError`.

    >>> dealt = Dirichlet(num_clients=3, alpha=0.5).deal(np.arange(900) % 10, np.random.default_rng(0))
    >>> int(dealt.rows.lengths.sum()), int(dealt.rows.lengths.min()) >= 1
    (900, True)
    """

    kind: Literal["dirichlet"] = "dirichlet"
    num_clients: int = Field(ge=1)
    alpha: float = Field(gt=0.0, le=1e6)
    min_examples: int = Field(default=1, ge=1)

    def known_num_clients(self) -> int:
        return self.num_clients

    def deal(self, labels_M: Labels, generator: np.random.Generator, owners_M: Array | None = None) -> Assignment:
        hint = "make num_clients or min_examples smaller"
        check_enough(len(labels_M), self.num_clients, self.min_examples, hint)
        shuffled = generator.permutation(len(labels_M))
        by_label = shuffled[np.argsort(labels_M[shuffled], kind="stable")]
        count_C = np.bincount(labels_M)
        for _ in range(_TRIES):
            share_Cn = generator.dirichlet(np.full(self.num_clients, self.alpha), size=len(count_C))
            stop_Cn = np.floor(np.cumsum(share_Cn, axis=1) * count_C[:, None]).astype(np.int64)
            stop_Cn[:, -1] = count_C  # whatever the sum of the shares was rounded to
            size_Cn = np.diff(np.minimum(stop_Cn, count_C[:, None]), axis=1, prepend=0)
            short = int(np.count_nonzero(size_Cn.sum(axis=0) < self.min_examples))
            if not short:
                client_M = np.empty(len(labels_M), np.int64)
                client_M[by_label] = np.repeat(np.tile(np.arange(self.num_clients), len(count_C)), size_Cn.ravel())
                return Assignment.by_client(client_M, self.num_clients, generator)
            if short > _HOPELESS:  # the chance of a draw that leaves none short is then less than one in a million
                break
        raise DataError(
            f"a Dirichlet partition with alpha {self.alpha:g} leaves {short} of {self.num_clients} clients with fewer "
            f"than {self.min_examples} of the {len(labels_M)} rows (min_examples)",
            hint="make alpha larger, num_clients smaller, or min_examples smaller",
        )
