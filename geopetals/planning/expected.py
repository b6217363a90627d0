"""What a client may expect of a placement: alone, and with as many sessions at once as it was made for."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from geopetals.plan import Chain, Route
from geopetals.problem import Problem
from geopetals.routing.contention import BusyServers
from geopetals.routing.state import RouterState
from geopetals.timing import Objective, decode_costs, prefill_costs

Choose = Callable[[int], Route]
"""The route of a session of this client that arrives now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """Seconds, of a session or in the mean of several."""

    ttft_s: float
    """Waiting included."""
    tpot_s: float
    wait_s: float


def alone(problem: Problem, client: int, chain: Chain, objective: Objective) -> Expected:
    """Of a session that has the swarm to itself."""
    return Expected(
        ttft_s=prefill_costs(problem, objective).chain_s(client, chain),
        tpot_s=decode_costs(problem, objective).chain_s(client, chain),
        wait_s=0.0,
    )


def admit(problem: Problem, state: RouterState, choose: Choose, sessions: int) -> list[Route]:
    """That many sessions at once, of the clients by their demand. Raises NoChain or ServerFull."""
    routes = []
    for client in shared_out(problem, sessions):
        route = choose(client)
        state.open(route, 0.0)
        routes.append(route)
    return routes


def together(problem: Problem, routes: list[Route], objective: Objective) -> dict[int, Expected]:
    """By client, the means of `each_of`."""
    found: dict[int, list[Expected]] = {}
    for route, expected in zip(routes, each_of(problem, routes, objective), strict=True):
        found.setdefault(route.client, []).append(expected)
    return {client: _mean(each) for client, each in found.items()}


def each_of(problem: Problem, routes: list[Route], objective: Objective) -> list[Expected]:
    """Of sessions in progress at once: servers decode for several, where that is known to slow them down."""
    busy = None if problem.contention is None else BusyServers(problem, objective)
    if busy is not None:
        for route in routes:
            busy.add(route.chain, route.client, 1)
    found = []
    for route in routes:
        lone = alone(problem, route.client, route.chain, objective)
        slower_s = 0.0 if busy is None else _slower_s(problem, busy, route)
        found.append(Expected(ttft_s=lone.ttft_s + route.wait_s, tpot_s=lone.tpot_s + slower_s, wait_s=route.wait_s))
    return found


def mean_session_s(problem: Problem, routes: list[Route], together: dict[int, Expected]) -> float:
    """From arrival to the last token, the mean over sessions in progress at once."""
    steps = problem.output_tokens - 1
    times_s = [together[route.client].ttft_s + steps * together[route.client].tpot_s for route in routes]
    return float(np.mean(times_s))


def shared_out(problem: Problem, sessions: int) -> list[int]:
    """The client of each session, in turns by demand."""
    share = problem.demand_per_s / problem.demand_per_s.sum()
    given = np.zeros(problem.num_clients)
    clients = []
    for number in range(1, sessions + 1):
        client = int(np.argmax(share * number - given))
        given[client] += 1
        clients.append(client)
    return clients


def _slower_s(problem: Problem, busy: BusyServers, route: Route) -> float:
    """Of one decode step, by the other sessions."""
    if problem.output_tokens < 2:
        return 0.0
    busy.add(route.chain, route.client, -1)
    slower_s = busy.slowdown_s() / (problem.output_tokens - 1)
    busy.add(route.chain, route.client, 1)
    return sum(float(slower_s[hop.server]) * hop.blocks for hop in route.chain)


def _mean(each: list[Expected]) -> Expected:
    return Expected(
        ttft_s=float(np.mean([e.ttft_s for e in each])),
        tpot_s=float(np.mean([e.tpot_s for e in each])),
        wait_s=float(np.mean([e.wait_s for e in each])),
    )
