"""WS-RR, the paper's online routing: what is in progress, and the chain and start of the next session.

| paper  | here                 | meaning |
| ------ | -------------------- | ------- |
| N_j    | slots                | cache slots of server j: floor((M_j - s_m m_j) / s_c) |
| k      | hop.blocks           | slots that a session holds on j |
| w_j(k) | free_from_s - now    | how long until k slots are free on j |
| c_j(k) | Graph.arc_costs      | what the hop costs a session that does not wait |

A session takes the path with the least sum of w_j(k) + c_j(k); it waits for the largest w_j(k) of its chain.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import numpy as np

from geopetals.errors import NoChain, ServerFull
from geopetals.plan import Chain, Placement, Reservation, Route, Span
from geopetals.problem import Floats, Ints, Problem
from geopetals.routing.availability import Availability
from geopetals.routing.contention import BusyServers
from geopetals.routing.graph import build_graph
from geopetals.routing.ledger import Ledger, earliest_fit
from geopetals.routing.shortest import forbidden
from geopetals.timing import Objective, session_costs


@dataclass(frozen=True, slots=True, kw_only=True)
class Accounting:
    """How a session's wait becomes its start, and from when its caches count as taken."""

    start_after: Callable[[float], float] | None = None
    """From the wait until the caches are free to the wait until the start; None: it is woken up in that instant."""
    booked_from_arrival: bool = False
    constant_s: float = 0.0
    """Added to every session before its first token."""


RESERVATION = Accounting()
"""A session starts when its last slot is free, and holds its caches from then on."""


class RouterState:
    """Sessions in progress on one placement. Times are on the caller's clock, which must not go backwards.

    Opening and closing a session restores the state exactly. Predicted ends pass by themselves: a session that is not
    closed by then counts as gone, unless it is extended (`overdue` lists those).
    """

    def __init__(
        self,
        problem: Problem,
        placement: Placement,
        *,
        objective: Objective = "relay",
        accounting: Accounting = RESERVATION,
        slots: Ints | None = None,
        compute_queueing: bool = False,
        promises_compute: bool = True,
    ) -> None:
        """slots, (J,): instead of all that memory has free. compute_queueing: servers slow down with their sessions.

        promises_compute: those that wait for their start count as if they were computed for already. If not, whoever
        starts them has to book them anew.

        Raises MemoryShortage or BlocksError if the servers cannot hold the placement.
        """
        placement.check(problem)
        self.problem = problem
        self.accounting = accounting
        self._objective: Objective = objective
        self.costs = session_costs(problem, objective)
        self.reservations: dict[int, Reservation] = {}
        self._busy = BusyServers(problem, objective) if compute_queueing else None
        self._promises_compute = promises_compute
        self._promised_s: dict[int, float | None] = {}
        self._next_number = 0
        available = problem.slots(placement.held) if slots is None else slots
        self.placement = placement
        self.graph = build_graph(placement, self.costs)
        self._availability = Availability(available, self.graph.arcs)

    @property
    def ledgers(self) -> list[Ledger]:
        """What is booked on each server."""
        return self._availability.ledgers

    @property
    def next_number(self) -> int:
        """Of the next reservation; none that is open has it or a larger one."""
        return self._next_number

    def skip_to(self, number: int) -> None:
        """Reservations from now on have this number or larger ones, as in a state before this one."""
        self._next_number = max(self._next_number, number)

    @property
    def gone(self) -> set[int]:
        """Servers that no session may take."""
        return self._availability.gone

    def route(self, client: int, now: float, *, avoid: Collection[int] = (), slots_per_block: int = 1) -> Route:
        """The chain and the start for a session that arrives now; nothing is booked. Raises NoChain or ServerFull.

        slots_per_block: more than 1 for a session whose cache is that many times the workload's.
        """
        extra_s = self._availability.waits_s(now, slots_per_block)
        if self._busy is not None:
            extra_s += self._busy.arc_slowdown_s(self.graph.arcs)
        for server in avoid:
            extra_s[self.graph.arcs.of_server[server]] = np.inf
        try:
            cost_s, chain = self.graph.cheapest(client, extra_s)
        except NoChain as error:
            raise self._full_or(error, client, avoid) from None
        return self.route_along(chain, client, now, cost_s=cost_s, slots_per_block=slots_per_block)

    def route_along(
        self, chain: Chain, client: int, now: float, *, cost_s: float | None = None, slots_per_block: int = 1
    ) -> Route:
        """The start for a session on a given chain. Raises ServerFull if a server can never hold its caches."""
        free_s = self._availability.chain_free_from_s(chain, now, slots_per_block)
        if free_s == float("inf"):
            raise ServerFull("A server of the chain is gone or too small for the session: choose another chain.")
        service_s = self.service_s(chain, client)
        wait_s = max(free_s - now, 0.0)
        start_s = max(free_s, now)
        if self.accounting.start_after is not None:
            wait_s = self.accounting.start_after(wait_s)
            start_s = max(now + wait_s, free_s)
        return Route(
            client=client,
            chain=chain,
            wait_s=wait_s,
            start_s=start_s,
            end_s=start_s + self.accounting.constant_s + service_s,
            cost_s=service_s if cost_s is None else cost_s,
            slots_per_block=slots_per_block,
        )

    def open(self, route: Route, now: float) -> Reservation:
        """Book the route's caches until its end_s, which the caller may have replaced by a better prediction.

        Raises ServerFull if others took them since the route was decided.
        """
        if self._availability.chain_free_from_s(route.chain, now, route.slots_per_block) > route.start_s:
            raise ServerFull("Another session took the cache of this route: decide on a route again.")
        from_s = now if self.accounting.booked_from_arrival else max(route.start_s, now)
        reservation = Reservation(number=self._next_number, route=route, held_from_s=from_s, end_s=route.end_s)
        self._next_number += 1
        self._book(reservation, now)
        return reservation

    def close(self, reservation: Reservation, now: float) -> None:
        """The session is over, or given up, also before it started: its caches are free from now on."""
        del now  # every event has its instant, this one does not depend on it
        self._unbook(reservation)

    def extend(self, reservation: Reservation, end_s: float, now: float) -> Reservation:
        """The session will end at end_s instead, which must be in the future."""
        self._unbook(reservation)
        extended = replace(reservation, end_s=end_s)
        self._book(extended, now)
        return extended

    def advance(self, reservation: Reservation, now: float) -> Reservation:
        """Start a waiting session as soon as sessions that ended early allow, without delaying any other promise."""
        promised_s = reservation.held_from_s
        if promised_s <= now:
            return reservation
        self._unbook(reservation)
        hops = reservation.route.chain.hops
        start_s = earliest_fit(
            [self.ledgers[hop.server] for hop in hops],
            [hop.blocks * reservation.route.slots_per_block for hop in hops],
            not_before_s=now,
            duration_s=reservation.end_s - promised_s,
            latest_s=promised_s,
        )
        advanced = replace(reservation, held_from_s=start_s, end_s=reservation.end_s - (promised_s - start_s))
        self._book(advanced, now)
        return advanced

    def start_now(self, reservation: Reservation, now: float) -> Reservation:
        """Start a waiting session now, if that delays no other promise; otherwise nothing changes."""
        if reservation.held_from_s <= now:
            return reservation
        self._unbook(reservation)
        earlier_s = reservation.held_from_s - now
        end_s, slots = reservation.end_s - earlier_s, reservation.route.slots_per_block
        if all(
            self.ledgers[hop.server].peak(now, end_s) + hop.blocks * slots <= self.ledgers[hop.server].slots
            for hop in reservation.route.chain
        ):
            reservation = replace(reservation, held_from_s=now, end_s=end_s)
        self._book(reservation, now)
        return reservation

    def restore(self, reservation: Reservation, now: float) -> None:
        """Book a reservation of a state before this one: after a restart, or a new plan."""
        self._book(reservation, now)
        self._next_number = max(self._next_number, reservation.number + 1)

    def overdue(self, now: float) -> tuple[Reservation, ...]:
        """Sessions that should have ended and were not closed."""
        return tuple(r for r in self.reservations.values() if r.end_s <= now)

    def fail(self, server: int, now: float) -> tuple[Reservation, ...]:
        """No new session takes this server. Gives the sessions that have it in their chain: they stay booked."""
        del now
        self._availability.lose(server)
        return tuple(r for r in self.reservations.values() if server in r.route.chain.servers)

    def resize(self, server: int, now: float, *, slots: int, span: Span | None) -> None:
        """The server has this many cache slots and holds these blocks from now on; it is back if it was gone."""
        del now
        self._availability.resize(server, slots)
        if span == self.placement.span(server):
            return
        starts, ends = self.placement.starts.copy(), self.placement.ends.copy()
        starts[server], ends[server] = (span.start, span.end) if span else (0, 0)
        self.placement = Placement(num_blocks=self.placement.num_blocks, starts=starts, ends=ends)
        self.graph = build_graph(self.placement, self.costs)
        self._availability.lay_out(self.graph.arcs)

    def reprice(self, problem: Problem) -> None:
        """The same servers have other times or links, or clients were added: what is booked stays booked.

        Raises MemoryShortage or BlocksError if the servers cannot hold the placement.
        """
        self.placement.check(problem)
        self.problem, self.costs = problem, session_costs(problem, self._objective)
        self.graph = build_graph(self.placement, self.costs)
        if self._busy is not None:
            self._busy = BusyServers(problem, self._objective)
            for number, reservation in self.reservations.items():
                if self._computes(self._promised_s[number]):
                    self._busy.add(reservation.route.chain, reservation.route.client, 1)

    def arc_waits_s(self, now: float, slots_per_block: int = 1) -> Floats:
        """(arcs,): w_j(k) for each arc of the graph; infinite where it can never be taken."""
        return self._availability.waits_s(now, slots_per_block).copy()

    def service_s(self, chain: Chain, client: int) -> float:
        """Prefill and all decode steps of a session that starts now."""
        service_s = self.costs.chain_s(client, chain)
        if self._busy is not None:
            slower_s = self._busy.slowdown_s()
            service_s += sum(float(slower_s[hop.server]) * hop.blocks for hop in chain)
        return service_s

    def free_from_s(self, server: int, blocks: int, now: float) -> float:
        """The instant from which a session may use that many blocks of the server; -inf: it always could."""
        return self._availability.free_from_s(server, blocks, now)

    def _book(self, reservation: Reservation, now: float) -> None:
        if reservation.number in self.reservations:
            raise ValueError(f"reservation {reservation.number} is open already")
        self.reservations[reservation.number] = reservation
        from_s = reservation.held_from_s if reservation.held_from_s > now else None
        self._promised_s[reservation.number] = from_s
        route = reservation.route
        self._availability.book(route.chain, route.slots_per_block, from_s=from_s, end_s=reservation.end_s)
        if self._busy is not None and self._computes(from_s):
            self._busy.add(route.chain, route.client, 1)

    def _unbook(self, reservation: Reservation) -> None:
        if self.reservations.pop(reservation.number, None) != reservation:
            raise ValueError(f"reservation {reservation.number} is not open, or was changed since")
        route, from_s = reservation.route, self._promised_s.pop(reservation.number)
        self._availability.release(route.chain, route.slots_per_block, from_s=from_s, end_s=reservation.end_s)
        if self._busy is not None and self._computes(from_s):
            self._busy.add(route.chain, route.client, -1)

    def _computes(self, promised_s: float | None) -> bool:
        return self._promises_compute or promised_s is None

    def _full_or(self, error: NoChain, client: int, avoid: Collection[int]) -> NoChain | ServerFull:
        """Tell apart blocks without a server and servers without cache for a single session."""
        try:
            self.graph.cheapest(client, forbidden(self.graph.arcs, {*avoid, *self.gone}))
        except NoChain:
            return error
        return ServerFull("No chain has cache for even one session: give servers fewer blocks, or shorten the session.")
