"""What members ask for, by role, turned into events."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import msgpack

from geopetals import metrics
from geopetals.coordinator import messages as m
from geopetals.coordinator.codec import Message, MessageError
from geopetals.coordinator.core import actions as act
from geopetals.coordinator.core import events as ev
from geopetals.coordinator.engine import Engine, Unfit
from geopetals.coordinator.entrance import Entrance
from geopetals.coordinator.members import Member, Members
from geopetals.coordinator.orders import Orders, assign_message
from geopetals.coordinator.trimmed import MAX_RESUMED, trimmed_links, trimmed_register, trimmed_report
from geopetals.credentials.refusal import Refusal, refused
from geopetals.credentials.ticket import TicketKind
from geopetals.errors import Busy, NoChain, NotAdmitted, ServerRefused
from geopetals.swarm.wire import short_peer

log = logging.getLogger(__name__)

_COSTS = {"extend": 8.0}
"""Calls that cost more than one, for they may promise the whole queue anew."""
_MAX_UNFIT = 3

Method = Callable[[Member, dict[str, Any]], Awaitable[Message]]


class Desk:
    """Serves members that have said hello. Everything runs on the event loop."""

    def __init__(self, engine: Engine, entrance: Entrance, members: Members) -> None:
        self._engine, self._entrance, self._members = engine, entrance, members
        self._orders = Orders(engine, entrance, members)
        self.perform = self._orders.perform
        self._is_stopping = False
        self._methods: dict[str, dict[str, Method]] = {
            "server": {"register": self._register, "report": self._report, "leave": self._leave},
            "client": {
                "open": self._open,
                "extend": self._extend,
                "close": self._close,
                "cancel": self._cancel,
                "resume": self._resume,
                "links": self._links,
            },
        }

    async def call(self, member: Member, method: str, body: dict[str, Any]) -> dict[str, Any]:
        """Raises GeoPetalsError or MessageError."""
        function = self._methods.get(member.role, {}).get(method)
        if function is None:
            raise ServerRefused(f"the coordinator does not answer {method[:40]!r} of a {member.role}.")
        now = self._engine.now()
        member.allowance.take(now, _COSTS.get(method, 1.0))
        member.traffic.take(now, len(msgpack.packb(body)))
        if method == "register":
            self._members.take_registration(member.peer_id, now)
        try:
            return (await function(member, body)).to_dict()
        except Unfit as error:
            self._note_unfit(member, method)
            raise ServerRefused(str(error)) from None

    def _note_unfit(self, member: Member, method: str) -> None:
        """Refusing costs us a lot: who makes us do it again and again has to stay away for a while."""
        member.unfit += 1
        log.warning("member.unfit peer=%s method=%s", short_peer(member.peer_id), method)
        if method == "register" or member.unfit >= _MAX_UNFIT:
            self._members.shun(member.peer_id, self._engine.now())
            asyncio.get_running_loop().call_soon(member.channel.close)

    def enter(self, member: Member) -> None:
        if member.role == "client":
            self._engine.apply(ev.ClientSeen(client=member.peer_id))

    def lose(self, member: Member) -> None:
        """Its channel is gone. A server may be known from an earlier channel though it did not register on this one."""
        if self._is_stopping:
            return
        if member.role == "client":
            self._engine.apply(ev.ClientLost(client=member.peer_id))
        elif member.role == "server":
            self._engine.apply(ev.ServerLost(peer=member.peer_id))

    def stop(self) -> None:
        """From now on it is we who leave: nobody is lost any more."""
        self._is_stopping = True

    def expel_revoked(self) -> None:
        """End the channels of members whose join token was revoked, or whose certificate has expired.

        These are only lost, and may be back with another one in a moment.
        """
        revoked, now = self._entrance.authority.trust.revoked, self._entrance.now()
        for member in self._members.where(lambda member: member.token_id in revoked):
            self._expel(member)
        for member in self._members.where(lambda member: now > member.expires_at):
            log.info("member.expired peer=%s role=%s", short_peer(member.peer_id), member.role)
            member.channel.close()

    def _expel(self, member: Member) -> None:
        log.info("member.expelled peer=%s role=%s", short_peer(member.peer_id), member.role)
        if member.role == "server":
            member.is_registered = False
            self._engine.apply(ev.ServerLeft(peer=member.peer_id))
        member.channel.close()

    async def _register(self, member: Member, body: dict[str, Any]) -> m.Registered:
        register = trimmed_register(m.Register.from_dict(body))
        with self._orders.registering.wait(member.peer_id) as assigned:
            await self._engine.settle(ev.ServerRegistered(peer=member.peer_id, register=register))
        if not self._engine.core.knows(member.peer_id):
            raise ServerRefused("the coordinator cannot plan with this profile: `geopetals plan --live --explain`.")
        member.is_registered, member.name = True, register.name
        log.info("member.registered peer=%s held=%s", short_peer(member.peer_id), register.held)
        if assigned.latest is None:
            epoch, span = self._engine.core.assignment(member.peer_id)
            answer = m.Assign(epoch=epoch, span=span, reason="as it is", drain_s=0.0)
        else:
            answer = assign_message(assigned.latest)
        member.assigned, member.assigned_at = answer, self._engine.now()
        return m.Registered(epoch=answer.epoch, span=answer.span, reason=answer.reason, probe=member.take_probes())

    async def _report(self, member: Member, body: dict[str, Any]) -> m.Reported:
        report = trimmed_report(m.Report.from_dict(body), self._engine.core.knows)
        trust, version = self._news(member)
        if not member.is_registered or not self._engine.core.hears(member.peer_id):
            return m.Reported(trust_version=version, trust=trust, known=False)
        if not self._engine.apply(ev.ServerReported(peer=member.peer_id, report=report)):
            raise Unfit("the coordinator cannot work with this report.")
        self._orders.repeat_assignment(member, report)
        return m.Reported(trust_version=version, trust=trust, probe=member.take_probes())

    async def _leave(self, member: Member, body: dict[str, Any]) -> m.Done:
        if member.is_registered:
            member.is_registered = False
            await self._engine.settle(ev.ServerLeft(peer=member.peer_id))
        return m.Done()

    async def _open(self, member: Member, body: dict[str, Any]) -> m.Opened:
        request = m.Open.from_dict(body)
        request = replace(request, links=trimmed_links(request.links, self._engine.core.knows))
        event = ev.SessionAsked(client=member.peer_id, open=request, group=member.token_id)
        with metrics.DECISION_SECONDS.time():
            action = await self._ask((member.peer_id, request.session_id), event)
            if isinstance(action, act.Refused):
                raise (
                    NoChain(action.why)
                    if action.is_incomplete
                    else Busy(action.why, retry_after_s=action.retry_after_s)
                )
            if isinstance(action, act.Queued):
                return m.Opened(status="queued", position=action.position, start_in_s=action.start_in_s)
            ticket = self._entrance.ticket(action, member.token_id)
        return m.Opened(status="admitted", ticket=ticket, chain=action.chain, predicted=action.predicted)

    async def _extend(self, member: Member, body: dict[str, Any]) -> m.Extended:
        request = m.Extend.from_dict(body)
        event = ev.SessionExtended(client=member.peer_id, session_id=request.session_id, max_length=request.max_length)
        action = await self._ask((member.peer_id, request.session_id), event)
        if isinstance(action, act.Admitted):
            return m.Extended(ticket=self._entrance.ticket(action, member.token_id))
        if isinstance(action, act.Refused):
            raise Busy(action.why, retry_after_s=action.retry_after_s)
        raise Busy("the session still waits.", retry_after_s=action.start_in_s)

    async def _close(self, member: Member, body: dict[str, Any]) -> m.Done:
        request = m.Close.from_dict(body)
        closed = ev.SessionClosed(client=member.peer_id, session_id=request.session_id, measured=request.measured)
        await self._engine.settle(closed)
        return m.Done()

    async def _cancel(self, member: Member, body: dict[str, Any]) -> m.Done:
        request = m.Cancel.from_dict(body)
        await self._engine.settle(ev.SessionCancelled(client=member.peer_id, session_id=request.session_id))
        return m.Done()

    async def _resume(self, member: Member, body: dict[str, Any]) -> m.Done:
        events = []
        request = m.Resume.from_dict(body)
        for running in request.sessions[:MAX_RESUMED]:
            member.allowance.take(self._engine.now())
            try:
                events.append(self._resumed(member, running))
            except (NotAdmitted, MessageError) as error:
                log.info("session.not_resumed session=%.64s why=%s", running.session_id, error)
        await asyncio.gather(*map(self._engine.settle, events))
        if request.held is not None:
            held = tuple(name for name in request.held if len(name) <= m.MAX_SESSION_ID)
            event = ev.SessionsHeld(client=member.peer_id, sessions=held, asked_before_s=member.since)
            await self._engine.settle(event)
        return m.Done()

    def _resumed(self, member: Member, running: m.RunningSession) -> ev.SessionResumed:
        """Raises NotAdmitted or MessageError for what is no session that we have admitted, or is at no server that we
        know.
        """
        ticket = self._entrance.read_ticket(running.ticket, member.peer_id)
        if ticket.kind is not TicketKind.SESSION or ticket.session_id != running.session_id:
            raise refused(Refusal.FORGED, "the ticket is of another session.")
        for hop in running.chain:
            m.check_shown(hop.peer_id, "a peer id", m.MAX_PEER_ID)
        if not any(self._engine.core.knows(hop.peer_id) for hop in running.chain):
            raise refused(Refusal.WRONG_BLOCKS, "no server of its chain is known here.")
        return ev.SessionResumed(
            client=member.peer_id,
            session_id=running.session_id,
            batch=ticket.batch,
            max_length=ticket.max_length,
            chain=running.chain,
            tokens_used=running.tokens_used,
        )

    async def _links(self, member: Member, body: dict[str, Any]) -> m.LinksTaken:
        links = trimmed_links(m.Links.from_dict(body).links, self._engine.core.knows)
        self._engine.apply(ev.LinksMeasured(peer=member.peer_id, links=links))
        trust, version = self._news(member)
        standby = b"" if trust is None else self._entrance.standby(member.peer_id, member.token_id)
        return m.LinksTaken(trust_version=version, trust=trust, standby=standby, probe=member.take_probes())

    async def _ask(self, key: tuple[str, str], event: ev.Event) -> act.Admitted | act.Queued | act.Refused:
        with self._orders.answers.wait(key) as answer:
            await self._engine.settle(event)
        if answer.latest is None:
            raise ServerRefused("the coordinator does not know this session: ask for it by `open`.")
        return answer.latest

    def _news(self, member: Member) -> tuple[bytes | None, int]:
        """The trust list, if it is another than the member was last sent, and its version."""
        signed = self._entrance.authority.signed_trust()
        version = self._entrance.authority.trust.version
        if signed == member.trust:
            return None, version
        member.trust = signed
        return signed, version
