"""Admission: a session starts with its cache reserved on every hop of its chain, waits in fair order, or is refused."""

import heapq
import math
from collections.abc import Callable, Container

from geopetals.coordinator.core.actions import Action
from geopetals.coordinator.core.books import Books
from geopetals.coordinator.core.demand import Demand
from geopetals.coordinator.core.estimates import choose, learn, left_s, predict
from geopetals.coordinator.core.notices import GUESSED_WAIT_S, Notices, is_off
from geopetals.coordinator.core.session import UNKNOWN_S, FairOrder, Session
from geopetals.coordinator.core.settings import Settings
from geopetals.coordinator.core.waiting import Waiting
from geopetals.coordinator.messages import ChainHop, Measured, Open, Predicted
from geopetals.errors import NoChain, ServerFull
from geopetals.plan import Route

_CLOSED_S = 5.0
"""For so long, a server may go on reporting a session that is closed."""
_LEAST_EXTENSION_S = 0.25
_GUESSED_STEP_S = 0.05
_TOO_LARGE = "No chain has cache for even one session of this size: shorten the session, or give servers fewer blocks."
_EARLY_S = 1e-6
"""Differences below are rounding."""


class Desk:
    """Sessions in progress and waiting. What it decides is appended to `out`."""

    def __init__(
        self,
        settings: Settings,
        demand: Demand,
        expected_cover_s: Callable[[float], float | None],
        out: list[Action],
    ) -> None:
        """expected_cover_s and out: see Notices."""
        self._settings, self._demand = settings, demand
        self.notices = Notices(expected_cover_s, settings.queue_wait_s, out)
        self.books: Books | None = None
        """None until there is a server."""
        self.sessions: dict[str, Session] = {}
        self.waiting = Waiting(settings.lookahead)
        self.order = FairOrder()
        self.closed: dict[str, float] = {}
        """Sessions that ended a moment ago, and when."""
        self.finished: list[dict[str, object]] = []
        """The last ones, predicted and measured."""
        self.asked = 0
        self.back_s = 0.0
        """When the coordinator came back from its last outage: before, it could not see sessions go on."""
        self._ends: list[tuple[float, int, str]] = []

    def ask(self, client: str, asked: Open, now: float, *, group: str = "") -> None:
        """group: see SessionAsked."""
        known = self.sessions.get(asked.session_id)
        if known is not None:
            self._again(known, client, now)
            return
        session = self._new(client, asked, now, group)
        self._demand.arrived(client, session.prompt, session.output, now)
        self._mend(now)
        if self.books is None:
            self.notices.refused(
                session, "The swarm has no servers yet: start one and ask again.", self.notices.cover_in_s(now)
            )
            return
        if not self.books.could_hold(self._pages(session)) and self.books.covers():
            # Before anything is computed in proportion to its size.
            self.notices.refused(session, _TOO_LARGE, self._settings.queue_wait_s)
            return
        try:
            route = self._choose(session, now)
        except ServerFull:
            self._wait_for_room(session, now)
            return
        except NoChain as error:
            self._without_chain(session, error, now)
            return
        if route.wait_s <= 0 and self.books.fits(route.chain, self._pages(session)):
            self.order.charge(session, self._work(session, route))
            self.books.book(session, route, now)
            session.chain = self.books.hops_of(route.chain)
            self._admit(session, route.end_s, now)
        else:
            self._enqueue(session, self._work(session, route), now)

    def cancel(self, client: str, session_id: str, now: float) -> None:
        """Of a session that waits, or was just admitted."""
        session = self._own(client, session_id)
        if session is not None:
            self._drop(session, now)
            self._freed({hop.peer_id for hop in session.chain}, now)

    def close(self, client: str, session_id: str, measured: Measured, now: float) -> None:
        session = self._own(client, session_id)
        if session is None:
            return
        if session.admitted:
            self.finished.append(learn(self._demand, session, measured, now))
            del self.finished[: -self._settings.history]
            self.notices.counts["closed"] += 1
        self._drop(session, now)
        self._freed({hop.peer_id for hop in session.chain}, now)

    def resume(
        self,
        client: str,
        session_id: str,
        batch: int,
        max_length: int,
        hops: tuple[ChainHop, ...],
        used: int,
        now: float,
    ) -> None:
        """A session that its client has still; if it is not known here, it is from now on."""
        session = self.sessions.get(session_id)
        if session is not None and (session.client != client or not session.admitted):
            return
        if session is None:
            asked = Open(session_id=session_id, batch=batch, max_length=max_length, prompt_tokens=min(used, max_length))
            session = self._new(client, asked, now, "")
            session.admitted, session.start_s, session.progress_s = True, now, now
            session.predicted = Predicted(ttft_s=0.0, tpot_s=0.0, end_to_end_s=0.0, wait_s=0.0)
            self.sessions[session_id] = session
        elif hops == session.chain:
            return
        self._give_back(session, now)
        rows = {} if self.books is None else self.books.row
        session.chain = hops
        session.void = tuple(hop.peer_id for hop in hops if hop.peer_id not in rows)
        session.used = max(session.used, used)
        session.end_s = max(session.end_s, now + left_s(session, now))
        self._write_down(session, now)

    def extend(self, client: str, session_id: str, max_length: int, now: float) -> None:
        """More tokens on the chain that it has, or not at all: it does not wait for them.

        A session that is not known here gets no answer.
        """
        session = self._own(client, session_id)
        if session is None or self.books is None:
            return
        longer = math.ceil(session.batch * max(session.max_length, max_length) / self._settings.page_tokens)
        more = longer - self._pages(session)
        if not self.books.could_hold(longer):
            why = "No servers have cache for a session of that length: stay with a shorter one."
            self.notices.denied(session_id, client, why)
            return
        if session.admitted and more > 0:
            wait_s = self._wait_for_more_s(session, more, now)
            if wait_s > 0:
                why = "The servers of its chain have no cache for a longer session."
                self.notices.denied(session_id, client, why, wait_s)
                return
        if session.admitted:
            self._give_back(session, now)
            session.max_length = max(session.max_length, max_length)
            self._write_down(session, now)
            self.notices.admitted(session)
        else:
            session.max_length = max(session.max_length, max_length)
            self._promise_from(self.waiting.place_of(session), now)
            if not session.admitted:
                self.notices.queued(session, self.waiting.place_of(session), now)

    def lose_client(self, client: str, now: float, why: str) -> None:
        """Its leases have run out."""
        freed = set()
        for session in [each for each in self.sessions.values() if each.client == client]:
            freed |= {hop.peer_id for hop in session.chain}
            self.end(session, now, why)
        self._freed(freed, now)

    def end(self, session: Session, now: float, why: str) -> None:
        """Give up a session."""
        if session.admitted:
            self.notices.ended(session, why)
        self._drop(session, now)
        self.waiting.stale = True

    def leave_server(self, peer: str, now: float) -> None:
        """The server has given up the caches of all sessions: it moved or is gone."""
        for session in list(self.sessions.values()):
            if session.admitted and any(hop.peer_id == peer for hop in session.hops()):
                self._give_back(session, now)
                session.void = (*session.void, peer)
                self._write_down(session, now)

    def booked_block_tokens(self, session_id: str, peer: str, *, if_closed: int) -> int:
        """What the session may hold on the server; `if_closed` if it was over only a moment ago."""
        if session_id in self.closed:
            return if_closed
        session = self.sessions.get(session_id)
        if session is None or not session.admitted:
            return 0
        tokens = self._pages(session) * self._settings.page_tokens
        return sum((hop.end - hop.start) * tokens for hop in session.hops() if hop.peer_id == peer)

    def progress(self, session_id: str, used: int, now: float) -> None:
        """A server has reported the session."""
        session = self.sessions.get(session_id)
        if session is None or not session.admitted:
            return
        session.seen = True
        if used <= session.used:
            return
        session.used, session.progress_s = used, now
        if not session.first_used:
            session.first_used, session.first_progress_s = used, now
        if not self.waiting or not session.bookings:
            return
        end_s = now + left_s(session, now)
        if is_off(end_s, session.end_s, now):
            self._end_at(session, max(end_s, now + _EARLY_S), now)
            self.waiting.stale = True

    def uses(self, peer: str) -> bool:
        """Whether a session has cache on the server."""
        return any(hop.peer_id == peer for session in self.sessions.values() for hop in session.hops())

    def tick(self, now: float) -> None:
        """Correct predictions, begin what may begin, and tell those who wait."""
        for session in [each for each in self.sessions.values() if each.admitted]:
            if session.seen and now - max(session.progress_s, self.back_s) >= self._settings.idle_s:
                self.end(session, now, "no new token for too long")
            elif not session.seen and now - max(session.start_s, self.back_s) >= self._settings.unseen_s:
                self.end(session, now, "no server has seen it")
        for session in [each for each in self.waiting if each.start_s >= UNKNOWN_S]:
            if now - session.asked_s > self._settings.queue_wait_s:
                self._drop(session, now)
                self.notices.refused(session, "No chain has come free for too long.", GUESSED_WAIT_S)
        for session_id in [each for each, at_s in self.closed.items() if at_s < now - _CLOSED_S]:
            del self.closed[session_id]
        self._mend(now)
        if self.waiting.stale:
            self.waiting.stale = False
            self._promise_from(0, now)
        self._begin_ready(now)
        for position, session in enumerate(self.waiting):
            self.notices.changed(session, position, now)

    def changed(self, now: float) -> None:
        """Servers offer something else, or other prices: promises are made anew."""
        if self.waiting.sessions:
            self._promise_from(0, now)

    def rebuilt(self, now: float) -> None:
        """There are new books: write everything down."""
        row = {} if self.books is None else self.books.row
        for session in self.sessions.values():
            session.bookings = []
            if session.admitted:
                void = {hop.peer_id for hop in session.chain if hop.peer_id not in row}
                session.void = tuple(sorted(void | set(session.void)))
                self._write_down(session, now)
        self.changed(now)

    def next_due_s(self) -> float:
        """When something is to happen by itself."""
        if not self.waiting.sessions:
            return float("inf")
        return min(self.waiting.next_start_s(), self._ends[0][0] if self._ends else float("inf"))

    def restore_ends(self) -> None:
        """After sessions were put in from a snapshot."""
        self._ends = [(each.end_s, each.number, each.session_id) for each in self.sessions.values() if each.admitted]
        heapq.heapify(self._ends)

    def _new(self, client: str, asked: Open, now: float, group: str) -> Session:
        self.asked += 1
        most = max(asked.max_length - asked.prompt_tokens, 1)
        return Session(
            session_id=asked.session_id,
            client=client,
            number=self.asked,
            batch=asked.batch,
            max_length=asked.max_length,
            prompt=max(min(asked.prompt_tokens, asked.max_length), 1),
            output=most if asked.output_tokens is None else max(min(asked.output_tokens, most), 1),
            asked_s=now,
            tag=0.0,
            group=group,
        )

    def _again(self, session: Session, client: str, now: float) -> None:
        if session.client != client:
            why = "Another client has a session of this name: choose another name."
            self.notices.denied(session.session_id, client, why)
        elif session.admitted:
            self.notices.admitted(session)
        else:
            self.notices.queued(session, self.waiting.place_of(session), now)

    def _own(self, client: str, session_id: str) -> Session | None:
        session = self.sessions.get(session_id)
        return session if session is not None and session.client == client else None

    def _pages(self, session: Session) -> int:
        return session.pages(self._settings.page_tokens)

    def _work(self, session: Session, route: Route) -> float:
        return self._pages(session) * (route.end_s - route.start_s)

    def _choose(self, session: Session, now: float) -> Route:
        assert self.books is not None, "there are servers"
        return choose(self.books, self._demand, session, self._pages(session), now)

    def _admit(self, session: Session, end_s: float, now: float) -> None:
        books = self.books
        assert books is not None, "there are servers"
        pages = self._pages(session)
        session.admitted, session.start_s, session.end_s = True, now, end_s
        session.progress_s = now
        books.take(session, pages)
        self.sessions[session.session_id] = session
        self.order.began(min(session.tag, self.waiting.first_tag()))
        self.notices.counts["admitted"] += 1
        if session.first_start_s is None:
            session.first_start_s = now
        session.predicted = predict(self._demand, session, now)
        heapq.heappush(self._ends, (end_s, session.number, session.session_id))
        self.notices.admitted(session)

    def _enqueue(self, session: Session, work: float, now: float) -> None:
        settings, books = self._settings, self.books
        assert books is not None, "there are servers"
        if len(self.waiting) >= settings.queue_length:
            self.notices.refused(session, f"{len(self.waiting)} sessions wait already.", self._room_in_s(now))
            return
        if self.waiting.of_payer(session.payer) >= settings.queue_per_client:
            whose = "join token" if session.group else "client"
            self.notices.refused(session, f"Too many sessions of this {whose} wait already.", self._room_in_s(now))
            return
        self.order.charge(session, work)
        self.waiting.add(session, books, self._choose, now, settings.page_tokens)
        wait_s = session.start_s - now
        if settings.queue_wait_s < wait_s < UNKNOWN_S / 2:
            self.waiting.remove(session, books, now)
            self.order.gave_up(session)
            self.notices.refused(session, f"It would wait {wait_s:.0f} s.", max(wait_s - settings.queue_wait_s, 1.0))
            self.waiting.stale = True
            return
        self.sessions[session.session_id] = session
        if not session.admitted:
            self.notices.queued(session, self.waiting.place_of(session), now)

    def _without_chain(self, session: Session, error: NoChain, now: float) -> None:
        """Blocks have no server: those who load some will be there soon, or nobody will."""
        cover_s = self.notices.expected_cover_s(now)
        if cover_s is None:
            self.notices.refused(session, str(error), GUESSED_WAIT_S)
            return
        self._wait_for_room(session, now)

    def _wait_for_room(self, session: Session, now: float) -> None:
        """There is no chain for it now, so its duration is a guess."""
        session.service_s = max(session.output * _GUESSED_STEP_S, 1.0)
        self._enqueue(session, self._pages(session) * session.service_s, now)

    def _room_in_s(self, now: float) -> float:
        """When a quarter of those who wait will have begun."""
        starts = sorted(session.start_s for session in self.waiting if session.start_s < UNKNOWN_S)
        return max(starts[len(starts) // 4] - now, 0.5) if starts else self.notices.cover_in_s(now)

    def _write_down(self, session: Session, now: float) -> None:
        """The cache of an admitted session that is not booked."""
        if self.books is None:
            return
        pages = self._pages(session)
        session.end_s = max(session.end_s, now + _EARLY_S)
        self.books.rebook(session, pages, now)
        self.books.take(session, pages)
        heapq.heappush(self._ends, (session.end_s, session.number, session.session_id))

    def _give_back(self, session: Session, now: float) -> None:
        if self.books is not None and session.bookings:
            self.books.release(session, self._pages(session))
            self.books.unbook(session, now)

    def _drop(self, session: Session, now: float) -> None:
        del self.sessions[session.session_id]
        if session.admitted:
            self._give_back(session, now)
            self.closed[session.session_id] = now
        elif self.books is not None:
            self.waiting.remove(session, self.books, now)
            self.order.gave_up(session)

    def _freed(self, servers: Container[str], now: float) -> None:
        """Cache of these may have come free."""
        if self.books is not None and self.waiting.sessions:
            self._mend(now)
            self.waiting.advance(self.books, self._choose, servers, now)
            self._begin_ready(now)
            self.waiting.fill_up(self.books, self._choose, now)
            self._begin_ready(now)

    def freed(self, server: str, now: float) -> None:
        """It has more cache than before."""
        self._freed({server}, now)

    def _begin_ready(self, now: float) -> None:
        if self.books is None:
            return
        while (session := self.waiting.ready(self.books, now, self._settings.page_tokens)) is not None:
            self.waiting.remove(session, self.books, now)
            session.admitted, session.start_s, session.end_s = True, now, now + session.service_s
            self.books.rebook(session, self._pages(session), now)
            self._admit(session, session.end_s, now)
        if self.waiting.next_start_s() <= now:
            # What was promised is held still by a session that lasts longer than was predicted.
            self.waiting.stale = True

    def _promise_from(self, place: int, now: float) -> None:
        if self.books is None:
            return
        self.waiting.promise(place, self.books, self._choose, now)
        self.waiting.extrapolate(self.books, now, self._settings.page_tokens)
        self._begin_ready(now)

    def _end_at(self, session: Session, end_s: float, now: float) -> None:
        if self.books is not None:
            self.books.extend(session, end_s, now)
        session.end_s = end_s
        if session.admitted:
            heapq.heappush(self._ends, (end_s, session.number, session.session_id))

    def _mend(self, now: float) -> None:
        """Sessions that should be over and are not: their ends are predicted anew, so that their cache counts."""
        while self._ends and self._ends[0][0] <= now + _EARLY_S:
            end_s, number, session_id = heapq.heappop(self._ends)
            session = self.sessions.get(session_id)
            if session is None or session.number != number or session.end_s != end_s:
                continue
            longer_s = max(0.2 * (now - session.start_s), left_s(session, now) * 0.5, _LEAST_EXTENSION_S)
            self._end_at(session, now + longer_s, now)

    def _wait_for_more_s(self, session: Session, more: int, now: float) -> float:
        books = self.books
        assert books is not None, "there are servers"
        chain = books.chain_of(session.chain) if not session.void else None
        if chain is None:
            return 1.0
        try:
            wait_s = books.state.route_along(chain, 0, now, slots_per_block=more).wait_s
        except ServerFull:
            return self._settings.queue_wait_s
        return wait_s if wait_s > 0 else 0.0 if books.fits(chain, more) else 1.0
