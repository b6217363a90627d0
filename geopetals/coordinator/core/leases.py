"""Sessions, and the cache that those in progress hold in the books until they should be over."""

import heapq

from geopetals.coordinator.core.books import Books
from geopetals.coordinator.core.estimates import left_s
from geopetals.coordinator.core.session import Session
from geopetals.coordinator.core.settings import Settings
from geopetals.errors import ServerFull

EARLY_S = 1e-6
"""Differences below are rounding."""
_CLOSED_S = 5.0
"""For so long, a server may go on reporting a session that is closed."""
_LEAST_EXTENSION_S = 0.25


class Leases:
    """`sessions` are all that are known, those that wait included."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.books: Books | None = None
        """None until there is a server."""
        self.sessions: dict[str, Session] = {}
        self.closed: dict[str, float] = {}
        """Sessions that ended a moment ago, and when."""
        self._ends: list[tuple[float, int, str]] = []

    def written(self) -> Books:
        """The books, where there have to be some."""
        assert self.books is not None, "there are servers"
        return self.books

    def own(self, client: str, session_id: str) -> Session | None:
        session = self.sessions.get(session_id)
        return session if session is not None and session.client == client else None

    def pages(self, session: Session) -> int:
        return session.pages(self._settings.page_tokens)

    def begin(self, session: Session, end_s: float, now: float) -> None:
        """It has been booked, and holds its cache from now on."""
        session.admitted, session.start_s, session.end_s = True, now, end_s
        session.progress_s = now
        self.written().take(session, self.pages(session))
        self.sessions[session.session_id] = session
        self._note_end(session)

    def write_down(self, session: Session, now: float) -> None:
        """The cache of an admitted session that is not booked."""
        if self.books is None:
            return
        pages = self.pages(session)
        session.end_s = max(session.end_s, now + EARLY_S)
        self.books.rebook(session, pages, now)
        self.books.take(session, pages)
        self._note_end(session)

    def give_back(self, session: Session, now: float) -> None:
        if self.books is not None and session.bookings:
            self.books.release(session, self.pages(session))
            self.books.unbook(session, now)

    def close(self, session: Session, now: float) -> None:
        """An admitted session is over; its servers may go on reporting it for a moment."""
        self.give_back(session, now)
        self.closed[session.session_id] = now

    def leave_server(self, peer: str, now: float) -> None:
        """The server has given up the caches of all sessions: it moved or is gone."""
        for session in list(self.sessions.values()):
            if session.admitted and any(hop.peer_id == peer for hop in session.hops()):
                self.give_back(session, now)
                session.void = (*session.void, peer)
                self.write_down(session, now)

    def end_at(self, session: Session, end_s: float, now: float) -> None:
        """It will be over then instead."""
        if self.books is not None:
            self.books.extend(session, end_s, now)
        session.end_s = end_s
        if session.admitted:
            self._note_end(session)

    def mend(self, now: float) -> None:
        """Sessions that should be over and are not: their ends are predicted anew, so that their cache counts."""
        while self._ends and self._ends[0][0] <= now + EARLY_S:
            end_s, number, session_id = heapq.heappop(self._ends)
            session = self.sessions.get(session_id)
            if session is None or session.number != number or session.end_s != end_s:
                continue
            longer_s = max(0.2 * (now - session.start_s), left_s(session, now) * 0.5, _LEAST_EXTENSION_S)
            self.end_at(session, now + longer_s, now)

    def wait_for_more_s(self, session: Session, more: int, now: float) -> float:
        """Until so many pages more are free on its own chain."""
        books = self.written()
        chain = books.chain_of(session.chain) if not session.void else None
        if chain is None:
            return 1.0
        try:
            wait_s = books.state.route_along(chain, 0, now, slots_per_block=more).wait_s
        except ServerFull:
            return self._settings.queue_wait_s
        return wait_s if wait_s > 0 else 0.0 if books.fits(chain, more) else 1.0

    def booked_block_tokens(self, session_id: str, peer: str, *, if_closed: int) -> int:
        """What the session may hold on the server; `if_closed` if it was over only a moment ago."""
        if session_id in self.closed:
            return if_closed
        session = self.sessions.get(session_id)
        if session is None or not session.admitted:
            return 0
        tokens = self.pages(session) * self._settings.page_tokens
        return sum((hop.end - hop.start) * tokens for hop in session.hops() if hop.peer_id == peer)

    def uses(self, peer: str) -> bool:
        """Whether a session has cache on the server."""
        return any(hop.peer_id == peer for session in self.sessions.values() for hop in session.hops())

    def forget_closed(self, now: float) -> None:
        for session_id in [each for each, at_s in self.closed.items() if at_s < now - _CLOSED_S]:
            del self.closed[session_id]

    def rebuilt(self, now: float) -> None:
        """There are new books: write everything down."""
        row = {} if self.books is None else self.books.row
        for session in self.sessions.values():
            session.bookings = []
            if session.admitted:
                void = {hop.peer_id for hop in session.chain if hop.peer_id not in row}
                session.void = tuple(sorted(void | set(session.void)))
                self.write_down(session, now)

    def next_end_s(self) -> float:
        """When the next session should be over."""
        return self._ends[0][0] if self._ends else float("inf")

    def restore(self, sessions: list[Session]) -> None:
        """From a snapshot."""
        self.sessions = {session.session_id: session for session in sessions}
        self._ends = [(each.end_s, each.number, each.session_id) for each in sessions if each.admitted]
        heapq.heapify(self._ends)

    def _note_end(self, session: Session) -> None:
        heapq.heappush(self._ends, (session.end_s, session.number, session.session_id))
