"""Who takes part in a round."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedrounds.fl_components.clients.availability import Always, AvailabilityRule, Bernoulli, Diurnal, Trace
from fedrounds.fl_components.clients.fair import Fair
from fedrounds.fl_components.clients.network import Network
from fedrounds.fl_components.clients.poisson import Poisson
from fedrounds.fl_components.clients.selection import Clients, SelectionRule, Strata
from fedrounds.fl_components.clients.simulation import Availability, Simulation, Stragglers
from fedrounds.fl_components.clients.stratified import Stratified
from fedrounds.fl_components.clients.uniform import Uniform
from fedrounds.fl_components.rules import union

if TYPE_CHECKING:
    Selection = SelectionRule
else:
    Selection = union("selection", Uniform, Poisson, Stratified, Fair)

__all__ = [
    "Always",
    "Availability",
    "AvailabilityRule",
    "Bernoulli",
    "Clients",
    "Diurnal",
    "Fair",
    "Network",
    "Poisson",
    "Selection",
    "SelectionRule",
    "Simulation",
    "Stragglers",
    "Strata",
    "Stratified",
    "Trace",
    "Uniform",
]
