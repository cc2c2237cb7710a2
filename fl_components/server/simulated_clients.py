"""SimulatedClients: the examples of clients that this installation simulates itself."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fedrounds.fl_components.data import FederatedData
from fedrounds.fl_components.data.fingerprints import Fingerprints
from fedrounds.fl_components.population import Population
from fedrounds.fl_components.server.row_digests import digest_of_client
from fedrounds.fl_components.shared_memory import SharedMemory
from fedrounds.fl_components.task import LearningTask
from fedrounds.fl_components.training import ExampleTable


@dataclass(frozen=True, eq=False)
class SimulatedClients:
    """All clients' examples. Where clients are real, there is no such object: their examples are theirs.

    Args:
      data: the examples, checked.
      memory: the training examples once more, without a copy, for other processes.
    """

    data: FederatedData
    memory: SharedMemory
    _digests: dict[int, bytes] = field(default_factory=dict)

    def population(self) -> Population:
        """Return who these clients are."""
        data = self.data
        return Population(data.client_ids, data.train_rows.lengths, data.public, data.attribute)

    def examples(self, task: LearningTask) -> ExampleTable:
        """Return all clients' training examples, as training takes them."""
        x, y = (torch.from_numpy(self.memory[name]) for name in ("x", "y"))
        return ExampleTable(x, y, self.memory["starts"], self.memory["stops"], task)

    def digest(self, index: int) -> bytes:
        """Return the sha256 over the id and the training rows of one client, which is private; computed once."""
        if index not in self._digests:
            self._digests[index] = digest_of_client(self.data, index)
        return self._digests[index]

    def fingerprints(self, *, every_client: bool) -> Fingerprints:
        """Return what tells these clients' rows from those of other populations."""
        return self.data.fingerprints(every_client=every_client)
