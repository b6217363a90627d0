"""The plan for a cluster as people read it: names instead of indices, and what each server and client may expect."""

from dataclasses import asdict, dataclass

import numpy as np

from geopetals.bound import Bound, decode_bound
from geopetals.cluster import ClientId, Cluster, ServerId, to_problem
from geopetals.errors import NoChain, ServerFull
from geopetals.plan import Chain, Placement, Route, Span
from geopetals.planning import expected
from geopetals.planning.expected import Expected
from geopetals.planning.methods import Budget, Method, Planned, place
from geopetals.planning.stock import StockSwarm
from geopetals.problem import Problem
from geopetals.routing.shortest import shortest_chain
from geopetals.routing.state import RouterState
from geopetals.timing import Objective, session_costs, sessions_per_server

JOIN_ORDERS = 20
_ROUNDING = 1e-6
"""By how much a bound may come out above what it bounds, as a share: more is a mistake, and shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerReport:
    """What a server holds. `sessions` fit if each uses all blocks; `carries` of those planned for use it."""

    server: ServerId
    blocks: Span | None
    weight_bytes: int
    cache_bytes: int
    sessions: int
    carries: int
    relayed: bool
    times_estimated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class HopReport:
    """Blocks that a server of a chain computes."""

    server: ServerId
    blocks: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientReport:
    """A session alone and with the others planned for; the bound is on the TPOT alone."""

    client: ClientId
    demand_per_s: float
    chain: tuple[HopReport, ...]
    alone: Expected
    together: Expected | None
    bound: Bound

    @property
    def efficiency(self) -> float:
        """Bound / TPOT alone."""
        return self.bound.decode_s / self.alone.tpot_s


@dataclass(frozen=True, slots=True, kw_only=True)
class PetalsReport:
    """Stock PETALS on the same servers, joining in random orders: TPOT of a session alone, the mean over arrivals.

    Orders that leave blocks without a server, or without cache for a session, are `failed` and not in the figures.
    mean_session_s: as in PlanReport, for the order with the median TPOT.
    """

    orders: int
    failed: int
    blocks: tuple[Span | None, ...] | None
    """Of each server, in the order of joining with the median TPOT."""
    client_tpot_s: tuple[float, ...] | None
    """Of each client, in that order."""
    median_tpot_s: float | None
    best_tpot_s: float | None
    worst_tpot_s: float | None
    mean_session_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """All that `geopetals plan` prints. mean_session_s: arrival to last token with all sessions planned for at once."""

    cluster: Cluster
    method: Method
    objective: Objective
    sessions: int
    guarantee_s: float | None
    mean_session_s: float
    servers: tuple[ServerReport, ...]
    clients: tuple[ClientReport, ...]
    petals: PetalsReport
    mean_cost_s: float | None = None
    """search and exact: the mean of what the placement was chosen by."""
    cg_bp_cost_s: float | None = None
    """search: the same with CG-BP."""
    cost_bound_s: float | None = None
    """No placement and routing has a lower mean; None if it was not looked for."""

    @property
    def gap(self) -> float | None:
        """By how much the cost is above the bound at most, as a share of the bound."""
        if self.mean_cost_s is None or not self.cost_bound_s:
            return None
        gap = self.mean_cost_s / self.cost_bound_s - 1
        return 0.0 if -_ROUNDING < gap < 0 else gap

    @property
    def mean_tpot_s(self) -> float:
        """Of a session alone, over arrivals."""
        weights = [client.demand_per_s for client in self.clients]
        return float(np.average([client.alone.tpot_s for client in self.clients], weights=weights))


def plan(
    cluster: Cluster,
    *,
    method: Method = "search",
    objective: Objective = "relay",
    budget: Budget | None = None,
    bound: bool = False,
) -> PlanReport:
    """Place and route. bound: look for a lower bound of what sessions cost at once, which may take long.

    Raises ClusterError, MemoryShortage, UnsupportedInput or NoChain.
    """
    problem, bare = to_problem(cluster), to_problem(cluster, overhead=False)
    swarm = StockSwarm(cluster, problem)
    planned = place(cluster, problem, swarm, method, objective, budget)
    chains = _chains(problem, swarm, planned, method, objective)
    routes = _routes(problem, swarm, planned, method, objective)
    together = expected.together(problem, routes, objective)
    return PlanReport(
        cluster=cluster,
        method=method,
        objective=objective,
        sessions=planned.sessions,
        guarantee_s=planned.guarantee_s,
        mean_session_s=expected.mean_session_s(problem, routes, together),
        servers=_servers(cluster, problem, planned.placement, routes),
        clients=tuple(
            ClientReport(
                client=client.id,
                demand_per_s=float(problem.demand_per_s[index]),
                chain=tuple(HopReport(server=cluster.servers[h.server].id, blocks=Span(h.start, h.end)) for h in chain),
                alone=expected.alone(problem, index, chain, objective),
                together=together.get(index),
                bound=decode_bound(bare, index, objective=objective),
            )
            for index, (client, chain) in enumerate(zip(cluster.clients, chains, strict=True))
        ),
        petals=petals_report(problem, swarm, planned.sessions),
        mean_cost_s=planned.mean_cost_s,
        cg_bp_cost_s=planned.cg_bp_cost_s,
        cost_bound_s=_cost_bound_s(problem, planned, objective) if bound else planned.bound_s,
    )


def _cost_bound_s(problem: Problem, planned: Planned, objective: Objective) -> float:
    """Of the mean session; what queueing for compute adds is not in it."""
    from geopetals.placement.bounds import push_cost_bound, relay_cost_bound

    bound = relay_cost_bound if objective == "relay" else push_cost_bound
    total_s = bound(problem, np.asarray(planned.counts))
    return max(total_s / planned.sessions, planned.bound_s or 0.0)


def petals_report(
    problem: Problem, swarm: StockSwarm, sessions: int, *, orders: int = JOIN_ORDERS, seed: int = 0
) -> PetalsReport:
    """What becomes of the cluster when servers join by themselves, in `orders` random orders."""
    rng = np.random.default_rng(seed)
    found: list[tuple[float, Placement, tuple[float, ...]]] = []
    for _ in range(orders):
        placement = swarm.placement(rng.permutation(problem.num_servers).tolist())
        try:
            tpots_s = swarm.tpots_s(placement)
        except (NoChain, ServerFull):
            continue
        found.append((float(np.average(tpots_s, weights=problem.demand_per_s)), placement, tpots_s))
    found.sort(key=lambda each: each[0])
    tpot_s, median, client_tpot_s = found[(len(found) - 1) // 2] if found else (None, None, None)
    return PetalsReport(
        orders=orders,
        failed=orders - len(found),
        blocks=None if median is None else tuple(median.span(server) for server in range(problem.num_servers)),
        client_tpot_s=client_tpot_s,
        median_tpot_s=tpot_s,
        best_tpot_s=found[0][0] if found else None,
        worst_tpot_s=found[-1][0] if found else None,
        mean_session_s=None if median is None else _petals_session_s(problem, swarm, median, sessions),
    )


def _petals_session_s(problem: Problem, swarm: StockSwarm, placement: Placement, sessions: int) -> float | None:
    try:
        routes = swarm.routes(placement, sessions)
    except ServerFull:
        return None
    return expected.mean_session_s(problem, routes, expected.together(problem, routes, "relay"))


def _chains(problem: Problem, swarm: StockSwarm, planned: Planned, method: Method, objective: Objective) -> list[Chain]:
    """Of a session of each client that has the swarm to itself."""
    clients = range(problem.num_clients)
    if method == "petals":
        router = swarm.router(planned.placement)
        return [router.route(client, 0.0).chain for client in clients]
    costs = session_costs(problem, objective)
    return [shortest_chain(planned.placement, costs, client)[1] for client in clients]


def _routes(problem: Problem, swarm: StockSwarm, planned: Planned, method: Method, objective: Objective) -> list[Route]:
    """The routes of as many sessions at once as were planned for."""
    if method == "petals":
        return swarm.routes(planned.placement, planned.sessions)
    queueing = problem.contention is not None
    state = RouterState(problem, planned.placement, objective=objective, compute_queueing=queueing)
    return expected.admit(problem, state, lambda client: state.route(client, 0.0), planned.sessions)


def _servers(cluster: Cluster, problem: Problem, placement: Placement, routes: list[Route]) -> tuple[ServerReport, ...]:
    weights, fit = placement.weight_bytes(problem), sessions_per_server(problem, placement)
    carries = np.zeros(problem.num_servers, dtype=np.int64)
    for route in routes:
        carries[list(route.chain.servers)] += 1
    return tuple(
        ServerReport(
            server=server.id,
            blocks=placement.span(index),
            weight_bytes=int(weights[index]),
            cache_bytes=server.memory_bytes - int(weights[index]) if placement.held[index] else 0,
            sessions=int(fit[index]),
            carries=int(carries[index]),
            relayed=server.relayed,
            times_estimated=server.decode_block is None or server.prefill_block is None,
        )
        for index, server in enumerate(cluster.servers)
    )


def report_json(report: PlanReport) -> dict[str, object]:
    """The report as JSON has it: seconds and bytes, spans as [start, end)."""
    cluster = report.cluster
    return {
        "cluster": cluster.name,
        "model": {
            "name": cluster.model.name,
            "blocks": cluster.model.num_blocks,
            "block_bytes": cluster.model.block_bytes,
        },
        "method": report.method,
        "objective": report.objective,
        "sessions": report.sessions,
        "mean_tpot_s": report.mean_tpot_s,
        "mean_session_s": report.mean_session_s,
        "guaranteed_tpot_s": report.guarantee_s,
        "mean_cost_s": report.mean_cost_s,
        "cg_bp_cost_s": report.cg_bp_cost_s,
        "cost_bound_s": report.cost_bound_s,
        "gap": report.gap,
        "servers": [asdict(server) for server in report.servers],
        "clients": [_client_json(cluster, client) for client in report.clients],
        "petals": asdict(report.petals),
    }


def _client_json(cluster: Cluster, client: ClientReport) -> dict[str, object]:
    chain = [{"server": cluster.servers[j].id, "blocks": count} for j, count in client.bound.blocks_of]
    bound = {"tpot_s": client.bound.decode_s, "method": client.bound.method, "chain": chain}
    return asdict(client) | {"bound": bound, "efficiency": client.efficiency}
