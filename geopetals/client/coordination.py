"""What a client has with its swarm's coordinator: leave for its sessions, and what it is told for bad times.

The coordinator is never on the way of a token. While it cannot be reached, sessions that run go on; new ones are told
so (ControlLost) and find their way alone, with the ticket that was issued for such times.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from hivemind.p2p import P2P

from geopetals.client.control_link import ControlLink, call
from geopetals.client.lease import Lease
from geopetals.coordinator.codec import MAX_ITEMS, Message
from geopetals.coordinator.messages import (
    VERSION,
    Admitted,
    Cancel,
    ChainHop,
    Close,
    Done,
    Extend,
    Extended,
    Hello,
    Links,
    LinkSample,
    LinksTaken,
    Open,
    Opened,
    Queued,
    Refused,
    Resume,
    Welcome,
)
from geopetals.errors import Busy, ControlLost, GeoPetalsError, NotAdmitted
from geopetals.swarm.control import ControlChannel
from geopetals.swarm.heartbeat import Every
from geopetals.swarm.membership import Membership

log = logging.getLogger(__name__)

Admission = tuple[bytes, tuple[ChainHop, ...]]
Measure = Callable[[tuple[str, ...]], Awaitable[tuple[LinkSample, ...]]]
_BUSY_LINKS_S, _IDLE_LINKS_S = 3.0, 15.0
_HELLO_S = 3600.0
_LAST_WORDS_S = 1.0
_KEPT_ENDS = 1024
_RESUMED_AT_ONCE = 128


class Coordination:
    """Lives on the event loop that made it. `standby`: the ticket for sessions while no coordinator answers."""

    def __init__(
        self,
        p2p: P2P,
        membership: Membership,
        *,
        on_connected: Callable[[], Awaitable[None]],
        measure: Measure,
        patience_s: float,
        queue_timeout_s: float,
    ) -> None:
        """`measure`: round trips to servers, those named among them. `patience_s`: how long a lost coordinator is
        waited for before sessions go without it.
        """
        coordinator = membership.token.coordinator
        assert coordinator is not None
        self._on_connected = on_connected
        self._membership, self._measure, self._queue_timeout_s = membership, measure, queue_timeout_s
        self.standby = b""
        self._leases: dict[str, Lease] = {}
        self._notices: dict[str, asyncio.Future[Admission]] = {}
        self._ends: deque[Close] = deque(maxlen=_KEPT_ENDS)
        self._probe: tuple[str, ...] = ()
        self._trust_version = 0
        self._is_known = False
        self._telling: set[asyncio.Task[None]] = set()
        self._link = ControlLink(
            p2p,
            coordinator.peer_id,
            coordinator.addresses,
            patience_s=patience_s,
            introduce=self._introduce,
            attend=self._attend,
            on_notify=self._on_notify,
        )
        self._link.start()

    @property
    def is_connected(self) -> bool:
        return self._link.channel is not None

    async def close(self) -> None:
        """Leave, after a moment for the coordinator to hear what is over."""
        if self._telling:
            await asyncio.wait(self._telling, timeout=_LAST_WORDS_S)
        await self._link.close()

    # -- sessions ------------------------------------------------------------------------------------------------------

    async def admit(self, lease: Lease, asked: Open) -> Admission:
        """A ticket and a chain, when it is the session's turn.

        Raises ControlLost if there is nobody to ask, Busy if the queue is full or does not move for too long, and what
        else the coordinator refuses with.
        """
        self._leases[asked.session_id] = lease
        try:
            async with asyncio.timeout(self._queue_timeout_s):
                return await self._admit(lease, asked)
        except TimeoutError:
            self._give_up(asked)
            later_s = None if lease.waiting is None else lease.waiting.start_in_s
            text = f"the session got no cache within {self._queue_timeout_s:.0f} s: try again later."
            raise Busy(text, retry_after_s=later_s) from None
        except asyncio.CancelledError:
            self._give_up(asked)
            raise
        except BaseException:
            self._leases.pop(asked.session_id, None)
            raise
        finally:
            self._notices.pop(asked.session_id, None)

    async def extend(self, session_id: str, max_length: int) -> bytes:
        """The ticket for a longer session. Raises ControlLost, or what the coordinator refuses with."""
        extend = Extend(session_id=session_id, max_length=max_length)
        return (await call(await self._link.reach(), "extend", extend, Extended)).ticket

    def end(self, close: Close) -> None:
        """The session is over: told now, or as soon as somebody is there to be told."""
        if self._leases.pop(close.session_id, None) is not None:
            self._tell("close", close)

    async def _admit(self, lease: Lease, asked: Open) -> Admission:
        while True:
            channel = await self._link.reach()
            try:
                return await self._ask(channel, lease, asked)
            except ControlLost as error:  # a coordinator that has been restarted does not know who waited
                channel.close()
                log.info("session.asks_again session=%s reason=%s", asked.session_id, error)

    async def _ask(self, channel: ControlChannel, lease: Lease, asked: Open) -> Admission:
        notice = self._notices[asked.session_id] = asyncio.get_running_loop().create_future()
        notice.add_done_callback(_look_at_outcome)
        opened = await call(channel, "open", asked, Opened)
        if opened.status == "admitted":
            return opened.ticket, opened.chain
        if not notice.done():
            lease.queued(opened.position, opened.start_in_s)
        lost = asyncio.create_task(channel.closed.wait())
        try:
            await asyncio.wait((notice, lost), return_when=asyncio.FIRST_COMPLETED)
        finally:
            lost.cancel()
        if notice.done():
            admission: Admission = notice.result()
            return admission
        raise ControlLost("the coordinator was lost while the session was queued.")

    def _give_up(self, asked: Open) -> None:
        if self._leases.pop(asked.session_id, None) is not None:
            self._tell("cancel", Cancel(session_id=asked.session_id))

    # -- what the coordinator says -------------------------------------------------------------------------------------

    def _on_notify(self, method: str, body: dict[str, Any]) -> None:
        if method == "admitted":
            admitted = Admitted.from_dict(body)
            notice = self._awaited(admitted.session_id)
            if notice is not None:
                notice.set_result((admitted.ticket, admitted.chain))
        elif method == "queue":
            queued = Queued.from_dict(body)
            if self._awaited(queued.session_id) is not None:
                self._leases[queued.session_id].queued(queued.position, queued.start_in_s)
        elif method == "refused":
            refused = Refused.from_dict(body)
            notice = self._awaited(refused.session_id)
            if notice is not None:
                notice.set_exception(Busy(refused.why, retry_after_s=refused.retry_after_s))
            elif (lease := self._leases.pop(refused.session_id, None)) is not None:
                log.info("session.lost session=%s reason=%s", refused.session_id, refused.why)
                lease.lose()

    def _awaited(self, session_id: str) -> "asyncio.Future[Admission] | None":
        notice = self._notices.get(session_id)
        return None if notice is None or notice.done() else notice

    # -- the channel ---------------------------------------------------------------------------------------------------

    async def _introduce(self, channel: ControlChannel) -> None:
        """Who this is, which of its sessions go on, which have ended, and how far away servers are."""
        await self._say_hello(channel)
        await self._on_connected()
        if self._is_known:
            await self._resume(channel)
        self._is_known = True
        while self._ends:
            await _tell(channel, "close", self._ends[0])
            self._ends.popleft()
        await self._send_links(channel)

    async def _resume(self, channel: ControlChannel) -> None:
        running = tuple(lease.running() for lease in self._leases.values() if lease.is_coordinated)
        names = (*self._leases, *(close.session_id for close in self._ends))
        held = names if len(names) <= MAX_ITEMS else None
        for first in range(0, max(len(running), 1), _RESUMED_AT_ONCE):
            await _tell(channel, "resume", Resume(sessions=running[first : first + _RESUMED_AT_ONCE], held=held))

    async def _say_hello(self, channel: ControlChannel) -> None:
        """By the certificate of last time, or by the token."""
        membership = self._membership
        hello = Hello(version=VERSION, role="client", certificate=membership.certificate)
        if membership.certificate:
            try:
                self._welcomed(await call(channel, "hello", hello, Welcome))
            except NotAdmitted as error:
                log.info("coordinator.certificate_refused reason=%s", error)
            else:
                return
        hello = replace(hello, token=membership.token.credential, certificate=b"")
        self._welcomed(await call(channel, "hello", hello, Welcome))

    def _welcomed(self, welcome: Welcome) -> None:
        self._membership.welcomed(welcome.certificate, welcome.trust)
        self._trust_version = welcome.trust_version
        self.standby = welcome.standby or self.standby

    async def _attend(self, channel: ControlChannel) -> None:
        hello_due = Every(_HELLO_S)
        hello_due.is_due(0)
        while True:
            pause_s = _BUSY_LINKS_S if self._leases else _IDLE_LINKS_S
            await asyncio.sleep(pause_s)
            trust_version = await self._send_links(channel)
            is_due = hello_due.is_due(pause_s)  # what it was given then expires some day
            if is_due or trust_version != self._trust_version:  # or its key is about to end
                await self._say_hello(channel)

    async def _send_links(self, channel: ControlChannel) -> int:
        """The version of the swarm's trust list now."""
        taken = await call(channel, "links", Links(links=await self._measure(self._probe)), LinksTaken)
        self._probe, self.standby = taken.probe, taken.standby or self.standby
        if taken.trust is not None:
            self._membership.heard(taken.trust)
        return taken.trust_version

    def _tell(self, method: str, message: Close | Cancel) -> None:
        """Without waiting. Ends of sessions are kept until they could be told."""
        channel = self._link.channel
        if channel is not None:
            task = asyncio.create_task(self._tell_or_keep(channel, method, message))
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)
        elif isinstance(message, Close):
            self._ends.append(message)

    async def _tell_or_keep(self, channel: ControlChannel, method: str, message: Close | Cancel) -> None:
        try:
            await _tell(channel, method, message)
        except ControlLost:
            if isinstance(message, Close):
                self._ends.append(message)


async def _tell(channel: ControlChannel, method: str, message: Message) -> None:
    """Raises ControlLost. That the coordinator does not want to hear it is no failure here."""
    try:
        await call(channel, method, message, Done)
    except ControlLost:
        raise
    except GeoPetalsError as error:
        log.info("coordinator.refused method=%s reason=%s", method, error)


def _look_at_outcome(notice: "asyncio.Future[Admission]") -> None:
    """Nobody may wait for it any more; Python would report that as never retrieved."""
    if not notice.cancelled():
        notice.exception()
