"""When sessions may begin: what they were promised, what is really free, and who comes first.

A promise is kept by the state's ledgers, which go by predicted ends. Where predictions turn out wrong, caches decide: a
session whose promised cache is still held begins when it is free, before all that come later; one whose cache is free
early begins early, if nobody else's promise suffers.
"""

import heapq
from collections.abc import Callable, Iterable
from dataclasses import replace

from geopetals.errors import NoChain, ServerFull
from geopetals.plan import Route
from geopetals.routing.backoff import retry_wait_s
from geopetals.simulation.agenda import Agenda, Kind
from geopetals.simulation.memory import Memory
from geopetals.simulation.policies import Desk
from geopetals.simulation.running import Running
from geopetals.simulation.world import SessionTimes

_EARLY_S = 1e-6
"""Differences below are rounding."""
_SOON = 0.5
"""Half of the shortest time between two tries: what comes after this instant is the next try."""


class Admission:
    """Calls `begin` for a session whose caches are taken, and `refuse` for one that gets none."""

    def __init__(
        self,
        desk: Desk,
        memory: Memory,
        agenda: Agenda,
        times: SessionTimes,
        *,
        exact: bool,
        max_wait_s: float | None,
        begin: Callable[[Running, float], None],
        refuse: Callable[[Running], None],
    ) -> None:
        """exact: predicted ends come true, so that none has to be corrected."""
        self._desk, self._state, self._memory, self._agenda, self._times = desk, desk.state, memory, agenda, times
        self._exact, self._max_wait_s = exact, max_wait_s
        self._begin, self._refuse = begin, refuse
        self._wakes = desk.state.accounting.start_after is None
        self._late: list[Running] = []
        self._promised: list[list[tuple[float, int, Running, int]]] = [[] for _ in memory.slots]
        self._by_reservation: dict[int, Running] = {}

    def attempt(self, running: Running, now: float) -> None:
        """Find a chain. The session begins, waits for what it is promised, tries again, or is refused."""
        try:
            route = self._desk.router.route(running.client, now, slots_per_block=running.slots)
        except (NoChain, ServerFull):
            self._refuse(running)
            return
        if self._desk.retries and (route.wait_s > 0 or not self._memory.fits(route.chain, running.slots)):
            self._try_again(running, now, Kind.RETRY)
            return
        if self._max_wait_s is not None and now - running.attempted_s + route.wait_s > self._max_wait_s:
            self._refuse(running)
            return
        if running.prompt or running.replays:
            route = replace(route, end_s=self._own_end_s(running, route))
        reservation = self._state.open(route, now)
        running.reservation, running.start_s = reservation, route.start_s
        running.servers = frozenset(route.chain.servers)
        self._by_reservation[reservation.number] = running
        self._watch(running)
        if route.wait_s > 0:
            self._promise(running, route.start_s)
        else:
            self.start(running, now)

    def start(self, running: Running, now: float) -> None:
        """The promised instant has come."""
        if running.started or now < running.start_s - _EARLY_S:
            return
        if self._memory.fits(running.chain, running.slots) and not self._overtakes(running):
            self._take(running, now)
        elif not self._wakes:
            self._try_again(running, now, Kind.START)
        elif running not in self._late:
            self._late.append(running)

    def leave(self, running: Running, now: float) -> None:
        """The session is over, or has to find another chain: whatever it has is free."""
        reservation = running.booked
        self._state.close(reservation, now)
        del self._by_reservation[reservation.number]
        if running.started:
            self._memory.release(running.chain, running.slots, since_s=running.held_since_s, now=now)
        elif running in self._late:
            self._late.remove(running)
        running.version += 1
        running.started = False

    def wake(self, servers: Iterable[int], now: float, *, early: bool) -> None:
        """Caches of these servers are free; `early`: before it was predicted."""
        for running in list(self._late):
            if self._memory.fits(running.chain, running.slots) and not self._overtakes(running):
                self._late.remove(running)
                self._take(running, now)
        if early and self._wakes:
            for server in servers:
                self._advance_first(server, now)

    def overdue(self, running: Running, now: float, end_s: Callable[[Running, float], float]) -> None:
        """Its predicted end has passed, and it goes on: predict again."""
        reservation = running.booked
        if reservation.end_s > now + _EARLY_S:
            return
        service_s = reservation.route.end_s - reservation.route.start_s
        later_s = end_s(running, now) if running.started else now + service_s
        running.reservation = self._state.extend(reservation, max(later_s, now + 0.01 * service_s + _EARLY_S), now)
        self._watch(running)

    def on(self, reservations: Iterable[int]) -> list[Running]:
        """The sessions of these reservations, in the order of admission."""
        return [self._by_reservation[number] for number in sorted(reservations)]

    def _take(self, running: Running, now: float) -> None:
        if now > running.start_s + _EARLY_S:
            reservation = running.booked
            end_s = reservation.end_s + now - running.start_s
            running.reservation = self._state.extend(reservation, end_s, now)
            self._watch(running)
        self._memory.take(running.chain, running.slots)
        running.started, running.held_since_s = True, now
        self._begin(running, now)

    def _promise(self, running: Running, ready_s: float) -> None:
        self._agenda.add(ready_s, Kind.START, running)
        if self._wakes:
            for hop in running.chain:
                entry = (running.start_s, running.number, running, running.version)
                heapq.heappush(self._promised[hop.server], entry)

    def _advance_first(self, server: int, now: float) -> None:
        """Those promised the server next may begin now, until one cannot."""
        queue = self._promised[server]
        while queue:
            promised_s, _, running, version = queue[0]
            if running.version != version or running.started or promised_s != running.start_s:
                heapq.heappop(queue)
                continue
            if promised_s <= now:
                return
            self._advance(running, now)
            if not running.started:
                return

    def _advance(self, running: Running, now: float) -> None:
        before, after = running.booked, self._state.advance(running.booked, now)
        if after == before:
            return
        running.reservation, running.start_s = after, after.held_from_s
        self._watch(running)
        if running.start_s <= now:
            self.start(running, now)
        if not running.started:
            self._promise(running, running.start_s)

    def _overtakes(self, running: Running) -> bool:
        """Whether someone who should have begun before waits for one of its servers."""
        for other in self._late:
            if other is running:
                return False
            if not running.servers.isdisjoint(other.servers):
                return True
        return False

    def _try_again(self, running: Running, now: float, kind: Kind) -> None:
        wait_s = retry_wait_s(now - running.attempted_s + _SOON)
        if self._max_wait_s is not None and wait_s > self._max_wait_s and kind == Kind.RETRY:
            self._refuse(running)
            return
        self._agenda.add(running.attempted_s + wait_s, kind, running)

    def _watch(self, running: Running) -> None:
        if not self._exact:
            self._agenda.add(running.booked.end_s, Kind.OVERDUE, running)

    def _own_end_s(self, running: Running, route: Route) -> float:
        """The router prices the workload's session: this one has its own length, and is slowed down alike."""
        chain, client, constant_s = route.chain, running.client, self._desk.constant_s
        usual_s = self._state.costs.chain_s(client, chain)
        slower = (route.end_s - route.start_s - constant_s) / usual_s if usual_s else 1.0
        own_s = self._times.first_s(client, chain, running.prompt)
        own_s += (running.output - 1) * self._times.step_s(client, chain)
        return route.start_s + (0.0 if running.replays else constant_s) + own_s * slower
