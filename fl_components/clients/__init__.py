"""Who takes part in a round."""

from fl_components.clients.selection import SelectionRule
from fl_components.clients.uniform import Uniform

Selection = Uniform

__all__ = ["Selection", "SelectionRule", "Uniform"]
