"""The design load: for how many sessions at once to place, from how many arrive.

| paper  | here         | meaning                                                                            |
| ------ | ------------ | ---------------------------------------------------------------------------------- |
| lambda | demand_per_s | sessions that arrive, of all clients                                               |
| T      | session_s    | how long a session takes when it is placed for one session alone                   |
| R      | design_load  | min(round(lambda T + sqrt(lambda T)), R_max): mean and one deviation in progress   |
| R_max  | largest_load | floor((sum M - s_m (L + J)) / (s_c (L + J)))                                       |
"""

import math

import numpy as np

from geopetals.errors import MemoryShortage
from geopetals.placement.cg_bp import CgBp, cg_bp
from geopetals.problem import Problem
from geopetals.routing.graph import build_graph
from geopetals.timing import session_costs


def largest_load(problem: Problem) -> int:
    """R_max: sessions that the memory of all servers could hold; may be less than 1, or not attainable."""
    units = problem.num_blocks + problem.num_servers
    free = float(problem.memory_bytes.sum()) - problem.block_bytes * units
    return math.floor(free / (problem.kv_bytes * units))


def lone_session_s(problem: Problem, *, initial_s: float = 0.0) -> float:
    """T: the cheapest session under CG-BP for one session, the mean over arrivals. Raises MemoryShortage, NoChain."""
    placement = cg_bp(problem, 1).placement
    graph = build_graph(placement, session_costs(problem))
    demand = problem.demand_per_s if problem.demand_per_s.any() else np.ones(problem.num_clients)
    clients = np.flatnonzero(demand)
    costs_s = [graph.cheapest(int(client))[0] for client in clients]
    return float(np.average(costs_s, weights=demand[clients])) + initial_s


def design_load(problem: Problem, *, initial_s: float = 0.0) -> int:
    """R, at least 1. Raises MemoryShortage or NoChain if not even one session can be served."""
    return max(min(wanted_load(problem, lone_session_s(problem, initial_s=initial_s)), largest_load(problem)), 1)


def wanted_load(problem: Problem, session_s: float) -> int:
    """Sessions in progress if each takes that long, the mean and one deviation, whatever fits."""
    mean = float(problem.demand_per_s.sum()) * session_s
    return math.floor(mean + math.sqrt(mean) + 0.5)


def cg_bp_for_demand(problem: Problem, *, initial_s: float = 0.0) -> CgBp:
    """CG-BP for the design load, or the largest load below it that can be placed. Raises MemoryShortage, NoChain.

    R_max divides memory as if it were one piece, so not every load up to it can be placed. Loads are tried on a
    descending geometric grid and then by bisection.
    """
    low, high = 1, design_load(problem, initial_s=initial_s)
    best = _try(problem, high)
    if best is not None:
        return best
    best = cg_bp(problem, low)
    while high - low > 1:
        middle = math.isqrt(low * high) if high > 2 * low else (low + high) // 2
        found = _try(problem, max(middle, low + 1))
        low, high, best = (max(middle, low + 1), high, found) if found else (low, max(middle, low + 1), best)
    return best


def _try(problem: Problem, sessions: int) -> CgBp | None:
    try:
        return cg_bp(problem, sessions)
    except MemoryShortage:
        return None
