"""The simulator: how long people would wait for tokens under a policy, by the code that also decides live."""

from geopetals.simulation.policies import Policy, Rules, policy
from geopetals.simulation.result import Fate, Result
from geopetals.simulation.runs import simulate
from geopetals.simulation.scenario import POLICIES, Arrivals, Constants, Happening, Load, Scenario
from geopetals.simulation.world import World

__all__ = [
    "POLICIES",
    "Arrivals",
    "Constants",
    "Fate",
    "Happening",
    "Load",
    "Policy",
    "Result",
    "Rules",
    "Scenario",
    "World",
    "policy",
    "simulate",
]
