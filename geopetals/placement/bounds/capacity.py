"""What sessions cost at least by relay, from memory alone: a bound in a second or less where the decomposition takes
minutes, for large swarms under load.

Blocks of a session have a price, the same everywhere; a server earns it, at most as if every session that it carries
used all of its blocks, and pays delay and computing. Whatever the prices, sum_c R_c L price_c less what all servers can
earn is a lower bound. Unlike in the decomposition a chain may be put together from parts of servers.
"""

import numpy as np
from numpy.typing import NDArray

from geopetals.placement.bounds.sizes import useful_sizes
from geopetals.problem import Floats, Ints, Problem
from geopetals.timing import session_costs

FIRST_FACTOR, LAST_FACTOR = 1.5, 1.0002
"""Prices are multiplied by ever smaller factors, up and down, all together and one at a time."""
ROUNDS = 400


def capacity_cost_bound(problem: Problem, sessions: Ints) -> float:
    """Seconds, for `sessions` (C,) at once, summed; infinite if memory cannot hold the caches of all of them."""
    costs = session_costs(problem, "relay")
    delay_s = np.asarray(costs.relay_s)
    counts = np.asarray(sessions, dtype=np.int64)
    sizes = useful_sizes(problem, counts, "relay")
    total = int(counts.sum())
    options = [
        (server, int(size), min(int(slots), total * int(size)))
        for server, (held, room) in enumerate(zip(sizes.sizes, sizes.slots, strict=True))
        for size, slots in zip(held, room, strict=True)
    ]
    if not options:
        return float("inf")
    server, size, room = np.array(options).T
    asked = counts > 0
    block_s = delay_s[asked][:, server] / size + costs.block_s[server]
    firsts = np.flatnonzero(np.diff(server, prepend=-1))

    if np.maximum.reduceat(room, firsts).sum() < total * problem.num_blocks:
        return float("inf")

    def bound_s(price_s: Floats) -> float:
        earned_s = room * np.maximum((price_s[:, None] - block_s).max(axis=0), 0.0)
        paid_s = float(counts[asked] @ price_s) * problem.num_blocks
        return paid_s - float(np.maximum.reduceat(earned_s, firsts).sum())

    price_s = np.full(int(asked.sum()), float(block_s.min()))
    best_s, factor = max(bound_s(price_s), 0.0), FIRST_FACTOR
    for _ in range(ROUNDS):
        if factor < LAST_FACTOR:
            break
        tried = [np.where(who, price_s * by, price_s) for who in _groups(price_s.size) for by in (factor, 1 / factor)]
        found_s = [bound_s(each_s) for each_s in tried]
        if max(found_s) > best_s:
            best_s, price_s = max(found_s), tried[int(np.argmax(found_s))]
        else:
            factor = float(factor**0.5)
    return best_s


def _groups(clients: int) -> list[NDArray[np.bool_]]:
    """All, and each alone."""
    return [np.ones(clients, dtype=bool), *np.eye(clients, dtype=bool)]
