"""Lower bounds of what any placement and routing costs: a certificate for every plan.

A Dantzig-Wolfe decomposition (decomposition.py, decomposed.py): sessions are columns that say how many blocks they use
on each server, not which (pricing.py); what servers can hold are convex combinations of their sizes (sizes.py); prices
tie the two (prices.py). The bound is that of the best prices found, valid for any prices, hence also where the search
for them was stopped.

For large swarms under load, where that takes minutes, memory alone gives a looser bound at once (capacity.py).

The bounds know neither compute contention, which only adds to costs, nor where pinned blocks are: pins fix sizes only.
"""

from geopetals.placement.bounds.capacity import capacity_cost_bound
from geopetals.placement.bounds.decomposed import MARGIN, ROUNDS, Decomposed, decomposed
from geopetals.placement.bounds.lone import lone_push_cost_s
from geopetals.problem import Ints, Problem
from geopetals.timing import Objective

__all__ = ["Decomposed", "capacity_cost_bound", "decomposed", "lone_push_cost_s", "push_cost_bound", "relay_cost_bound"]


def relay_cost_bound(problem: Problem, sessions: Ints, *, rounds: int = ROUNDS) -> float:
    """Seconds that `sessions` (C,) at once cost at least by relay, summed, under any placement and routing.

    Infinite if it is proven that no placement carries them. rounds: linear programs solved at most.
    """
    return _bound_s(problem, sessions, "relay", rounds)


def push_cost_bound(problem: Problem, sessions: Ints, *, rounds: int = ROUNDS) -> float:
    """The same by push. Looser than for relay: in the decomposition a session may come back to a server.

    With few sessions at once the sum of what each costs alone (lone.py) may be more, and then is the bound.
    """
    return max(_bound_s(problem, sessions, "push", rounds), lone_push_cost_s(problem, sessions) * (1 - MARGIN))


def _bound_s(problem: Problem, sessions: Ints, objective: Objective, rounds: int) -> float:
    found = decomposed(problem, sessions, objective=objective, rounds=rounds)
    return float("inf") if found is None else found.bound_s
