"""Exact routing of several sessions at once over a given placement: an integer program (SCIP).

Without other sessions every session takes its shortest chain (shortest.py). With them caches may be short, and who
yields to whom is decided here so that the sum of all sessions' costs is the least. A server computes for one session as
for many: compute contention is not part of this.
"""

import math

import numpy as np

from geopetals.errors import ServerFull, UnsupportedInput
from geopetals.plan import Chain, Placement
from geopetals.problem import Ints, Problem
from geopetals.routing.shortest import shortest_chain
from geopetals.timing import Objective, session_costs


def exact_routing(
    problem: Problem,
    placement: Placement,
    sessions: Ints,
    *,
    objective: Objective = "relay",
    time_limit_s: float | None = None,
    seed: int = 0,
) -> tuple[float, tuple[tuple[Chain, ...], ...]]:
    """The least sum of costs in seconds of `sessions` (C,) at once, and for each client a chain per session.

    Raises NoChain where not even one session alone has a chain, ServerFull if the caches do not carry all of them,
    UnsupportedInput if the time limit is over before the optimum is proven.
    """
    from geopetals.placement.exact.arc_flow import ArcFlow, Options
    from geopetals.placement.exact.program import solve

    placement.check(problem)
    counts = checked_sessions(problem, sessions)
    costs = session_costs(problem, objective)
    for client in np.flatnonzero(counts).tolist():
        shortest_chain(placement, costs, client)
    spans = [placement.span(server) for server in range(len(placement))]
    options = Options(
        spans=tuple(() if span is None else ((span.start, span.end),) for span in spans),
        most_flow=np.broadcast_to(counts[:, None, None], (counts.size, len(placement), problem.num_blocks)),
    )
    flow = ArcFlow(problem, costs, counts, options)
    solved = solve(flow.program, solver="SCIP", time_limit_s=time_limit_s, seed=seed)
    if solved.bound == math.inf:
        raise ServerFull(
            f"The placement's caches do not carry {counts.sum()} sessions at once: plan for fewer, or add servers."
        )
    if solved.values is None or not solved.optimal:
        raise UnsupportedInput(f"The routing was not proven optimal in {time_limit_s} s: allow more time.")
    chains = flow.chains(solved.values)
    return total_s(problem, chains, objective), chains


def checked_sessions(problem: Problem, sessions: Ints) -> Ints:
    """(C,) integers of at least 0. Raises UnsupportedInput."""
    counts = np.asarray(sessions)
    if counts.shape != (problem.num_clients,) or (counts != np.floor(counts)).any() or (counts < 0).any():
        raise UnsupportedInput(f"sessions has to be {problem.num_clients} whole numbers, one for each client.")
    if not counts.any():
        raise UnsupportedInput("There are no sessions to plan for: give at least one.")
    return counts.astype(np.int64)


def total_s(problem: Problem, chains: tuple[tuple[Chain, ...], ...], objective: Objective) -> float:
    """The sum of the sessions' costs."""
    costs = session_costs(problem, objective)
    return math.fsum(costs.chain_s(client, chain) for client, mine in enumerate(chains) for chain in mine)
