"""Who may use a block server: everybody, or those whom the swarm's coordinator has let in.

Checked offline at every entry: the opening of a session, passes without a cache, and PETALS' own pushes. A push stream
needs no credential of its own: the client of a session that was admitted has named the one peer that may push into it.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, Protocol

from geopetals.credentials.certificate import Certificate, Role
from geopetals.credentials.refusal import Refusal, refused
from geopetals.credentials.ticket import Ticket, TicketKind
from geopetals.credentials.trust import Trust, TrustSource
from geopetals.errors import NotAdmitted

_PREDECESSOR_TIMEOUT_S = 2.0
"""A client that recovers may open a part of its chain anew before this server has seen the old part's end. It hears
nothing meanwhile, which must not last longer than it takes a silent server for dead."""
_MAY_COMPUTE = (Role.CLIENT, Role.ADMIN, Role.SERVER)


class Grant:
    """Leave for one session on this server; `ticket` is None where none is asked for.

    `on_revoked` is called when it ends before the session does.
    """

    def __init__(self, ticket: Ticket | None = None, *, span: range = range(0), batch: int = 1, max_length: int = 0):
        self.ticket = ticket
        self.on_revoked: Callable[[NotAdmitted], None] | None = None
        self._span, self._batch, self._max_length = span, batch, max_length
        self._others: list[Grant] = []

    @property
    def session_id(self) -> str:
        """What the swarm calls the session; empty if its ticket does not say."""
        if self.ticket is None or self.ticket.kind is not TicketKind.SESSION:
            return ""
        return self.ticket.session_id

    def longest(self, limit: int) -> int:
        """How many tokens each sequence of the session may have, `limit` where the ticket does not say less."""
        if self.ticket is None:
            return limit
        return min(limit, max(self._max_length, self._left(self.ticket) // self._batch))

    def grown(self, max_length: int) -> None:
        """The session holds this many tokens for each sequence now."""
        self._max_length = max_length

    def check(self) -> None:
        """Raises NotAdmitted if other sessions with the ticket leave too little of it."""
        ticket = self.ticket
        if ticket is None or self._tokens <= self._left(ticket):
            return
        raise refused(Refusal.REPLAYED, "the ticket is in use: its tokens are taken by a session that is open here.")

    @property
    def _tokens(self) -> int:
        return self._batch * self._max_length

    def _left(self, ticket: Ticket) -> int:
        taken = sum(other._tokens for other in self._others if other is not self and _overlap(other._span, self._span))
        return ticket.batch * ticket.max_length - taken

    def extend(self, credential: bytes) -> None:
        """Take another ticket for the same session in the place of this one. Raises NotAdmitted."""
        return


class Gate(Protocol):
    """Asked at every entry of a server. All methods raise NotAdmitted with the reason."""

    def opening(
        self, peer_id: str, credential: bytes, *, span: range, batch: int, max_length: int
    ) -> AbstractAsyncContextManager[Grant]:
        """Leave for a session of `batch` sequences, held inside the block."""
        ...

    def admit_pass(self, peer_id: str, credential: bytes) -> None:
        """A forward or backward pass without a cache."""
        ...

    def admit_push(self, peer_id: str) -> None:
        """A step that is pushed as PETALS does, with no word of who the client is."""
        ...


class OpenGate:
    """Lets everybody in. Credentials are heeded nevertheless: a ticket says what a session is called."""

    def __init__(self, tickets: "TicketGate | None" = None) -> None:
        """`tickets` checks those that are shown; None ignores them."""
        self._tickets = tickets

    @asynccontextmanager
    async def opening(
        self, peer_id: str, credential: bytes, *, span: range, batch: int, max_length: int
    ) -> AsyncIterator[Grant]:
        if self._tickets is None or not credential:
            yield Grant()
            return
        async with self._tickets.opening(peer_id, credential, span=span, batch=batch, max_length=max_length) as grant:
            yield grant

    def admit_pass(self, peer_id: str, credential: bytes) -> None:
        return

    def admit_push(self, peer_id: str) -> None:
        return


class TicketGate:
    """Lets in who shows a ticket, or for passes a membership certificate, of a swarm and model. On the event loop."""

    def __init__(
        self, trust: TrustSource, *, swarm: str, model_digest: bytes, clock: Callable[[], float] = time.time
    ) -> None:
        self._trust, self._swarm, self._digest, self._clock = trust, swarm, model_digest, clock
        self._open: dict[tuple[str, str], list[Grant]] = {}
        self._released = asyncio.Event()
        self._stop_listening = trust.listen(self._trust_changed)

    def close(self) -> None:
        self._stop_listening()

    @asynccontextmanager
    async def opening(
        self, peer_id: str, credential: bytes, *, span: range, batch: int, max_length: int
    ) -> AsyncIterator[Grant]:
        grant = _TicketGrant(self, self._read(peer_id, credential), span=span, batch=batch, max_length=max_length)
        grant.check_size()
        await self._wait_for_predecessor(grant)
        try:
            yield grant
        finally:
            self._release(grant)

    def admit_pass(self, peer_id: str, credential: bytes) -> None:
        if not credential:
            raise refused(Refusal.MISSING, "this swarm is closed: passes need a membership certificate.")
        certificate = Certificate.verify(credential, self._trust.current, now=self._clock(), peer_id=peer_id)
        if certificate.role not in _MAY_COMPUTE:
            raise refused(Refusal.WRONG_ROLE, f"a {certificate.role.value} may not compute on this server.")

    def admit_push(self, peer_id: str) -> None:
        raise refused(Refusal.MISSING, "this swarm is closed: it takes no pushes in the way of stock PETALS.")

    def _read(self, peer_id: str, credential: bytes) -> Ticket:
        if not credential:
            raise refused(Refusal.MISSING, "this swarm is closed: a session needs a ticket from its coordinator.")
        return Ticket.verify(
            credential,
            self._trust.current,
            now=self._clock(),
            peer_id=peer_id,
            swarm=self._swarm,
            model_digest=self._digest,
        )

    async def _wait_for_predecessor(self, grant: "_TicketGrant") -> None:
        """Let in as soon as there is enough left of the ticket; raises NotAdmitted if that takes too long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_PREDECESSOR_TIMEOUT_S):
                while not self._hold_if_enough(grant):
                    self._released.clear()
                    await self._released.wait()
                return
        if not self._hold_if_enough(grant):  # both may have come at once: the end of the time, and a release
            grant.check()

    def _hold_if_enough(self, grant: "_TicketGrant") -> bool:
        grants = self._open.setdefault(grant.key, [])
        grant._others = grants
        with suppress(NotAdmitted):
            grant.check()
            grants.append(grant)
            return True
        return False

    def _release(self, grant: "_TicketGrant") -> None:
        grants = self._open[grant.key]
        grants.remove(grant)
        if not grants:
            del self._open[grant.key]
        self._released.set()

    def _trust_changed(self, trust: Trust) -> None:
        for grant in [grant for grants in self._open.values() for grant in grants]:
            try:
                assert grant.ticket is not None
                trust.check_token(grant.ticket.token_id, "session")
            except NotAdmitted as error:
                if grant.on_revoked is not None:
                    grant.on_revoked(error)


class _TicketGrant(Grant):
    ticket: Ticket

    def __init__(self, gate: TicketGate, ticket: Ticket, **session: Any) -> None:
        super().__init__(ticket, **session)
        self._gate = gate

    @property
    def key(self) -> tuple[str, str]:
        """Of those that share a ticket, and its later ones for more tokens."""
        return self.ticket.client_peer_id, self.ticket.session_id

    def check_size(self) -> None:
        """Raises NotAdmitted if the ticket does not cover the session, whoever else uses it."""
        first, end = self.ticket.blocks
        if self._span.start < first or self._span.stop > end:
            raise refused(Refusal.WRONG_BLOCKS, f"the ticket is for blocks {first}:{end}, not for those asked for.")
        most = self.ticket.batch * self.ticket.max_length
        if self._tokens > most:
            raise refused(Refusal.TOO_LARGE, f"the ticket is for {most} tokens, the session asks for {self._tokens}.")

    def extend(self, credential: bytes) -> None:
        newer = self._gate._read(self.ticket.client_peer_id, credential)
        if newer.session_id != self.ticket.session_id or newer.kind is not self.ticket.kind:
            raise refused(Refusal.REPLAYED, "the ticket is for another session than the one that is open.")
        self.ticket = newer


def _overlap(one: range, other: range) -> bool:
    return one.start < other.stop and other.start < one.stop
