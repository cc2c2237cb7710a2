"""Who pays for a release of private data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import total_ordering
from typing import Final

EACH: Final = "*"
"""In the place of a client: the account that holds the terms of each client's own account."""


@total_ordering
@dataclass(frozen=True, slots=True)
class Account:
    """An account in the privacy ledger: that of a population, or that of one client in it.

    A claim of the whole population (central differential privacy) charges the population's account. A claim that each
    client makes for itself (example-level or local differential privacy) charges one account per client.

    Accounts are ordered by the code points of their string form, which is also what the database holds.

    Args:
      population: the name of the population.
      client: the client's id. None: the account of the population itself.

    >>> str(Account("heart")), str(Account("heart", "cleveland")), str(Account("heart").template)
    ('heart', 'heart/cleveland', 'heart/*')
    >>> Account.parse("heart/cleveland") == Account("heart", "cleveland")
    True
    """

    population: str
    client: str | None = None

    @classmethod
    def parse(cls, text: str) -> Account:
        """Return the account that has this string form."""
        population, slash, client = text.partition("/")
        return cls(population, client if slash else None)

    def __str__(self) -> str:
        return self.population if self.client is None else f"{self.population}/{self.client}"

    def __lt__(self, other: Account) -> bool:
        return str(self) < str(other)

    @property
    def template(self) -> Account:
        """The account of this population that holds the terms of each client's own. It is never charged."""
        return Account(self.population, EACH)

    @property
    def is_template(self) -> bool:
        return self.client == EACH
