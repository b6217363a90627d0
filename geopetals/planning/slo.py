"""The highest rate of arrivals at which people still get their tokens soon: percentiles of TTFT and TPOT under limits.

Any callable may say what percentiles a placement gives at a rate: `routed_percentiles` here, which routes the sessions
that are in progress at once, or a simulation of arrivals (planning.slo_simulation).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from geopetals.errors import MemoryShortage, NoChain, ServerFull, UnsupportedInput
from geopetals.placement.load import largest_load, lone_session_s, wanted_load
from geopetals.placement.search import SearchResult, search_placement
from geopetals.plan import Placement
from geopetals.planning.expected import admit, each_of
from geopetals.problem import Problem
from geopetals.routing.state import RouterState
from geopetals.timing import Objective

Percentiles = Callable[[Placement, float], tuple[float, float]]
"""(placement, sessions per second) -> TTFT and TPOT in seconds, infinite if sessions find no room."""
RESOLUTION = 1.03
"""The rate found and the lowest one known to be too high differ by no more than this factor."""
_CLOSE = 1.05
"""A placement for a load that is short of the one in progress by less is good enough."""
_FURTHEST = 4096.0
"""Rates are looked for from the demand divided by this to the demand times this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the percentile of all sessions may be at most, in seconds."""

    ttft_s: float = float("inf")
    tpot_s: float = float("inf")
    percentile: float = 90.0

    def __post_init__(self) -> None:
        if not (self.ttft_s > 0 and self.tpot_s > 0 and 0 < self.percentile <= 100):
            raise UnsupportedInput("Limits have to be above 0 and the percentile above 0 and at most 100: mend them.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sustained:
    """The highest rate found, the placement made for it, and its percentiles."""

    rate_per_s: float
    sessions: int
    """At once, that it was placed for."""
    placement: Placement
    ttft_s: float
    tpot_s: float


def highest_rate(
    problem: Problem,
    limits: Limits,
    *,
    objective: Objective = "relay",
    steps: int = 500,
    seed: int = 0,
    percentiles: Percentiles | None = None,
) -> Sustained | None:
    """None if not even a hardly used swarm keeps the limits. Clients keep their shares of the demand.

    For each rate tried, a placement is searched for with that many steps.
    """
    measure = percentiles or routed_percentiles(problem, objective, limits.percentile)

    def attempt(rate_per_s: float) -> Sustained | None:
        return _attempt(problem, rate_per_s, limits, objective, steps, seed, measure)

    start = float(problem.demand_per_s.sum()) or 1.0
    low, high = _bracket(attempt, start)
    if low is None:
        return None
    while high / low.rate_per_s > RESOLUTION:
        middle = (low.rate_per_s * high) ** 0.5
        found = attempt(middle)
        low, high = (low, middle) if found is None else (found, high)
    return low


def routed_percentiles(problem: Problem, objective: Objective, percentile: float) -> Percentiles:
    """By routing as many sessions at once as are in progress at the rate, queueing for compute included."""

    def measure(placement: Placement, rate_per_s: float) -> tuple[float, float]:
        scaled = at_rate(problem, rate_per_s)
        state = RouterState(scaled, placement, objective=objective, compute_queueing=problem.contention is not None)
        try:
            routes = admit(scaled, state, lambda client: state.route(client, 0.0), sessions_at_once(scaled))
        except (NoChain, ServerFull):
            return float("inf"), float("inf")
        each = each_of(scaled, routes, objective)
        ttft_s = np.percentile([expected.ttft_s for expected in each], percentile)
        return float(ttft_s), float(np.percentile([expected.tpot_s for expected in each], percentile))

    return measure


def at_rate(problem: Problem, rate_per_s: float) -> Problem:
    """The same shares of the clients, that many sessions per second in all."""
    demand = problem.demand_per_s if problem.demand_per_s.any() else np.ones(problem.num_clients)
    return replace(problem, demand_per_s=demand * rate_per_s / demand.sum())


def sessions_at_once(problem: Problem) -> int:
    """The design load whatever fits: R_max stays the same however many arrive, and says nothing of the rate."""
    return max(wanted_load(problem, lone_session_s(problem)), 1)


def _attempt(
    problem: Problem,
    rate_per_s: float,
    limits: Limits,
    objective: Objective,
    steps: int,
    seed: int,
    measure: Percentiles,
) -> Sustained | None:
    scaled = at_rate(problem, rate_per_s)
    try:
        found = _placed(scaled, objective, steps, seed)
    except (MemoryShortage, NoChain):
        return None
    if found is None:
        return None
    sessions = sum(found.sessions)
    ttft_s, tpot_s = measure(found.placement, rate_per_s)
    if not (ttft_s <= limits.ttft_s and tpot_s <= limits.tpot_s):
        return None
    return Sustained(rate_per_s=rate_per_s, sessions=sessions, placement=found.placement, ttft_s=ttft_s, tpot_s=tpot_s)


def _placed(problem: Problem, objective: Objective, steps: int, seed: int) -> SearchResult | None:
    """With room for all that are in progress when each takes as long as it does there; None if they do not fit."""
    sessions, wanted = 0, sessions_at_once(problem)
    found = None
    while wanted > sessions * _CLOSE:
        sessions = wanted
        if sessions > largest_load(problem):
            return None
        found = search_placement(problem, sessions, objective=objective, steps=steps, seed=seed)
        if found.left_over:
            return None
        wanted = wanted_load(problem, found.cost_s / sessions)
    return found


def _bracket(attempt: Callable[[float], Sustained | None], start: float) -> tuple[Sustained | None, float]:
    """A rate that keeps the limits, and a higher one that does not or is as far as one looks."""
    found, rate = attempt(start), start
    if found is None:
        while found is None and rate > start / _FURTHEST:
            rate /= 2
            found = attempt(rate)
        return found, rate * 2
    while rate < start * _FURTHEST:
        rate *= 2
        higher = attempt(rate)
        if higher is None:
            return found, rate
        found = higher
    return found, found.rate_per_s
