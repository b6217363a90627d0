"""The sessions that wait, in fair order: the first ones hold promises, the starts of the others are extrapolated."""

from bisect import bisect_left, insort
from collections.abc import Callable, Container, Iterator

from geopetals.coordinator.core.books import Books
from geopetals.coordinator.core.session import UNKNOWN_S, Session
from geopetals.errors import NoChain, ServerFull
from geopetals.plan import Route

Choose = Callable[[Session, float], Route]
"""The route that a session would get now, with its own length. Raises NoChain or ServerFull."""

_ARCS = 20_000
_FEWEST = 8
_TRIES_BEHIND = 2
_TRIES = 4
"""Sessions looked at when cache comes free early, beyond those that may begin."""


class Waiting:
    """Sessions by their tags."""

    def __init__(self, lookahead: int) -> None:
        self._lookahead = lookahead
        self.sessions: list[Session] = []
        self._of_payer: dict[str, int] = {}
        self.turn = 0
        """Who of those without a promise was tried last."""
        self.stale = False
        """Whether promises could be better than they are."""

    def __len__(self) -> int:
        return len(self.sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(self.sessions)

    def first_tag(self) -> float:
        """Of those that wait; infinite if nobody does."""
        return self.sessions[0].tag if self.sessions else float("inf")

    def of_payer(self, payer: str) -> int:
        return self._of_payer.get(payer, 0)

    def restore(self, sessions: list[Session], *, stale: bool) -> None:
        """As they were."""
        self.sessions = sorted(sessions, key=lambda each: each.key)
        for session in sessions:
            self._of_payer[session.payer] = self.of_payer(session.payer) + 1
        self.stale = stale

    def place_of(self, session: Session) -> int:
        return bisect_left(self.sessions, session.key, key=lambda each: each.key)

    def add(self, session: Session, books: Books, choose: Choose, now: float, page_tokens: int) -> None:
        """Put it in its place; those behind it get new promises."""
        insort(self.sessions, session, key=lambda each: each.key)
        self._of_payer[session.payer] = self.of_payer(session.payer) + 1
        place = self.place_of(session)
        if place < self.ahead(books):
            self.promise(place, books, choose, now)
        self.extrapolate(books, now, page_tokens)

    def remove(self, session: Session, books: Books, now: float) -> None:
        del self.sessions[self.place_of(session)]
        left = self.of_payer(session.payer) - 1
        if left:
            self._of_payer[session.payer] = left
        else:
            del self._of_payer[session.payer]
        books.unbook(session, now)

    def promise(self, place: int, books: Books, choose: Choose, now: float) -> None:
        """New promises for those from this place on, as far ahead as promises go."""
        for session in self.sessions[place:]:
            if session.bookings:
                books.unbook(session, now)
        for session in self.sessions[place : self.ahead(books)]:
            self._promise(session, books, choose, now)

    def extrapolate(self, books: Books, now: float, page_tokens: int) -> None:
        """The starts of those without a promise: what stands before them, at the rate at which the swarm works."""
        behind = self.sessions[self.ahead(books) :]
        if not behind:
            return
        promised = [session.start_s for session in self.sessions[: -len(behind)] if session.start_s < UNKNOWN_S]
        rate = max(books.concurrent_pages(), 1e-9)
        start_s = max(promised, default=now)
        for session in behind:
            session.start_s = start_s if rate < float("inf") else UNKNOWN_S
            start_s += session.pages(page_tokens) * session.service_s / rate

    def ready(self, books: Books, now: float, page_tokens: int) -> Session | None:
        """One whose promised instant has come and whose caches are free."""
        for session in self.sessions:
            if session.start_s <= now and session.bookings:
                chain = books.chain_of(session.chain)
                if books.fits(chain, session.pages(page_tokens)):
                    return session
        return None

    def advance(self, books: Books, choose: Choose, freed: Container[str], now: float) -> None:
        """Cache of these servers came free early: who waits for it may begin earlier; the very first also elsewhere."""
        self.stale = True
        failed = 0
        for place, session in enumerate(self.sessions[: self.ahead(books)]):
            if failed == _TRIES:
                break
            if not session.bookings or session.start_s <= now:
                continue
            if any(hop.peer_id in freed for hop in session.chain):
                books.bring_forward(session, now)
                failed += session.start_s > now
            if session.start_s > now and place == 0:
                self._elsewhere(session, books, choose, now)

    def fill_up(self, books: Books, choose: Choose, now: float) -> None:
        """Promises for those who have come to the front, and for some behind them who could begin now."""
        ahead = self.ahead(books)
        for session in self.sessions[:ahead]:
            if not session.bookings:
                self._promise(session, books, choose, now)
        behind = len(self.sessions) - ahead
        for _ in range(min(_TRIES_BEHIND, behind)):
            self.turn = (self.turn + 1) % behind
            session = self.sessions[ahead + self.turn]
            if not session.bookings:
                self._elsewhere(session, books, choose, now)

    def ahead(self, books: Books) -> int:
        """So many of the first ones hold promises: to find one takes time in proportion to the arcs of the swarm."""
        return min(max(_ARCS // max(len(books.state.graph.arcs), 1), _FEWEST), self._lookahead)

    def next_start_s(self) -> float:
        """When the next promise is due."""
        starts = [session.start_s for session in self.sessions[: self._lookahead] if session.bookings]
        return min(starts, default=float("inf"))

    def _elsewhere(self, session: Session, books: Books, choose: Choose, now: float) -> None:
        """Whether it could begin now on another chain. All others keep their promises."""
        try:
            route = choose(session, now)
        except (NoChain, ServerFull):
            return
        if route.wait_s <= 0:
            books.unbook(session, now)
            books.book(session, route, now)
            session.chain, session.start_s = books.hops_of(route.chain), route.start_s
            session.end_s = route.end_s

    def _promise(self, session: Session, books: Books, choose: Choose, now: float) -> None:
        try:
            route = choose(session, now)
        except (NoChain, ServerFull):
            session.chain, session.start_s = (), UNKNOWN_S
            return
        books.book(session, route, now)
        session.chain, session.start_s = books.hops_of(route.chain), route.start_s
        session.end_s = route.end_s
        if route.wait_s > 0 and self.ahead(books) == self._lookahead:
            books.fill_gap(session, now)
