"""What members ask for, by role, turned into events; and actions turned into answers, calls and notifications."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from geopetals import metrics
from geopetals.coordinator import messages as m
from geopetals.coordinator.codec import Message
from geopetals.coordinator.core import actions as act
from geopetals.coordinator.core import events as ev
from geopetals.coordinator.engine import Engine
from geopetals.coordinator.entrance import Entrance
from geopetals.coordinator.members import Member, Members
from geopetals.coordinator.waiting import Waiting
from geopetals.errors import Busy, ControlLost, GeoPetalsError, NotAdmitted, ServerRefused
from geopetals.swarm.wire import short_peer

log = logging.getLogger(__name__)

_ASSIGN_TIMEOUT_S = 10.0
_RESEND_S = 5.0
_SESSION_ACTIONS = (act.Admitted, act.Queued, act.Refused)

Method = Callable[[Member, dict[str, Any]], Awaitable[Message]]


class Desk:
    """Serves members that have said hello. Everything runs on the event loop."""

    def __init__(self, engine: Engine, entrance: Entrance, members: Members) -> None:
        self._engine, self._entrance, self._members = engine, entrance, members
        self._answers: Waiting[act.Admitted | act.Queued | act.Refused] = Waiting()
        self._registering: Waiting[act.Assign] = Waiting()
        self._assigning: set[asyncio.Task[None]] = set()
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

    # -- what members ask for ------------------------------------------------------------------------------------------

    async def call(self, member: Member, method: str, body: dict[str, Any]) -> dict[str, Any]:
        """Raises GeoPetalsError or MessageError."""
        function = self._methods.get(member.role, {}).get(method)
        if function is None:
            raise ServerRefused(f"the coordinator does not answer {method[:40]!r} of a {member.role}.")
        member.allowance.take(self._engine.now())
        return (await function(member, body)).to_dict()

    def enter(self, member: Member) -> None:
        if member.role == "client":
            self._engine.apply(ev.ClientSeen(client=member.peer_id))

    def lose(self, member: Member) -> None:
        """Its channel is gone."""
        if member.role == "client":
            self._engine.apply(ev.ClientLost(client=member.peer_id))
        elif member.is_registered:
            self._engine.apply(ev.ServerLost(peer=member.peer_id))

    def expel_revoked(self) -> None:
        """End the channels of members whose join token was revoked, or whose certificate has expired."""
        revoked, now = self._entrance.authority.trust.revoked, self._engine.now()
        for member in self._members.where(lambda member: member.token_id in revoked or now > member.expires_at):
            self._expel(member)

    def _expel(self, member: Member) -> None:
        log.info("member.expelled peer=%s role=%s", short_peer(member.peer_id), member.role)
        if member.is_registered:
            self._engine.apply(ev.ServerLeft(peer=member.peer_id))
            member.is_registered = False
        member.channel.close()

    async def _register(self, member: Member, body: dict[str, Any]) -> m.Registered:
        register = m.Register.from_dict(body)
        with self._registering.wait(member.peer_id) as assigned:
            await self._engine.settle(ev.ServerRegistered(peer=member.peer_id, register=register))
        if not self._engine.core.knows(member.peer_id):
            raise ServerRefused("the coordinator cannot plan with this profile: `geopetals plan --live --explain`.")
        member.is_registered, member.name = True, register.name[:100]
        log.info("member.registered peer=%s held=%s", short_peer(member.peer_id), register.held)
        if assigned.latest is None:
            epoch, span = self._engine.core.assignment(member.peer_id)
            answer = m.Assign(epoch=epoch, span=span, reason="as it is", drain_s=0.0)
        else:
            answer = _assign_message(assigned.latest)
        member.assigned, member.assigned_at = answer, self._engine.now()
        return m.Registered(epoch=answer.epoch, span=answer.span, reason=answer.reason, probe=member.take_probes())

    async def _report(self, member: Member, body: dict[str, Any]) -> m.Reported:
        report = m.Report.from_dict(body)
        trust, version = self._news(member)
        if not member.is_registered:
            return m.Reported(trust_version=version, trust=trust, known=False)
        self._engine.apply(ev.ServerReported(peer=member.peer_id, report=report))
        self._repeat_assignment(member, report)
        return m.Reported(trust_version=version, trust=trust, probe=member.take_probes())

    async def _leave(self, member: Member, body: dict[str, Any]) -> m.Done:
        if member.is_registered:
            member.is_registered = False
            self._engine.apply(ev.ServerLeft(peer=member.peer_id))
        return m.Done()

    async def _open(self, member: Member, body: dict[str, Any]) -> m.Opened:
        request = m.Open.from_dict(body)
        with metrics.DECISION_SECONDS.time():
            action = await self._ask(
                (member.peer_id, request.session_id), ev.SessionAsked(client=member.peer_id, open=request)
            )
            if isinstance(action, act.Refused):
                raise Busy(action.why, retry_after_s=action.retry_after_s)
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
        self._engine.apply(closed)
        return m.Done()

    async def _cancel(self, member: Member, body: dict[str, Any]) -> m.Done:
        request = m.Cancel.from_dict(body)
        self._engine.apply(ev.SessionCancelled(client=member.peer_id, session_id=request.session_id))
        return m.Done()

    async def _resume(self, member: Member, body: dict[str, Any]) -> m.Done:
        for running in m.Resume.from_dict(body).sessions:
            try:
                ticket = self._entrance.read_ticket(running.ticket, member.peer_id)
            except NotAdmitted as error:
                log.info("session.not_resumed session=%s why=%s", running.session_id, error)
                continue
            resumed = ev.SessionResumed(
                client=member.peer_id,
                session_id=running.session_id,
                batch=ticket.batch,
                max_length=ticket.max_length,
                chain=running.chain,
                tokens_used=running.tokens_used,
            )
            self._engine.apply(resumed)
        return m.Done()

    async def _links(self, member: Member, body: dict[str, Any]) -> m.LinksTaken:
        links = m.Links.from_dict(body).links
        self._engine.apply(ev.LinksMeasured(peer=member.peer_id, links=links))
        trust, version = self._news(member)
        standby = b"" if trust is None else self._entrance.standby(member.peer_id, member.token_id)
        return m.LinksTaken(trust_version=version, trust=trust, standby=standby, probe=member.take_probes())

    async def _ask(self, key: tuple[str, str], event: ev.Event) -> act.Admitted | act.Queued | act.Refused:
        with self._answers.wait(key) as answer:
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

    # -- what the core wants done --------------------------------------------------------------------------------------

    def perform(self, action: act.Action) -> None:
        """Carry out one action. Whoever it is for may be gone: it asks again when it is back."""
        if isinstance(action, _SESSION_ACTIONS):
            self._tell_client(action)
        elif isinstance(action, act.SessionEnded):
            self._notify(action.client, "refused", _refused(action.session_id, action.why, 0.0))
        elif isinstance(action, act.Assign):
            self._assign(action)
        elif isinstance(action, act.ProbeLinks):
            member = self._members.get(action.peer)
            if member is not None:
                member.probes = action.peers

    def _tell_client(self, action: act.Admitted | act.Queued | act.Refused) -> None:
        if self._answers.offer((action.client, action.session_id), action):
            return
        member = self._members.get(action.client)
        if member is None:
            return
        if isinstance(action, act.Queued):
            note = m.Queued(session_id=action.session_id, position=action.position, start_in_s=action.start_in_s)
            self._notify(action.client, "queue", note)
        elif isinstance(action, act.Refused):
            self._notify(action.client, "refused", _refused(action.session_id, action.why, action.retry_after_s))
        else:
            ticket = self._entrance.ticket(action, member.token_id)
            admitted = m.Admitted(
                session_id=action.session_id, ticket=ticket, chain=action.chain, predicted=action.predicted
            )
            self._notify(action.client, "admitted", admitted)

    def _notify(self, peer_id: str, method: str, message: Message) -> None:
        member = self._members.get(peer_id)
        if member is None:
            return
        try:
            member.channel.notify(method, message.to_dict())
        except ControlLost as error:
            log.info("member.not_told peer=%s method=%s why=%s", short_peer(peer_id), method, error)

    def _assign(self, action: act.Assign) -> None:
        if self._registering.offer(action.peer, action):
            return
        member = self._members.get(action.peer)
        if member is None:
            return
        member.assigned, member.assigned_at = _assign_message(action), self._engine.now()
        self._send_assignment(member, member.assigned)

    def _repeat_assignment(self, member: Member, report: m.Report) -> None:
        """A server that has not heard of its newest assignment is told again."""
        assigned, now = member.assigned, self._engine.now()
        if assigned is None or report.epoch >= assigned.epoch or now - member.assigned_at < _RESEND_S:
            return
        member.assigned_at = now
        self._send_assignment(member, assigned)

    def _send_assignment(self, member: Member, assignment: m.Assign) -> None:
        task = asyncio.create_task(self._call_assign(member, assignment))
        self._assigning.add(task)
        task.add_done_callback(self._assigning.discard)

    async def _call_assign(self, member: Member, assignment: m.Assign) -> None:
        try:
            raw = await member.channel.call("assign", assignment.to_dict(), timeout_s=_ASSIGN_TIMEOUT_S)
            answer = m.Assigned.from_dict(raw)
        except (GeoPetalsError, ValueError) as error:
            log.info("server.not_assigned peer=%s why=%.300s", short_peer(member.peer_id), error)
            return
        if not answer.accepted:
            log.info("server.refused_assignment peer=%s why=%.300s", short_peer(member.peer_id), answer.why)


def _assign_message(action: act.Assign) -> m.Assign:
    return m.Assign(epoch=action.epoch, span=action.span, reason=action.reason, drain_s=action.drain_s)


def _refused(session_id: str, why: str, retry_after_s: float) -> m.Refused:
    return m.Refused(session_id=session_id, why=why, retry_after_s=retry_after_s)
