"""Whose turn it is: a session begins with its cache reserved on every hop of its chain, waits in fair order, or is
refused.
"""

from collections.abc import Container

from geopetals.coordinator.core.demand import Demand
from geopetals.coordinator.core.estimates import choose, predict
from geopetals.coordinator.core.leases import Leases
from geopetals.coordinator.core.notices import GUESSED_WAIT_S, Notices
from geopetals.coordinator.core.session import UNKNOWN_S, FairOrder, Session
from geopetals.coordinator.core.settings import Settings
from geopetals.coordinator.core.waiting import Waiting
from geopetals.errors import NoChain, ServerFull
from geopetals.plan import Route

_GUESSED_STEP_S = 0.05
_TOO_LARGE = "No chain has cache for even one session of this size: shorten the session, or give servers fewer blocks."


class Turns:
    """Sessions that want cache."""

    def __init__(self, settings: Settings, demand: Demand, leases: Leases, notices: Notices) -> None:
        self._settings, self._demand, self._leases, self._notices = settings, demand, leases, notices
        self.waiting = Waiting(settings.lookahead)
        self.order = FairOrder()

    def take(self, session: Session, now: float) -> None:
        """A session that has just been asked for."""
        books = self._leases.books
        if books is None:
            cover_s = self._notices.cover_in_s(now)
            self._notices.refused(session, "The swarm has no servers yet: start one and ask again.", cover_s)
            return
        if not books.could_hold(self._leases.pages(session)) and books.covers():
            # Before anything is computed in proportion to its size.
            self._notices.refused(session, _TOO_LARGE, self._settings.queue_wait_s)
            return
        try:
            route = self._choose(session, now)
        except ServerFull:
            self._wait_for_room(session, now)
            return
        except NoChain as error:
            self._without_chain(session, error, now)
            return
        if route.wait_s <= 0 and books.fits(route.chain, self._leases.pages(session)):
            self.order.charge(session, self._work(session, route))
            books.book(session, route, now)
            session.chain = books.hops_of(route.chain)
            self._admit(session, route.end_s, now)
        else:
            self._enqueue(session, self._work(session, route), now)

    def give_up(self, session: Session, now: float) -> None:
        """It does not wait any more."""
        if self._leases.books is not None:
            self.waiting.remove(session, self._leases.books, now)
            self.order.gave_up(session)

    def freed(self, servers: Container[str], now: float) -> None:
        """Cache of these may have come free."""
        books = self._leases.books
        if books is not None and self.waiting.sessions:
            self._leases.mend(now)
            self.waiting.advance(books, self._choose, servers, now)
            self.begin_ready(now)
            self.waiting.fill_up(books, self._choose, now)
            self.begin_ready(now)

    def begin_ready(self, now: float) -> None:
        """Those whose instant has come and whose cache is free."""
        books = self._leases.books
        if books is None:
            return
        while (session := self.waiting.ready(books, now, self._settings.page_tokens)) is not None:
            self.waiting.remove(session, books, now)
            session.admitted, session.start_s, session.end_s = True, now, now + session.service_s
            books.rebook(session, self._leases.pages(session), now)
            self._admit(session, session.end_s, now)
        if self.waiting.next_start_s() <= now:
            # What was promised is held still by a session that lasts longer than was predicted.
            self.waiting.stale = True

    def promise_from(self, place: int, now: float) -> None:
        """New promises for those from this place on."""
        books = self._leases.books
        if books is None:
            return
        self.waiting.promise(place, books, self._choose, now)
        self.waiting.extrapolate(books, now, self._settings.page_tokens)
        self.begin_ready(now)

    def changed(self, now: float) -> None:
        """Servers offer something else, or other prices: promises are made anew."""
        if self.waiting.sessions:
            self.promise_from(0, now)

    def tick(self, now: float) -> None:
        """Better promises where there can be some, and what is told of them."""
        if self.waiting.stale:
            self.waiting.stale = False
            self.promise_from(0, now)
        self.begin_ready(now)
        for position, session in enumerate(self.waiting):
            self._notices.changed(session, position, now)

    def _choose(self, session: Session, now: float) -> Route:
        return choose(self._leases.written(), self._demand, session, self._leases.pages(session), now)

    def _work(self, session: Session, route: Route) -> float:
        return self._leases.pages(session) * (route.end_s - route.start_s)

    def _admit(self, session: Session, end_s: float, now: float) -> None:
        self._leases.begin(session, end_s, now)
        self.order.began(min(session.tag, self.waiting.first_tag()))
        self._notices.counts["admitted"] += 1
        if session.first_start_s is None:
            session.first_start_s = now
        session.predicted = predict(self._demand, session, now)
        self._notices.admitted(session)

    def _enqueue(self, session: Session, work: float, now: float) -> None:
        settings, books, notices = self._settings, self._leases.written(), self._notices
        if len(self.waiting) >= settings.queue_length:
            notices.refused(session, f"{len(self.waiting)} sessions wait already.", self._room_in_s(now))
            return
        if self.waiting.of_payer(session.payer) >= settings.queue_per_client:
            whose = "join token" if session.group else "client"
            notices.refused(session, f"Too many sessions of this {whose} wait already.", self._room_in_s(now))
            return
        self.order.charge(session, work)
        self.waiting.add(session, books, self._choose, now, settings.page_tokens)
        wait_s = session.start_s - now
        if settings.queue_wait_s < wait_s < UNKNOWN_S / 2:
            self.give_up(session, now)
            notices.refused(session, f"It would wait {wait_s:.0f} s.", max(wait_s - settings.queue_wait_s, 1.0))
            self.waiting.stale = True
            return
        self._leases.sessions[session.session_id] = session
        if not session.admitted:
            notices.queued(session, self.waiting.place_of(session), now)

    def _without_chain(self, session: Session, error: NoChain, now: float) -> None:
        """Blocks have no server: those who load some will be there soon, or nobody will."""
        cover_s = self._notices.expected_cover_s(now)
        if cover_s is None:
            self._notices.refused(session, str(error), GUESSED_WAIT_S, is_incomplete=True)
            return
        self._wait_for_room(session, now)

    def _wait_for_room(self, session: Session, now: float) -> None:
        """There is no chain for it now, so its duration is a guess."""
        session.service_s = max(session.output * _GUESSED_STEP_S, 1.0)
        self._enqueue(session, self._leases.pages(session) * session.service_s, now)

    def _room_in_s(self, now: float) -> float:
        """When a quarter of those who wait will have begun."""
        starts = sorted(session.start_s for session in self.waiting if session.start_s < UNKNOWN_S)
        return max(starts[len(starts) // 4] - now, 0.5) if starts else self._notices.cover_in_s(now)
