"""What the core wants done, turned into answers, calls and notifications."""

import asyncio
import logging

from geopetals.coordinator import messages as m
from geopetals.coordinator.codec import Message
from geopetals.coordinator.core import actions as act
from geopetals.coordinator.engine import Engine
from geopetals.coordinator.entrance import Entrance
from geopetals.coordinator.members import Member, Members
from geopetals.coordinator.waiting import Waiting
from geopetals.errors import ControlLost, GeoPetalsError
from geopetals.swarm.wire import short_peer

log = logging.getLogger(__name__)

_ASSIGN_TIMEOUT_S = 10.0
_RESEND_S = 5.0
_SESSION_ACTIONS = (act.Admitted, act.Queued, act.Refused)


class Orders:
    """Carries out actions. `answers` and `registering`: calls whose answer an action becomes."""

    def __init__(self, engine: Engine, entrance: Entrance, members: Members) -> None:
        self._engine, self._entrance, self._members = engine, entrance, members
        self.answers: Waiting[act.Admitted | act.Queued | act.Refused] = Waiting()
        self.registering: Waiting[act.Assign] = Waiting()
        self._assigning: set[asyncio.Task[None]] = set()

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
        if self.answers.offer((action.client, action.session_id), action):
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
        if self.registering.offer(action.peer, action):
            return
        member = self._members.get(action.peer)
        if member is None:
            return
        member.assigned, member.assigned_at = assign_message(action), self._engine.now()
        self._send_assignment(member, member.assigned)

    def repeat_assignment(self, member: Member, report: m.Report) -> None:
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


def assign_message(action: act.Assign) -> m.Assign:
    """As the server is told it."""
    return m.Assign(epoch=action.epoch, span=action.span, reason=action.reason, drain_s=action.drain_s)


def _refused(session_id: str, why: str, retry_after_s: float) -> m.Refused:
    return m.Refused(session_id=session_id, why=why, retry_after_s=retry_after_s)
