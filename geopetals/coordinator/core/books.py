"""Which session holds how much cache on which server, in pages: predicted in the router's ledgers, and as it is.

The ledgers go by predicted ends, so they say when a session may start. Whether it really may is decided by what
admitted sessions hold: never more than a server has.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from geopetals.coordinator.core.judge import covers
from geopetals.coordinator.core.session import Session
from geopetals.coordinator.messages import ChainHop, Span
from geopetals.plan import Chain, Hop, Placement, Reservation, Route
from geopetals.plan import Span as Blocks
from geopetals.problem import Ints
from geopetals.routing.state import RouterState
from geopetals.simulation.world import SessionTimes, World


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What a server offers to new sessions: nothing if `span` is None."""

    span: Span | None
    pages: int
    most_pages: int
    """If only sessions with a booking held cache."""


class Books:
    """Servers and clients by their rows in the world's arrays; the first client is anyone."""

    def __init__(
        self, world: World, servers: Sequence[str], clients: Sequence[str], capacities: Mapping[str, Capacity]
    ) -> None:
        self.servers = list(servers)
        self.row = {peer: row for row, peer in enumerate(servers)}
        self.capacity = dict(capacities)
        self.held = [0] * len(self.servers)
        self._concurrent: float | None = None
        placement = Placement.of([_blocks(capacities[peer].span) for peer in servers], world.problem.num_blocks)
        pages: Ints = np.array([capacities[peer].pages for peer in servers], dtype=np.int64)
        self.state = RouterState(
            world.problem,
            placement,
            objective="push",
            slots=pages,
            compute_queueing=world.problem.contention is not None,
            promises_compute=False,
        )
        for peer in servers:
            if capacities[peer].span is None:
                self.state.fail(self.row[peer], 0.0)
        self._set_world(world, clients)

    def reprice(self, world: World, clients: Sequence[str]) -> None:
        """Times and links have changed, or clients were added at the end."""
        self.state.reprice(world.problem)
        self._set_world(world, clients)

    def offer(self, peer: str, capacity: Capacity, now: float) -> None:
        """From now on; sessions in progress keep what they have."""
        before, row = self.capacity[peer], self.row[peer]
        if capacity == before:
            return
        self.capacity[peer] = capacity
        self._concurrent = None
        if capacity.span is None:
            self.state.fail(row, now)
            return
        span = Blocks(capacity.span.start, capacity.span.end)
        self.state.resize(row, now, slots=capacity.pages, span=span)

    def client_row(self, client: str) -> int:
        return self._client_rows.get(client, 0)

    def fits(self, chain: Chain, pages: int) -> bool:
        """Whether the servers have that much cache free for each block of the chain."""
        for hop in chain:
            offered = self.capacity[self.servers[hop.server]]
            if offered.span is None or self.held[hop.server] + (hop.end - hop.start) * pages > offered.pages:
                return False
        return True

    def could_hold(self, pages: int) -> bool:
        """Whether a session of that size finds room when all others are over."""
        reached = 0
        usable = [(each.span, each.most_pages // pages) for each in self.capacity.values() if each.span is not None]
        for start, end in sorted((max(span.start, span.end - blocks), span.end) for span, blocks in usable):
            if start > reached:
                return False
            reached = max(reached, end)
        return reached >= self.state.placement.num_blocks

    def covers(self) -> bool:
        """Whether every block has a server."""
        spans = {peer: each.span for peer, each in self.capacity.items() if each.span is not None}
        return covers(spans, self.state.placement.num_blocks)

    def chain_of(self, hops: Sequence[ChainHop]) -> Chain:
        return Chain(tuple(Hop(self.row[hop.peer_id], hop.start, hop.end) for hop in hops))

    def hops_of(self, chain: Chain) -> tuple[ChainHop, ...]:
        return tuple(ChainHop(self.servers[hop.server], hop.start, hop.end) for hop in chain)

    def book(self, session: Session, route: Route, now: float) -> None:
        """A promise, or the cache of a session that starts now. Raises ServerFull."""
        session.bookings = [self.state.open(route, now).number]

    def rebook(self, session: Session, pages: int, now: float) -> None:
        """Write down what the session has, whether or not it was there before: after a restart, or a change of it."""
        self.unbook(session, now)
        start_s = min(session.start_s, now) if session.admitted else session.start_s
        for chain in _runs(session, self.row):
            route = Route(
                client=self.client_row(session.client),
                chain=chain,
                wait_s=0.0,
                start_s=start_s,
                end_s=session.end_s,
                cost_s=0.0,
                slots_per_block=pages,
            )
            number = self._free_number()
            booked = Reservation(number=number, route=route, held_from_s=start_s, end_s=session.end_s)
            self.state.restore(booked, now)
            session.bookings.append(number)

    def unbook(self, session: Session, now: float) -> None:
        for number in session.bookings:
            self.state.close(self.state.reservations[number], now)
        session.bookings = []

    def extend(self, session: Session, end_s: float, now: float) -> None:
        """It will end at end_s instead."""
        for number in session.bookings:
            self.state.extend(self.state.reservations[number], end_s, now)
        session.end_s = end_s

    def bring_forward(self, session: Session, now: float) -> None:
        """Let a promised session start now on its chain, if its cache is free and nobody else's promise suffers."""
        before = self.state.reservations[session.bookings[0]]
        if not self.fits(before.route.chain, before.route.slots_per_block):
            return
        after = self.state.start_now(before, now)
        session.start_s, session.end_s = after.held_from_s, after.end_s

    def take(self, session: Session, pages: int) -> None:
        for hop in session.hops():
            self.held[self.row[hop.peer_id]] += (hop.end - hop.start) * pages

    def release(self, session: Session, pages: int) -> None:
        for hop in session.hops():
            self.held[self.row[hop.peer_id]] -= (hop.end - hop.start) * pages

    def concurrent_pages(self) -> float:
        """Pages that chains through the whole model can hold at once: what the scarcest block has."""
        if self._concurrent is None:
            self._concurrent = self._count_concurrent()
        return self._concurrent

    def _count_concurrent(self) -> float:
        placement = self.state.placement
        supply = np.zeros(placement.num_blocks)
        for peer, row in self.row.items():
            offered = self.capacity[peer]
            if offered.span is not None:
                blocks = offered.span.end - offered.span.start
                supply[offered.span.start : offered.span.end] += self.state.ledgers[row].slots / blocks
        return float(supply.min(initial=np.inf))

    def fill_gap(self, session: Session, now: float) -> None:
        """Let a promised session start in the first gap between others' promises that is long enough for it."""
        after = self.state.advance(self.state.reservations[session.bookings[0]], now)
        session.start_s, session.end_s = after.held_from_s, after.end_s

    def _set_world(self, world: World, clients: Sequence[str]) -> None:
        self.times = SessionTimes(world, "push")
        self._client_rows = {client: row for row, client in enumerate(clients)}

    def _free_number(self) -> int:
        return self.state.next_number


def _blocks(span: Span | None) -> tuple[int, int] | None:
    return None if span is None else (span.start, span.end)


def _runs(session: Session, row: Mapping[str, int]) -> list[Chain]:
    """The chain, in pieces where servers have dropped out of it."""
    runs: list[list[Hop]] = []
    for hop in session.chain:
        if hop.peer_id in session.void or hop.peer_id not in row:
            continue
        if not runs or runs[-1][-1].end != hop.start:
            runs.append([])
        runs[-1].append(Hop(row[hop.peer_id], hop.start, hop.end))
    return [Chain(tuple(run)) for run in runs]
