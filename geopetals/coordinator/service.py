"""The coordinator towards the swarm: channels from hello to their end, and what it looks after each second."""

import asyncio
import logging
import time
from typing import Any

from geopetals.coordinator.admin import Admin
from geopetals.coordinator.desk import Desk
from geopetals.coordinator.engine import Engine
from geopetals.coordinator.entrance import Entrance
from geopetals.coordinator.members import Allowance, Member, Members, new_allowances
from geopetals.coordinator.messages import Hello
from geopetals.credentials.refusal import Refusal, refused
from geopetals.errors import Busy, TokenError
from geopetals.swarm.control import ControlChannel
from geopetals.swarm.wire import short_peer

log = logging.getLogger(__name__)

HELLO_S = 15.0
HOUSEKEEPING_S = 1.0
_MAX_STRANGERS = 1024
_MAX_MEMBERS = 20_000


class Service:
    """Accepts members, and hands on what they ask for."""

    def __init__(self, engine: Engine, entrance: Entrance, members: Members, desk: Desk, admin: Admin) -> None:
        self._engine, self._entrance, self._members = engine, entrance, members
        self._desk, self._admin = desk, admin
        self._strangers = 0

    async def serve(self, channel: ControlChannel) -> None:
        """Look after a channel until it ends."""
        if self._strangers >= _MAX_STRANGERS:
            log.info("member.turned_away peer=%s", short_peer(channel.peer_id))
            return
        visit = _Visit(self, channel)
        self._strangers += 1
        timer = asyncio.get_running_loop().call_later(HELLO_S, visit.expect_hello)
        channel.on_call = visit.on_call
        try:
            await channel.run()
        finally:
            timer.cancel()
            if visit.member is None:
                self._strangers -= 1
            elif self._members.remove(visit.member):
                log.info("member.gone peer=%s role=%s", short_peer(channel.peer_id), visit.member.role)
                self._desk.lose(visit.member)

    def hello(
        self, channel: ControlChannel, member: Member | None, body: dict[str, Any]
    ) -> tuple[Member, dict[str, Any]]:
        """Raises NotAdmitted, ServerRefused, Busy or MessageError."""
        hello = Hello.from_dict(body)
        self._members.check_not_shunned(channel.peer_id, self._engine.now())
        certificate = self._entrance.admit(hello, channel.peer_id)
        welcome = self._entrance.welcome(certificate, hello.role)
        if member is None:
            if len(self._members) >= _MAX_MEMBERS:
                raise Busy("the coordinator takes no more members.", retry_after_s=60.0)
            self._check_seats(channel.peer_id, certificate.token_id)
            member = self._enter(channel, hello, certificate.token_id)
        elif member.role != hello.role:
            raise refused(Refusal.WRONG_ROLE, "a member keeps its role: open another channel for another one.")
        member.expires_at, member.trust = certificate.expires_at, welcome.trust
        return member, welcome.to_dict()

    def _check_seats(self, peer_id: str, token_id: str) -> None:
        before = self._members.get(peer_id)
        is_back = before is not None and before.token_id == token_id
        if not is_back and self._members.count_of(token_id) >= self._entrance.authority.peers_per_token:
            raise Busy("too many members use this join token: ask for another one.", retry_after_s=60.0)

    def _enter(self, channel: ControlChannel, hello: Hello, token_id: str) -> Member:
        now = self._engine.now()
        calls, traffic = new_allowances(now)
        member = Member(
            peer_id=channel.peer_id,
            role=hello.role,
            token_id=token_id,
            expires_at=0.0,
            channel=channel,
            since=now,
            allowance=calls,
            traffic=traffic,
        )
        self._strangers -= 1
        before = self._members.get(member.peer_id)
        if before is not None and before.role != member.role:
            self._desk.lose(before)
        self._members.put(member)
        self._desk.enter(member)
        log.info("member.joined peer=%s role=%s token=%s", short_peer(channel.peer_id), hello.role, token_id)
        return member

    async def call(self, member: Member, method: str, body: dict[str, Any]) -> dict[str, Any]:
        if member.role == "admin":
            return await self._admin.call(method, body)
        return await self._desk.call(member, method, body)

    async def housekeeping(self) -> None:
        """Until cancelled: notice tokens that were made or revoked by another process, and throw out who is to go."""
        while True:
            await asyncio.sleep(HOUSEKEEPING_S)
            try:
                self._entrance.authority.refresh()
            except TokenError as error:
                log.error("coordinator.credentials why=%s", error)
            self._desk.expel_revoked()


class _Visit:
    """One channel, whose first call has to be hello."""

    def __init__(self, service: Service, channel: ControlChannel) -> None:
        self._service, self._channel = service, channel
        self._hellos = Allowance(time.monotonic(), rate_per_s=0.2, burst=5.0)
        self.member: Member | None = None

    async def on_call(self, method: str, body: dict[str, Any]) -> dict[str, Any]:
        if method == "hello":
            self._hellos.take(time.monotonic())
            self.member, welcome = self._service.hello(self._channel, self.member, body)
            return welcome
        if self.member is None:
            raise refused(Refusal.MISSING, "the first call has to be hello.")
        return await self._service.call(self.member, method, body)

    def expect_hello(self) -> None:
        if self.member is None:
            self._channel.close()
