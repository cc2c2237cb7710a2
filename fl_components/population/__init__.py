"""Who the clients are, and which of them take part in a round."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedrounds.fl_components.population.availability import Always, AvailabilityRule, Bernoulli, Diurnal, Trace
from fedrounds.fl_components.population.fair import Fair
from fedrounds.fl_components.population.network import Network
from fedrounds.fl_components.population.poisson import Poisson
from fedrounds.fl_components.population.population import Population
from fedrounds.fl_components.population.selection import Clients, SelectionRule, Strata
from fedrounds.fl_components.population.simulation import Availability, Simulation, Stragglers
from fedrounds.fl_components.population.stratified import Stratified
from fedrounds.fl_components.population.uniform import UniformSampling
from fedrounds.fl_components.rules import union

if TYPE_CHECKING:
    Selection = SelectionRule
else:
    Selection = union("selection", UniformSampling, Poisson, Stratified, Fair)

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
    "Population",
    "Selection",
    "SelectionRule",
    "Simulation",
    "Stragglers",
    "Strata",
    "Stratified",
    "Trace",
    "UniformSampling",
]
