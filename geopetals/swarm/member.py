"""A server's conversation with its coordinator: joins, says what it is and has, and does as it is told.

The coordinator may go and come back at any time: the server goes on serving what it holds, calls until it is heard, and
then says what it has, so that nothing is loaded twice.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from geopetals.coordinator.messages import (
    REPORT_S,
    VERSION,
    Assign,
    CacheUse,
    Hello,
    Limits,
    Profile,
    Register,
    Registered,
    Report,
    Reported,
    SessionUse,
    Span,
    Welcome,
)
from geopetals.errors import Busy, ControlLost, GeoPetalsError, NotAdmitted, SwarmFailure, SwarmMismatch
from geopetals.progress import Reporter
from geopetals.swarm.assignments import Assignments
from geopetals.swarm.control import ControlChannel, dial
from geopetals.swarm.identity import ModelIdentity
from geopetals.swarm.membership import Membership
from geopetals.swarm.place import Place
from geopetals.swarm.probing import Prober
from geopetals.swarm.redial import connect
from geopetals.swarm.relay_protocol import UNREACHABLE
from geopetals.swarm.ring_messages import VERSION as WIRE_VERSION
from geopetals.swarm.service import Service
from geopetals.swarm.wire import WireError

log = logging.getLogger(__name__)

_FIRST_DELAY_S, _LONGEST_DELAY_S, _REFUSED_DELAY_S = 0.2, 3.0, 30.0
_FAREWELL_S = 1.0
_HELLO_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Self:
    """What the server says of itself at each registration."""

    identity: ModelIdentity
    profile: Profile
    limits: Limits
    name: str


class Member:
    """One server's membership; `run()` keeps it up."""

    def __init__(
        self,
        membership: Membership,
        self_description: Self,
        *,
        place: Place,
        service: Service,
        assignments: Assignments,
        reporter: Reporter,
        on_connected: Callable[[], Awaitable[None]],
    ) -> None:
        """`on_connected` is called after each registration."""
        assert membership.token.coordinator is not None
        self._membership, self._self = membership, self_description
        self._coordinator = membership.token.coordinator
        self._place, self._service, self._assignments = place, service, assignments
        self._reporter, self._on_connected = reporter, on_connected
        self._prober = Prober(lambda: place.network)
        self._changed = asyncio.Event()
        self._channel: ControlChannel | None = None
        self._greeting: asyncio.Task[None] | None = None
        self._is_member = self._is_told = self._is_leaving = False
        self._delay_s = _FIRST_DELAY_S
        self._said_hello_at, self._trust_version = 0.0, 0

    def links(self) -> dict[str, float]:
        """Round trips in seconds that were measured lately, by peer id."""
        return {sample.peer_id: sample.rtt_s for sample in self._prober.samples()}

    def changed(self) -> None:
        """Report soon."""
        self._changed.set()

    async def run(self) -> None:
        """Until cancelled, or `leave()` is called.

        Raises NotAdmitted and SwarmMismatch if the server may not join in the first place.
        """
        probing = asyncio.create_task(self._prober.run())
        try:
            await self._keep_calling()
        finally:
            for task in (probing, self._greeting):
                if task is not None:
                    task.cancel()

    async def leave(self) -> None:
        """Say goodbye, if anybody listens, and nothing more."""
        self._is_leaving = True
        if self._channel is not None and not self._channel.closed.is_set():
            with contextlib.suppress(GeoPetalsError, ValueError):
                await self._channel.call("leave", {}, timeout_s=_FAREWELL_S)

    async def _keep_calling(self) -> None:
        while not self._is_leaving:
            try:
                await self._call()
            except (NotAdmitted, SwarmMismatch) as error:
                if not self._is_member:
                    raise
                self._reporter.line(f"the coordinator refuses this server: {error}")
                self._delay_s = _REFUSED_DELAY_S
            except (SwarmFailure, ValueError, OSError, *UNREACHABLE) as error:
                self._tell_lost(error)
            await asyncio.sleep(self._delay_s * random.uniform(0.5, 1.0))
            self._delay_s = min(2 * self._delay_s, _LONGEST_DELAY_S)

    async def _call(self) -> None:
        self._channel = channel = await self._dial()
        try:
            await self._converse(channel)
        finally:
            channel.close()

    def _tell_lost(self, error: Exception) -> None:
        log.info("coordinator.lost reason=%.300s", error)
        if not self._is_told:
            what = "serving on without it" if self._service.holding is not None else "trying again"
            self._reporter.line(f"the coordinator does not answer ({str(error).rstrip('.')}): {what}")
        self._is_told = True

    async def _dial(self) -> ControlChannel:
        p2p = self._place.network.p2p
        await connect(p2p, self._coordinator.addresses)
        return await dial(p2p, self._coordinator.peer_id, on_call=self._on_call, on_notify=_ignore)

    async def _converse(self, channel: ControlChannel) -> None:
        """Until the channel ends: raises ControlLost, or what the coordinator refuses with."""
        await self._say_hello(channel)
        await self._register(channel)
        while not self._is_leaving:
            trust_version = await self._report(channel)
            await self._renew_certificate(channel, trust_version)
            try:
                async with asyncio.timeout(REPORT_S):
                    await self._changed.wait()
            except TimeoutError:
                continue

    async def _say_hello(self, channel: ControlChannel) -> None:
        token, certificate = self._membership.token.credential, self._membership.certificate
        hello = Hello(version=VERSION, role="server", token=token, certificate=certificate)
        try:
            raw = await channel.call("hello", hello.to_dict())
        except NotAdmitted:
            if not certificate:
                raise
            self._membership.certificate = b""  # it may have expired: the token itself is asked next
            raise ControlLost("the coordinator does not take the certificate any more.") from None
        welcome = Welcome.from_dict(raw)
        conflict = self._self.identity.conflict(ModelIdentity.from_dict(welcome.identity))
        if conflict is not None:
            raise SwarmMismatch(f"the coordinator's model is another one: {conflict}")
        self._membership.welcomed(welcome.certificate, welcome.trust)
        self._is_member = True
        self._said_hello_at, self._trust_version = time.monotonic(), welcome.trust_version

    async def _renew_certificate(self, channel: ControlChannel, trust_version: int) -> None:
        """From time to time, since it expires; and when trust has changed: its key may be about to end."""
        is_old = time.monotonic() - self._said_hello_at > _HELLO_S
        if self._is_leaving or not (is_old or trust_version != self._trust_version):
            return
        before = self._membership.certificate
        try:
            await self._say_hello(channel)
        except Busy as error:  # after the next report, then
            log.info("certificate.not_renewed reason=%s", error)
            return
        log.info("certificate.renewed trust=%d", self._trust_version)
        if self._membership.certificate != before:
            self._start_greeting()

    async def _register(self, channel: ControlChannel) -> None:
        network, standing, held = self._place.network, self._assignments.standing, self._service.holding
        register = Register(
            profile=self._self.profile,
            limits=self._self.limits,
            held=None if held is None else Span(*held.span),
            epoch=standing.epoch,
            name=self._self.name,
            addresses=await network.addresses(),
            relayed=network.is_relayed,
            wire=WIRE_VERSION,
        )
        answer = Registered.from_dict(await channel.call("register", register.to_dict()))
        self._reporter.line(_what_now(answer, held is None))
        self._assignments.adopt(answer)
        self._prober.want(answer.probe)
        self._is_told, self._delay_s = False, _FIRST_DELAY_S
        self._start_greeting()

    def _start_greeting(self) -> None:
        if self._greeting is not None:
            self._greeting.cancel()
        self._greeting = asyncio.create_task(self._greet())

    async def _greet(self) -> None:
        """Beside the conversation: peers that do not answer make it take long."""
        try:
            await self._on_connected()
        except Exception as error:  # noqa: BLE001 - records are renewed in the next round in any case
            log.warning("greeting.failed reason=%r", error)

    async def _report(self, channel: ControlChannel) -> int:
        """The version of the swarm's trust list now."""
        self._changed.clear()
        answer = Reported.from_dict(await channel.call("report", self._report_now().to_dict()))
        if answer.trust is not None:
            self._membership.heard(answer.trust)
        self._prober.want(answer.probe)
        if not answer.known and not self._is_leaving:
            await self._register(channel)
        return answer.trust_version

    def _report_now(self) -> Report:
        standing, is_more = self._assignments.next_to_tell()
        if is_more:
            self._changed.set()
        load_s, bytes_loaded = standing.loaded if standing.loaded is not None else (None, None)
        return Report(
            epoch=standing.epoch,
            state=standing.state,
            span=standing.span,
            error=standing.error,
            cache=CacheUse(**self._service.cache()),
            sessions=tuple(SessionUse(*held) for held in self._service.sessions()),
            links=self._prober.samples(),
            rates=self._service.rates.samples(),
            load_s=load_s,
            bytes_loaded=bytes_loaded,
        )

    async def _on_call(self, method: str, body: dict[str, Any]) -> dict[str, Any]:
        if method != "assign":
            raise WireError(f"a server does not answer {method[:40]!r}")
        answer = self._assignments.accept(Assign.from_dict(body))
        return answer.to_dict()


def _what_now(answer: Registered, holds_nothing: bool) -> str:
    if answer.span is None:
        return "registered: " + ("waiting for blocks to serve" if holds_nothing else "serving on as before")
    return f"registered: blocks {answer.span.start}:{answer.span.end} ({answer.reason})"


def _ignore(method: str, body: dict[str, Any]) -> None:
    """There is nothing yet that a coordinator tells without asking."""
