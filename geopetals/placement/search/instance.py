"""What the search asks of a problem over and over, as plain lists: Python reads them faster than arrays."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from geopetals.bound import cheapest_knapsack
from geopetals.errors import UnsupportedInput
from geopetals.problem import Contention, Floats, Ints, OneWayDelays, Problem, PushDelays
from geopetals.timing import HopCosts, Objective, session_costs

PENALTY_CHAINS = 10.0
"""A session that finds no room counts as that many of the dearest chain there could be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """Push: delays that the sessions of all clients, or of one, pay, in seconds."""

    first: list[float]
    """(J,): client to first server."""
    last: list[float]
    """(J,): last server to client."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Delays:
    """Hop costs as lists: of whole sessions, or of one decode step."""

    block_s: list[float]
    hop_s: dict[int, list[float]]
    """[c][j]: relay only."""
    links: dict[int, Links]
    """[c]: push only."""
    between_s: list[list[float]]
    """[i][j]: push only."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Instance:
    """A problem and the sessions of each client, ready for the search."""

    problem: Problem
    objective: Objective
    costs: HopCosts
    sessions: Ints
    """(C,)"""
    clients: tuple[int, ...]
    """Those with sessions, the most first."""
    slots: list[list[int]]
    """[j][m]: session-blocks whose caches fit beside m blocks."""
    most: list[int]
    """[j]: the most blocks that leave room for one session's caches; 0: the server is of no use."""
    delays: Delays
    least_s: dict[int, float]
    """[c]: no session of the client costs less."""
    penalty_s: float
    """For each session that finds no room."""

    @property
    def num_blocks(self) -> int:
        return self.problem.num_blocks

    @property
    def num_servers(self) -> int:
        return self.problem.num_servers

    @property
    def movable(self) -> list[int]:
        """Servers whose blocks may be chosen."""
        return [j for j, most in enumerate(self.most) if most and self.problem.pinned[j] is None]

    @property
    def floor_s(self) -> float:
        """No placement costs less: each session alone on the best chain."""
        return sum(self.least_s[client] * int(self.sessions[client]) for client in self.clients)


def make_instance(problem: Problem, sessions: Ints, objective: Objective) -> Instance:
    """sessions: (C,). Raises UnsupportedInput for push without the delays between servers."""
    costs = session_costs(problem, objective)
    clients = sorted(np.flatnonzero(sessions).tolist(), key=lambda client: -int(sessions[client]))
    slots = [_slots(problem, server) for server in range(problem.num_servers)]
    most = np.array([max(m for m, fit in enumerate(each) if fit >= m) for each in slots])
    least_hop_s = _least_hop_s(costs)
    return Instance(
        problem=problem,
        objective=objective,
        costs=costs,
        sessions=sessions,
        clients=tuple(clients),
        slots=slots,
        most=most.tolist(),
        delays=as_lists(costs, clients),
        least_s={c: _least_s(problem, costs, least_hop_s[c], most) for c in clients},
        penalty_s=PENALTY_CHAINS * _dearest_s(problem, costs),
    )


def as_lists(costs: HopCosts, clients: Sequence[int]) -> Delays:
    """For these clients only."""
    relay_s, push = costs.relay_s, costs.push
    return Delays(
        block_s=costs.block_s.tolist(),
        hop_s={} if relay_s is None else {c: relay_s[c].tolist() for c in clients},
        links={} if push is None else {c: _links(push, c) for c in clients},
        between_s=[] if push is None else push.between_s.tolist(),
    )


def part_of(problem: Problem, servers: Sequence[int]) -> Problem:
    """The problem with these servers only, in this order."""
    kept = np.asarray(servers, dtype=np.int64)
    push, contention = problem.push, problem.contention
    return replace(
        problem,
        memory_bytes=problem.memory_bytes[kept],
        decode_block_s=problem.decode_block_s[kept],
        prefill_block_s=problem.prefill_block_s[kept],
        relay_decode_s=problem.relay_decode_s[:, kept],
        relay_prefill_s=problem.relay_prefill_s[:, kept],
        max_blocks=problem.max_blocks[kept],
        pinned=tuple(problem.pinned[server] for server in servers),
        push=None if push is None else PushDelays(decode=_part(push.decode, kept), prefill=_part(push.prefill, kept)),
        contention=None
        if contention is None
        else Contention(floor_s=contention.floor_s[kept], session_s=contention.session_s[kept]),
    )


def _part(delays: OneWayDelays, kept: Ints) -> OneWayDelays:
    return OneWayDelays(
        from_client_s=delays.from_client_s[:, kept],
        between_s=delays.between_s[np.ix_(kept, kept)],
        to_client_s=delays.to_client_s[kept],
    )


def _slots(problem: Problem, server: int) -> list[int]:
    held = np.arange(int(problem.max_blocks[server]) + 1)
    free = problem.memory_bytes[server] - problem.block_bytes * held
    fitting = held[free >= 0]
    return [int(fit) for fit in np.maximum(np.floor(free[fitting] / problem.kv_bytes), 0)]


def _links(push: OneWayDelays, client: int) -> Links:
    return Links(first=push.from_client_s[client].tolist(), last=push.to_client_s[:, client].tolist())


def _least_hop_s(costs: HopCosts) -> Floats:
    """(C, J): the least delay that a hop to the server adds for the client, whatever comes before it."""
    push = costs.push
    if push is None:
        if costs.relay_s is None:
            raise UnsupportedInput("These costs have neither relay nor push delays: give one of them.")
        return costs.relay_s
    between_s = push.between_s.copy()
    np.fill_diagonal(between_s, np.inf)
    return np.asarray(np.minimum(push.from_client_s, between_s.min(axis=0)))


def _least_s(problem: Problem, costs: HopCosts, hop_s: Floats, most: Ints) -> float:
    found_s = cheapest_knapsack(hop_s, costs.block_s, most, problem.num_blocks).decode_s
    return found_s if np.isfinite(found_s) else 0.0


def _dearest_s(problem: Problem, costs: HopCosts) -> float:
    """No chain costs more."""
    push = costs.push
    delays = [costs.relay_s] if push is None else [push.from_client_s, push.between_s, push.to_client_s]
    largest_s = max(float(each[np.isfinite(each)].max(initial=0.0)) for each in delays if each is not None)
    hops = min(problem.num_servers, problem.num_blocks) + 1
    return hops * largest_s + problem.num_blocks * float(costs.block_s.max())
