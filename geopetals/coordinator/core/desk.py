"""What clients and servers say of sessions, and what becomes of them: see Turns and Leases."""

import math
from collections.abc import Callable, Container

from geopetals.coordinator.core.actions import Action
from geopetals.coordinator.core.books import Books
from geopetals.coordinator.core.demand import Demand
from geopetals.coordinator.core.estimates import learn, left_s
from geopetals.coordinator.core.leases import EARLY_S, Leases
from geopetals.coordinator.core.notices import GUESSED_WAIT_S, Notices, is_off
from geopetals.coordinator.core.session import UNKNOWN_S, FairOrder, Session
from geopetals.coordinator.core.settings import Settings
from geopetals.coordinator.core.turns import Turns
from geopetals.coordinator.core.waiting import Waiting
from geopetals.coordinator.messages import ChainHop, Measured, Open, Predicted


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
        self.leases = Leases(settings)
        self._turns = Turns(settings, demand, self.leases, self.notices)
        self.finished: list[dict[str, object]] = []
        """The last ones, predicted and measured."""
        self.asked = 0
        self.back_s = 0.0
        """When the coordinator came back from its last outage: before, it could not see sessions go on."""

    @property
    def books(self) -> Books | None:
        return self.leases.books

    @property
    def sessions(self) -> dict[str, Session]:
        return self.leases.sessions

    @property
    def waiting(self) -> Waiting:
        return self._turns.waiting

    @property
    def order(self) -> FairOrder:
        return self._turns.order

    def ask(self, client: str, asked: Open, now: float, *, group: str = "") -> None:
        """group: see SessionAsked."""
        known = self.sessions.get(asked.session_id)
        if known is not None:
            self._again(known, client, now)
            return
        session = self._new(client, asked, now, group)
        self._demand.arrived(client, session.prompt, session.output, now)
        self.leases.mend(now)
        self._turns.take(session, now)

    def cancel(self, client: str, session_id: str, now: float) -> None:
        """Of a session that waits, or was just admitted."""
        session = self.leases.own(client, session_id)
        if session is not None:
            self._drop(session, now)
            self._turns.freed({hop.peer_id for hop in session.chain}, now)

    def close(self, client: str, session_id: str, measured: Measured, now: float) -> None:
        session = self.leases.own(client, session_id)
        if session is None:
            return
        if session.admitted:
            self.finished.append(learn(self._demand, session, measured, now))
            del self.finished[: -self._settings.history]
            self.notices.counts["closed"] += 1
        self._drop(session, now)
        self._turns.freed({hop.peer_id for hop in session.chain}, now)

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
        self.leases.give_back(session, now)
        rows = {} if self.books is None else self.books.row
        session.chain = hops
        session.void = tuple(hop.peer_id for hop in hops if hop.peer_id not in rows)
        session.used = max(session.used, used)
        session.end_s = max(session.end_s, now + left_s(session, now))
        self.leases.write_down(session, now)

    def extend(self, client: str, session_id: str, max_length: int, now: float) -> None:
        """More tokens on the chain that it has, or not at all: it does not wait for them.

        A session that is not known here gets no answer.
        """
        session = self.leases.own(client, session_id)
        if session is None or self.books is None:
            return
        longer = math.ceil(session.batch * max(session.max_length, max_length) / self._settings.page_tokens)
        more = longer - self.leases.pages(session)
        if not self.books.could_hold(longer):
            why = "No servers have cache for a session of that length: stay with a shorter one."
            self.notices.denied(session_id, client, why)
            return
        if session.admitted and more > 0:
            wait_s = self.leases.wait_for_more_s(session, more, now)
            if wait_s > 0:
                why = "The servers of its chain have no cache for a longer session."
                self.notices.denied(session_id, client, why, wait_s)
                return
        if session.admitted:
            self.leases.give_back(session, now)
            session.max_length = max(session.max_length, max_length)
            self.leases.write_down(session, now)
            self.notices.admitted(session)
        else:
            session.max_length = max(session.max_length, max_length)
            self._turns.promise_from(self.waiting.place_of(session), now)
            if not session.admitted:
                self.notices.queued(session, self.waiting.place_of(session), now)

    def lose_client(self, client: str, now: float, why: str) -> None:
        """Its leases have run out."""
        self._end_all([each for each in self.sessions.values() if each.client == client], now, why)

    def keep_only(self, client: str, held: Container[str], asked_before_s: float, now: float) -> None:
        """The client has no other sessions of those that it was admitted with before an instant."""
        admitted = [each for each in self.sessions.values() if each.client == client and each.admitted]
        gone = [each for each in admitted if each.asked_s < asked_before_s and each.session_id not in held]
        self._end_all(gone, now, "its client has it no longer")

    def end(self, session: Session, now: float, why: str) -> None:
        """Give up a session."""
        if session.admitted:
            self.notices.ended(session, why)
        self._drop(session, now)
        self.waiting.stale = True

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
            self.leases.end_at(session, max(end_s, now + EARLY_S), now)
            self.waiting.stale = True

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
        self.leases.forget_closed(now)
        self.leases.mend(now)
        self._turns.tick(now)

    def freed(self, server: str, now: float) -> None:
        """It has more cache than before."""
        self._turns.freed({server}, now)

    def changed(self, now: float) -> None:
        """Servers offer something else, or other prices."""
        self._turns.changed(now)

    def rebuilt(self, books: Books | None, now: float) -> None:
        """There are new books: write everything down."""
        self.leases.books = books
        self.leases.rebuilt(now)
        self._turns.changed(now)

    def next_due_s(self) -> float:
        """When something is to happen by itself."""
        if not self.waiting.sessions:
            return float("inf")
        return min(self.waiting.next_start_s(), self.leases.next_end_s())

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

    def _drop(self, session: Session, now: float) -> None:
        del self.sessions[session.session_id]
        if session.admitted:
            self.leases.close(session, now)
        else:
            self._turns.give_up(session, now)

    def _end_all(self, sessions: list[Session], now: float, why: str) -> None:
        freed = set()
        for session in sessions:
            freed |= {hop.peer_id for hop in session.chain}
            self.end(session, now, why)
        self._turns.freed(freed, now)
