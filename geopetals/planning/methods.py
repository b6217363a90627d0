"""The placements that can be asked for by name."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from geopetals.cluster import Cluster
from geopetals.errors import MemoryShortage, UnsupportedInput
from geopetals.placement.cg_bp import CgBp, blocks_to_hold, cg_bp
from geopetals.placement.gsa import gsa
from geopetals.placement.load import cg_bp_for_demand, design_load
from geopetals.placement.search import SearchResult, search_placement, sessions_by_client
from geopetals.plan import Placement
from geopetals.planning.stock import StockSwarm
from geopetals.problem import Ints, Problem
from geopetals.routing.shortest import shortest_chain
from geopetals.timing import Objective, session_costs

Method = Literal["search", "cg_bp", "exact", "petals", "gsa"]
METHODS: tuple[Method, ...] = get_args(Method)
EXACT_LIMIT_S = 60.0
"""Of solving, unless another budget is given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How long `search` and `exact` may take. Without seconds, search takes a fixed number of steps."""

    seconds: float | None = None
    clock: Callable[[], float] | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A placement, and the sessions at once that it was made for."""

    placement: Placement
    counts: tuple[int, ...]
    """Of each client."""
    guarantee_s: float | None = None
    """CG-BP: no session's decode step takes longer with at most `sessions` at once that relay, without contention."""
    mean_cost_s: float | None = None
    """search and exact: the mean over those sessions of what they were chosen by, a session's time at once."""
    cg_bp_cost_s: float | None = None
    """search: the same with CG-BP for as many; None if it cannot place them."""
    bound_s: float | None = None
    """exact: no placement has a lower mean."""

    @property
    def sessions(self) -> int:
        """Of all clients."""
        return sum(self.counts)


def place(
    cluster: Cluster,
    problem: Problem,
    swarm: StockSwarm,
    method: Method,
    objective: Objective,
    budget: Budget | None = None,
) -> Planned:
    """Raises MemoryShortage or UnsupportedInput."""
    budget = budget or Budget()
    if method == "search":
        return _search(cluster, problem, objective, budget)
    if method == "exact":
        return _exact(cluster, problem, objective, budget)
    if method == "gsa":
        return _gsa(cluster, problem, objective)
    if method == "petals":
        if objective == "push":
            raise UnsupportedInput("Stock PETALS does not push: leave --objective push out, or choose another method.")
        counts = _counts(problem, _sessions(cluster, problem))
        return Planned(placement=swarm.placement(range(problem.num_servers)), counts=counts)
    found = _cg_bp(cluster, problem)
    guarantee_s = found.bound_s if objective == "relay" else None
    best = found.placement
    if objective == "push":
        best = min((found.placement, *_for_push(problem, found)), key=lambda each: mean_s(problem, each, objective))
    return Planned(placement=best, counts=_counts(problem, found.sessions), guarantee_s=guarantee_s)


def mean_s(problem: Problem, placement: Placement, objective: Objective) -> float:
    """The mean over arrivals of a session's time, alone. Raises NoChain."""
    costs = session_costs(problem, objective)
    times_s = [shortest_chain(placement, costs, client)[0] for client in range(problem.num_clients)]
    return float(np.average(times_s, weights=problem.demand_per_s))


def _search(cluster: Cluster, problem: Problem, objective: Objective, budget: Budget) -> Planned:
    """For as many sessions as find room, if the demand asks for more; as many as the workload says, or none."""
    sessions = _sessions(cluster, problem)
    counts = sessions_by_client(problem, sessions)
    if cluster.workload.sessions is None:
        # Nobody who asks is left out because others ask more often.
        raised = np.maximum(counts, problem.demand_per_s > 0)
        found = _searched(problem, raised, objective, budget)
        if not found.left_over:
            return _planned(found)
    found = _searched(problem, counts, objective, budget)
    carried = sessions - found.left_over
    if not carried or (found.left_over and cluster.workload.sessions is not None):
        raise MemoryShortage(f"{carried} of {sessions} sessions at once find room: add memory, or plan for fewer.")
    return _planned(found)


def _searched(problem: Problem, counts: Ints, objective: Objective, budget: Budget) -> SearchResult:
    return search_placement(
        problem, counts, objective=objective, budget_s=budget.seconds, clock=budget.clock, seed=budget.seed
    )


def _planned(found: SearchResult) -> Planned:
    cg_bp_s, sessions = found.cg_bp_cost_s, sum(found.carried)
    return Planned(
        placement=found.placement,
        counts=found.carried,
        mean_cost_s=None if found.left_over else found.cost_s / sessions,
        cg_bp_cost_s=None if cg_bp_s is None or found.left_over else cg_bp_s / sessions,
    )


def _exact(cluster: Cluster, problem: Problem, objective: Objective, budget: Budget) -> Planned:
    from geopetals.placement.exact import exact_placement

    if problem.contention is not None:
        problem = replace(problem, contention=None)
    sessions = _sessions(cluster, problem)
    counts = _counts(problem, sessions)
    found = exact_placement(
        problem,
        np.asarray(counts),
        objective=objective,
        time_limit_s=EXACT_LIMIT_S if budget.seconds is None else budget.seconds,
        seed=budget.seed,
    )
    return Planned(
        placement=found.placement,
        counts=counts,
        mean_cost_s=found.cost_s / sessions,
        bound_s=found.bound_s / sessions,
    )


def _cg_bp(cluster: Cluster, problem: Problem) -> CgBp:
    if cluster.workload.sessions is None:
        return cg_bp_for_demand(problem)
    return cg_bp(problem, cluster.workload.sessions)


def _for_push(problem: Problem, found: CgBp) -> list[Placement]:
    """CG-BP again with what a hop costs when servers push: the delay from the server before it, which is any."""
    if problem.push is None or problem.num_servers < 2:
        return []
    delays_s = problem.push.decode.between_s.copy()
    np.fill_diagonal(delays_s, np.inf)
    candidates = (delays_s.min(axis=0), np.median(delays_s, axis=0))
    return [cg_bp(problem, found.sessions, delay_s=delay_s).placement for delay_s in candidates]


def _sessions(cluster: Cluster, problem: Problem) -> int:
    return cluster.workload.sessions or design_load(problem)


def _counts(problem: Problem, sessions: int) -> tuple[int, ...]:
    return tuple(sessions_by_client(problem, sessions).tolist())


def _gsa(cluster: Cluster, problem: Problem, objective: Objective) -> Planned:
    """GSA with the number of blocks per server that serves a session fastest."""
    if problem.num_clients > 1 or any(problem.pinned):
        raise UnsupportedInput("gsa is for one client and servers without pinned blocks: use --method cg_bp.")
    sessions = _sessions(cluster, problem)
    found = []
    for blocks in sorted({int(count) for count in blocks_to_hold(problem, sessions) if count}):
        try:
            found.append(gsa(problem, sessions, blocks=blocks).placement)
        except MemoryShortage:
            continue
    if not found:
        raise MemoryShortage(f"no equal number of blocks per server carries {sessions} sessions: use --method cg_bp.")
    best = min(found, key=lambda each: mean_s(problem, each, objective))
    return Planned(placement=best, counts=_counts(problem, sessions))
