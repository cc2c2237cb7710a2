"""Who takes part in a round."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fl_components.clients.selection import Clients, SelectionRule
from fl_components.clients.uniform import Uniform
from fl_components.rules import union

if TYPE_CHECKING:
    Selection = SelectionRule
else:
    Selection = union("selection", Uniform)

__all__ = ["Clients", "Selection", "SelectionRule", "Uniform"]
