"""What sessions cost by push if each had the swarm for itself: the cheapest chain of one session, under any placement.

It knows nothing of caches that others hold, but a chain has each server at most once, while the decomposition prices
walks. With few sessions it is the better bound.
"""

import numpy as np

from geopetals.placement.bounds.sizes import useful_sizes
from geopetals.problem import Floats, Ints, OneWayDelays, Problem
from geopetals.push_bound import cheapest_path
from geopetals.timing import HopCosts, session_costs


def lone_push_cost_s(problem: Problem, sessions: Ints) -> float:
    """Summed over `sessions` (C,). Infinite if the servers cannot hold the model and one session."""
    costs = session_costs(problem, "push")
    usable = useful_sizes(problem, sessions, "push").usable.sum(axis=1)
    if usable.sum() < problem.num_blocks:
        return float("inf")
    return sum(
        float(count) * _cheapest_s(costs, client, usable, problem.num_blocks)
        for client, count in enumerate(np.asarray(sessions).tolist())
        if count
    )


def _cheapest_s(costs: HopCosts, client: int, most: Ints, num_blocks: int) -> float:
    if costs.push is None:
        return 0.0
    used = np.flatnonzero(most)
    between_s: Floats = costs.push.between_s[np.ix_(used, used)].copy()
    np.fill_diagonal(between_s, np.inf)
    delays = OneWayDelays(
        from_client_s=costs.push.from_client_s[[client]][:, used],
        between_s=between_s,
        to_client_s=costs.push.to_client_s[used][:, [client]],
    )
    return float(cheapest_path(delays, costs.block_s[used], most[used], num_blocks).least_s)
