"""Placement by search for the sessions that arrive, not for a given number of them at once.

The paper's design load takes a session to last as long as it would alone. Where memory or computing is short, chains
for many sessions are longer and sessions meet each other on servers: more are in progress than were planned for, and
wait for caches that are not there. Here load and placement agree: the placement is made for as many sessions as are in
progress when each takes the time that it takes under this placement (mean and one deviation, as in load.py).
"""

from collections.abc import Callable

from geopetals.placement.load import cg_bp_for_demand, wanted_load
from geopetals.placement.search.search import SearchResult, search_placement
from geopetals.problem import Problem
from geopetals.timing import Objective

_ROUNDS = 6
_CLOSE = 1.05
"""A placement for a load that is short of the wanted one by less is good enough."""


def search_for_demand(
    problem: Problem,
    *,
    objective: Objective = "relay",
    steps: int | None = None,
    seed: int = 0,
    sessions: int | None = None,
    initial_s: float = 0.0,
) -> SearchResult:
    """The placement for the least load that agrees with itself, or for the most sessions that were found room for.

    sessions: the load to begin with; None: that for which CG-BP places. initial_s: what a session takes beside its
    chain. Raises what cg_bp_for_demand and search_placement raise.
    """
    first = sessions or cg_bp_for_demand(problem, initial_s=initial_s).sessions

    def search(load: int) -> SearchResult:
        return search_placement(problem, load, objective=objective, steps=steps, seed=seed)

    return _settle(search, first, lambda session_s: wanted_load(problem, session_s + initial_s))


def _settle(search: Callable[[int], SearchResult], first: int, in_progress: Callable[[float], int]) -> SearchResult:
    best, load, too_many = search(first), first, None
    for _ in range(_ROUNDS):
        if best.left_over:
            break
        wanted = in_progress(best.cost_s / load)
        if too_many is not None:
            wanted = min(wanted, (load + too_many) // 2)
        if wanted <= load * _CLOSE:
            break
        found = search(wanted)
        if found.left_over:
            too_many = wanted
        else:
            best, load = found, wanted
    return best
