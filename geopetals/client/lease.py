"""A session's leave to hold attention cache: asked for once, prolonged as the session grows, given back at its end.

Where the swarm has a coordinator that answers, it is a ticket for this session, with a chain of servers as advice;
where none does, a ticket for times without one; in a swarm without coordinators, nothing.
"""

import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from geopetals.client.routing import Hop
from geopetals.coordinator.messages import ChainHop, Close, Measured, Open, RunningSession
from geopetals.credentials.refusal import Refusal
from geopetals.errors import Busy, ControlLost, NotAdmitted, ServerRefused, SwarmFailure

if TYPE_CHECKING:
    from geopetals.client.coordination import Coordination

log = logging.getLogger(__name__)

_LEAST_MORE_TOKENS, _SHARE, _FEW_MORE_TOKENS = 256, 4, 32
"""How much more than it needs now a session asks for, so that it need not ask at every token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """Why a session has no cache yet. `position` in the coordinator's queue, 0 is next; `start_in_s` is predicted."""

    position: int | None = None
    start_in_s: float | None = None

    def __str__(self) -> str:
        where = "waiting for attention cache" if self.position is None else f"queued: {_ordinal(self.position + 1)}"
        return where if self.start_in_s is None else f"{where}, starts in about {self.start_in_s:.0f} s"


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


class Stopwatch:
    """What a session's user sees of time: from asking for a place to the first token, and from one to the next."""

    def __init__(self) -> None:
        self._asked = self._admitted = self._last = time.monotonic()
        self._first: float | None = None
        self._decode_s = 0.0
        self.tokens = self.failovers = 0

    def asked(self) -> None:
        self._asked = self._admitted = time.monotonic()

    def admitted(self) -> None:
        self._admitted = time.monotonic()

    def step(self, took_s: float) -> None:
        """A step ended just now."""
        self.tokens += 1
        self._last = time.monotonic()
        if self._first is None:
            self._first = self._last
        else:
            self._decode_s += took_s

    def measured(self) -> Measured:
        first = self._first
        return Measured(
            ttft_s=None if first is None else first - self._asked,
            tpot_s=self._decode_s / (self.tokens - 1) if self.tokens > 1 else None,
            tokens=self.tokens,
            wait_s=self._admitted - self._asked,
            end_to_end_s=None if first is None else self._last - self._asked,
            failovers=self.failovers,
        )


class Lease:
    """Of one session, or of several that are opened together and share it. Lives on the event loop."""

    def __init__(
        self,
        coordination: "Coordination | None",
        *,
        output_tokens: int | None = None,
        on_wait: Callable[[Waiting], object] | None = None,
    ) -> None:
        """`output_tokens`: how many the session will generate, if that is known."""
        self._coordination = coordination
        self._on_wait = on_wait
        self.output_tokens = output_tokens
        self.session_id = uuid.uuid4().hex
        self.ticket = b""
        self.advice: tuple[ChainHop, ...] = ()
        self.max_length = self._needed = 0
        self._is_outgrown = self.is_lost = False
        self.is_decided = False
        self.waiting: Waiting | None = None
        self.route: tuple[Hop, ...] = ()
        self.tokens_used = 0
        self.clock = Stopwatch()

    @property
    def credential(self) -> bytes:
        """For servers: the ticket of this session, or one for any session."""
        standby = b"" if self._coordination is None else self._coordination.standby
        return standby if self._is_outgrown and standby else self.ticket or standby

    @property
    def is_coordinated(self) -> bool:
        """Whether the coordinator has admitted the session."""
        return bool(self.ticket)

    async def decide(self, *, batch: int, max_length: int, prompt_tokens: int) -> None:
        """Ask the coordinator once, and wait for its leave; without one, decide to go without.

        Raises Busy, NotAdmitted or SwarmFailure. To cancel it gives the place in the queue up.
        """
        if self.is_decided:
            return
        self.clock.asked()
        if self._coordination is not None:
            asked = Open(
                session_id=self.session_id,
                batch=batch,
                max_length=max_length,
                prompt_tokens=prompt_tokens,
                output_tokens=self.output_tokens,
            )
            try:
                self.ticket, self.advice = await self._coordination.admit(self, asked)
            except ControlLost as error:
                log.warning("session.local reason=%s", error)
            except BaseException:
                self.forget()
                raise
            finally:
                self.waiting = None
        self.max_length, self.is_decided = max_length, True
        self.clock.admitted()

    def queued(self, position: int, start_in_s: float) -> None:
        self.wait(Waiting(position=position, start_in_s=start_in_s))

    def wait(self, waiting: Waiting) -> None:
        """Show the session's user what it waits for."""
        self.waiting = waiting
        log.info("session.waiting session=%s %s", self.session_id, waiting)
        if self._on_wait is not None:
            self._on_wait(waiting)

    async def extend(self, max_length: int) -> bool:
        """Have the ticket cover so many tokens; returns whether there is a new one. Raises Busy where there is no cache
        for them.

        Without a coordinator servers decide themselves whether they have room.
        """
        self._needed = max_length
        if not self.ticket or self.is_lost or max_length <= self.max_length:
            return False
        for more in (max(_LEAST_MORE_TOKENS, max_length // _SHARE), _FEW_MORE_TOKENS):
            try:
                return await self._extend(max_length + more)
            except Busy as error:
                log.debug("session.not_extended session=%s tokens=%d reason=%s", self.session_id, more, error)
        return await self._extend(max_length)

    async def renew_for(self, error: SwarmFailure) -> None:
        """If a server refused a ticket that has expired, as its key may, or is for less than is needed, get another;
        without the coordinator, the one for such times has to do. A session that it has given up asks for a place anew
        instead.
        """
        if not self.ticket or self.is_lost or not isinstance(error, NotAdmitted):
            return
        if error.reason in (Refusal.EXPIRED, Refusal.TOO_LARGE, Refusal.UNKNOWN_KEY):
            self._is_outgrown = not await self._extend(max(self._needed, self.max_length))

    async def _extend(self, max_length: int) -> bool:
        assert self._coordination is not None
        try:
            self.ticket = await self._coordination.extend(self.session_id, max_length)
        except (ControlLost, ServerRefused) as error:  # servers go by the ticket that there is
            log.info("session.not_extended session=%s reason=%s", self.session_id, error)
            return False
        self.max_length = max_length
        return True

    def running(self) -> RunningSession:
        chain = tuple(ChainHop(hop.peer_id, hop.start, hop.end) for hop in self.route)
        return RunningSession(session_id=self.session_id, ticket=self.ticket, chain=chain, tokens_used=self.tokens_used)

    def close(self) -> None:
        """Give the cache back. From the event loop; more than once does no harm."""
        if self._coordination is not None and self.ticket:
            self._coordination.end(Close(session_id=self.session_id, measured=self.clock.measured()))
        self.forget()

    def lose(self) -> None:
        """The coordinator has given the session up, as one that was idle for long. What the servers hold stays."""
        self.is_lost = True

    def forget(self) -> None:
        """Be as new: to be decided again."""
        self.session_id = uuid.uuid4().hex
        self.ticket, self.advice, self.is_decided = b"", (), False
        self._is_outgrown = self.is_lost = False
