"""Percentiles of simulated arrivals, for planning.slo: sessions come at random, and wait for caches and computing."""

from dataclasses import dataclass, replace

import numpy as np

from geopetals.plan import Placement
from geopetals.planning.slo import Percentiles, at_rate
from geopetals.problem import Problem
from geopetals.simulation import Load, Scenario, World, simulate
from geopetals.simulation.policies import Planned
from geopetals.timing import Objective


@dataclass(frozen=True, slots=True, kw_only=True)
class _Given(Planned):
    """The geopetals policy on a placement that is given."""

    published: bool = False
    placement: Placement

    def place(self, world: World, seed: int) -> Placement:
        del world, seed
        return self.placement


def simulated_percentiles(
    problem: Problem, objective: Objective, percentile: float, *, sessions: int, seed: int = 0
) -> Percentiles:
    """Of that many Poisson arrivals, the first tenth left out; infinite unless all are served."""
    swarm = problem if objective == "push" else replace(problem, push=None)
    scenario = Scenario(load=Load(sessions=sessions))

    def measure(placement: Placement, rate_per_s: float) -> tuple[float, float]:
        result = simulate(at_rate(swarm, rate_per_s), scenario, _Given(placement=placement), seed)
        if result.counted["completed"] < sessions:
            return float("inf"), float("inf")
        tpot_s = result.tpot_s()
        return (
            float(np.percentile(result.ttft_s(), percentile)),
            float(np.percentile(tpot_s, percentile)) if tpot_s.size else 0.0,
        )

    return measure
