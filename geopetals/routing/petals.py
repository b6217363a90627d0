"""How a stock PETALS client chooses its chain, as the baseline; and the paper's ablation with an optimal choice.

PETALS prices a chain as if servers sent straight to the next one, although its data goes back to the client after each
hop. What a chain takes is therefore computed by the RouterState, with relay; only the choice is made here.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from geopetals.plan import Chain, Route
from geopetals.problem import Floats, Ints, OneWayDelays
from geopetals.routing.graph import build_graph
from geopetals.routing.state import RouterState
from geopetals.timing import HopCosts

HOP_OVERHEAD_S = 0.018
"""PETALS' constant for serialization, added to each hop but the way back to the client."""
FULL_PENALTY_S = 10.0
"""Added to a server that has no cache left."""


class Router(Protocol):
    """Chooses a route; nothing is booked until the caller opens it on the state."""

    state: RouterState

    def route(self, client: int, now: float, *, slots_per_block: int = 1) -> Route:
        """For a session that arrives now."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PingTimes:
    """Round trips as PETALS measures them, without overhead."""

    client_s: Floats
    """(C, J)"""
    between_s: Floats
    """(J, J)"""


class PetalsRouter:
    """Dijkstra over servers: half a round trip, the overhead and the computing of one decode step for each hop."""

    def __init__(
        self,
        state: RouterState,
        pings: PingTimes,
        *,
        session_capacity: Ints | None = None,
        hop_overhead_s: float = HOP_OVERHEAD_S,
        full_penalty_s: float = FULL_PENALTY_S,
    ) -> None:
        """session_capacity, (J,): a server counts as full when exactly that many sessions are on it, waiting ones too.

        That is the test of the paper's simulator, by which an oversubscribed server is not full. None: as the PETALS
        release does it, a server is full when its free slots do not suffice for the blocks.
        """
        self.state = state
        self._capacity = session_capacity
        self._penalty_s = full_penalty_s
        self._delays = OneWayDelays(
            from_client_s=pings.client_s / 2 + hop_overhead_s,
            between_s=pings.between_s / 2 + hop_overhead_s,
            to_client_s=pings.client_s.T / 2,
        )
        self._lay_out()

    def route(self, client: int, now: float, *, slots_per_block: int = 1) -> Route:
        """Raises NoChain; ServerFull if a server of the chain can never hold the session."""
        if self._placement is not self.state.placement:
            self._lay_out()
        extra_s = np.where(self._full(now, slots_per_block), self._penalty_s, 0.0)
        for server in self.state.gone:
            extra_s[self._graph.arcs.of_server[server]] = np.inf
        cost_s, chain = self._graph.cheapest(client, extra_s)
        return self.state.route_along(chain, client, now, cost_s=cost_s, slots_per_block=slots_per_block)

    def _lay_out(self) -> None:
        self._placement = self.state.placement
        costs = HopCosts(block_s=self.state.problem.decode_block_s, push=self._delays)
        self._graph = build_graph(self._placement, costs)

    def _full(self, now: float, slots_per_block: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        if self._capacity is None:
            return np.asarray(self.state.arc_waits_s(now, slots_per_block) > 0)
        full = self._capacity == sessions_on(self.state, now)
        return np.asarray(full[self._graph.arcs.server])


class LeastWaitRouter:
    """The paper's optimized routing: the chain with the least cost plus its largest wait, exactly."""

    def __init__(self, state: RouterState) -> None:
        self.state = state

    def route(self, client: int, now: float, *, slots_per_block: int = 1) -> Route:
        """Raises NoChain. The route's cost_s is the least cost plus largest wait."""
        waits_s = self.state.arc_waits_s(now, slots_per_block)
        best: tuple[float, Chain] | None = None
        for limit_s in np.unique(waits_s).tolist():
            # A chain whose waits stay below the limit costs at least the cheapest chain so far allowed.
            if best is not None and limit_s >= best[0]:
                break
            best = self._within(limit_s, waits_s, client, best)
        if best is None:
            return self.state.route(client, now, slots_per_block=slots_per_block)
        route = self.state.route_along(best[1], client, now, slots_per_block=slots_per_block)
        return replace(route, cost_s=best[0])

    def _within(
        self, limit_s: float, waits_s: Floats, client: int, best: tuple[float, Chain] | None
    ) -> tuple[float, Chain] | None:
        graph = self.state.graph
        if not covers(graph.arcs.entry[waits_s <= limit_s], graph.arcs.num_blocks):
            return best
        cost_s, chain = graph.cheapest(client, np.where(waits_s <= limit_s, 0.0, np.inf))
        return (cost_s + limit_s, chain) if best is None or cost_s + limit_s < best[0] else best


def covers(blocks: Ints, num_blocks: int) -> bool:
    """Whether each block is among these."""
    return np.unique(blocks).size == num_blocks


def sessions_on(state: RouterState, now: float) -> Ints:
    """(J,): sessions that have not ended, on each server, waiting ones too."""
    counts = np.zeros(state.problem.num_servers, dtype=np.int64)
    for reservation in state.reservations.values():
        if reservation.end_s > now:
            counts[list(reservation.route.chain.servers)] += 1
    return counts
