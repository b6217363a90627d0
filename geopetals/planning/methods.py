"""The placements that can be asked for by name."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from geopetals.cluster import Cluster
from geopetals.errors import MemoryShortage, UnsupportedInput
from geopetals.placement.cg_bp import CgBp, blocks_to_hold, cg_bp
from geopetals.placement.gsa import gsa
from geopetals.placement.load import cg_bp_for_demand, design_load
from geopetals.plan import Placement
from geopetals.planning.stock import StockSwarm
from geopetals.problem import Problem
from geopetals.routing.shortest import shortest_chain
from geopetals.timing import Objective, session_costs

Method = Literal["cg_bp", "petals", "gsa"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A placement, and the sessions at once that it was made for."""

    placement: Placement
    sessions: int
    guarantee_s: float | None = None
    """CG-BP: no session's decode step takes longer with at most `sessions` at once that relay, without contention."""


def place(cluster: Cluster, problem: Problem, swarm: StockSwarm, method: Method, objective: Objective) -> Planned:
    """Raises MemoryShortage or UnsupportedInput."""
    if method == "gsa":
        return _gsa(cluster, problem, objective)
    if method == "petals":
        if objective == "push":
            raise UnsupportedInput("Stock PETALS does not push: leave --objective push out, or choose another method.")
        sessions = _sessions(cluster, problem)
        return Planned(placement=swarm.placement(range(problem.num_servers)), sessions=sessions)
    found = _cg_bp(cluster, problem)
    guarantee_s = found.bound_s if objective == "relay" else None
    best = found.placement
    if objective == "push":
        best = min((found.placement, *_for_push(problem, found)), key=lambda each: mean_s(problem, each, objective))
    return Planned(placement=best, sessions=found.sessions, guarantee_s=guarantee_s)


def mean_s(problem: Problem, placement: Placement, objective: Objective) -> float:
    """The mean over arrivals of a session's time, alone. Raises NoChain."""
    costs = session_costs(problem, objective)
    times_s = [shortest_chain(placement, costs, client)[0] for client in range(problem.num_clients)]
    return float(np.average(times_s, weights=problem.demand_per_s))


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
    return Planned(placement=min(found, key=lambda each: mean_s(problem, each, objective)), sessions=sessions)
