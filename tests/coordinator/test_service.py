"""The coordinator's desk with the real core: joining, assignments, sessions, revocation, and a restart."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from geopetals.coordinator import messages as m
from geopetals.coordinator.core.events import Tick
from geopetals.credentials.certificate import Role
from geopetals.credentials.ticket import Ticket
from geopetals.errors import Busy, ControlLost, NotAdmitted, ServerRefused, SwarmFailure
from tests.coordinator.actors import ScriptedClient, ScriptedServer, covers_all, until
from tests.coordinator.rig import BLOCKS, Rig, peer
from tests.event_loop import in_loop


async def ready(rig: Rig, *servers: ScriptedServer) -> None:
    """All hold what they were assigned, and the blocks are covered."""
    for server in servers:
        await server.join()
        server.keep_reporting()

    def serves() -> bool:
        known = rig.engine.core.servers
        spans = [known[server.peer_id].serving for server in servers]
        return all(span is not None for span in spans) and set(range(BLOCKS)) == {
            block for span in spans if span is not None for block in range(*span)
        }

    await until(serves, "all blocks are served")


@in_loop
async def test_servers_are_assigned_all_blocks_and_clients_get_tickets_for_them(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        servers = [ScriptedServer(rig, number, memory_bytes=50_000) for number in range(2)]
        await ready(rig, *servers)
        client = await ScriptedClient(rig, 0).join()
        session = client.new_session()
        opened = await client.open(session)
        assert opened.status == "admitted"
        assert covers_all(opened.chain)
        assert opened.predicted is not None
        ticket = Ticket.verify(
            opened.ticket,
            rig.authority.trust,
            now=rig.engine.now(),
            peer_id=client.peer_id,
            swarm="swarm",
            model_digest=rig.entrance.digest,
        )
        assert (ticket.session_id, ticket.batch, ticket.max_length) == (session.session_id, 1, session.max_length)
        await client.close(session, m.Measured(ttft_s=0.2, tpot_s=0.1, tokens=56))
        await rig.engine.settle(Tick())
        (row,) = rig.store.sessions(10)
        assert row["session_id"] == session.session_id
        assert row["predicted"]["tpot_s"] > 0
        assert row["measured"]["ttft_s"] == 0.2


@in_loop
async def test_a_session_that_finds_no_cache_waits_and_is_woken_when_one_ends(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        server = ScriptedServer(rig, 0)
        server.total = 64 * BLOCKS * 2
        await ready(rig, server)
        client = await ScriptedClient(rig, 0).join()
        first, second, third = (client.new_session() for _ in range(3))
        assert (await client.open(first)).status == "admitted"
        assert (await client.open(second)).status == "admitted"
        waiting = await client.open(third)
        assert waiting.status == "queued"
        assert waiting.position == 0
        await client.close(first)
        await until(lambda: client.noted("admitted", third) is not None, "the third session is admitted")
        note = m.Admitted.from_dict(client.noted("admitted", third))
        assert covers_all(note.chain)
        assert len(note.ticket) > 64


@in_loop
async def test_a_swarm_without_servers_is_busy(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        client = await ScriptedClient(rig, 0).join()
        with pytest.raises(Busy) as caught:
            await client.open(client.new_session())
        assert caught.value.retry_after_s is not None


@in_loop
async def test_a_session_grows_and_one_that_is_unknown_does_not(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        await ready(rig, ScriptedServer(rig, 0))
        client = await ScriptedClient(rig, 0).join()
        session = client.new_session()
        await client.open(session)
        longer = m.Extend(session_id=session.session_id, max_length=256)
        extended = m.Extended.from_dict(await client.channel.call("extend", longer.to_dict()))
        ticket = rig.entrance.read_ticket(extended.ticket, client.peer_id)
        assert ticket.max_length == 256
        with pytest.raises(SwarmFailure):
            await client.channel.call("extend", m.Extend(session_id="nobody's", max_length=256).to_dict())


@in_loop
async def test_after_a_kill_it_knows_servers_plan_sessions_and_queue(tmp_path: Path) -> None:
    async with Rig(tmp_path) as first:
        server = ScriptedServer(first, 0)
        server.total = 64 * BLOCKS
        await ready(first, server)
        client = await ScriptedClient(first, 0).join()
        running, waiting = client.new_session(), client.new_session()
        opened = await client.open(running)
        assert (await client.open(waiting)).status == "queued"
        before = first.engine.core.snapshot()
        number = first.engine.events
        server.leave()
        await first.end()
        copied = tmp_path / "copied"
        copied.mkdir()
        (copied / "credentials.json").write_bytes((tmp_path / "credentials.json").read_bytes())
        first.store.backup(copied / "coordinator.db")  # as the disk is now, without a last snapshot
    async with Rig(copied) as second:
        assert second.replayed >= number
        again = ScriptedServer(second, 0)
        again.total, again.epoch, again.span = server.total, server.epoch, server.span
        await again.join()
        again.keep_reporting()
        assert again.span == server.span, "it keeps its blocks"
        assert not again.assignments
        assert set(second.engine.core.snapshot()) == set(before)
        client_again = await ScriptedClient(second, 0).join()
        chain = opened.chain
        session = m.RunningSession(session_id=running.session_id, ticket=opened.ticket, chain=chain, tokens_used=10)
        await client_again.channel.call("resume", m.Resume(sessions=(session,)).to_dict())
        assert (await client_again.open(waiting)).status == "queued"
        await client_again.channel.call("resume", m.Resume(sessions=(), held=(running.session_id,)).to_dict())
        assert running.session_id in second.engine.core.desk.sessions
        await client_again.channel.call("resume", m.Resume(sessions=(), held=()).to_dict())
        await until(lambda: client_again.noted("admitted", waiting) is not None, "the queue goes on")
        assert set(second.engine.core.desk.sessions) == {waiting.session_id}, "what it does not have is over"


@in_loop
async def test_a_member_without_a_right_token_is_refused_with_the_reason(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        for hello, reason in (
            (m.Hello(version=m.VERSION, role="client"), "missing"),
            (m.Hello(version=m.VERSION, role="client", token="gp2nonsense"), "malformed"),
            (m.Hello(version=m.VERSION, role="server", token=rig.token(Role.CLIENT)), "wrong_role"),
            (m.Hello(version=m.VERSION, role="client", certificate=b"x" * 80), "malformed"),
        ):
            channel = await rig.connect(peer(1))
            with pytest.raises(NotAdmitted) as caught:
                await channel.call("hello", hello.to_dict())
            assert caught.value.reason == reason
            with pytest.raises(NotAdmitted):
                await channel.call("open", {})


@in_loop
async def test_a_member_of_another_version_is_told_to_update(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        channel = await rig.connect(peer(1))
        hello = m.Hello(version=99, role="client", token=rig.token(Role.CLIENT))
        with pytest.raises(ServerRefused, match="update"):
            await channel.call("hello", hello.to_dict())


@in_loop
async def test_a_certificate_is_enough_to_come_back_and_only_for_its_peer(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        client = await ScriptedClient(rig, 0).join()
        certificate = client.welcome.certificate
        again = await rig.connect(client.peer_id)
        hello = m.Hello(version=m.VERSION, role="client", certificate=certificate)
        await again.call("hello", hello.to_dict())
        await client.channel.run()
        assert client.channel.closed.is_set(), "a peer has one channel"
        thief = await rig.connect(peer(77))
        with pytest.raises(NotAdmitted) as caught:
            await thief.call("hello", hello.to_dict())
        assert caught.value.reason == "foreign_peer"


@in_loop
async def test_members_of_a_revoked_token_are_thrown_out(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        token = rig.authority.create_token(Role.CLIENT)
        client = await ScriptedClient(rig, 0).join(token.encode())
        other = await ScriptedClient(rig, 1).join()
        admin = await rig.connect(peer(5))
        await admin.call("hello", m.Hello(version=1, role="admin", token=rig.token(Role.ADMIN)).to_dict())
        await admin.call("token.revoke", {"id": token.token_id})
        await asyncio.wait_for(client.channel.run(), 20)
        assert not other.channel.closed.is_set()
        with pytest.raises(NotAdmitted) as caught:
            await ScriptedClient(rig, 2).join(token.encode())
        assert caught.value.reason == "revoked"


@in_loop
async def test_servers_hear_of_a_revocation_with_their_next_report(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        server = await ScriptedServer(rig, 0).join()
        token = rig.authority.create_token(Role.CLIENT)
        await server.report()
        assert (await server.report()).trust is None
        rig.authority.revoke(token.token_id)
        answer = await server.report()
        assert answer.trust is not None
        assert token.token_id in rig.authority.trust.read(answer.trust).revoked


@pytest.mark.parametrize(
    ("role", "method"),
    [("client", "register"), ("client", "token.create"), ("client", "status"), ("server", "open"), ("admin", "open")],
)
@in_loop
async def test_each_role_has_its_own_methods(tmp_path: Path, role: Any, method: str) -> None:
    async with Rig(tmp_path) as rig:
        channel = await rig.connect(peer(1))
        await channel.call("hello", m.Hello(version=1, role=role, token=rig.token(Role(role))).to_dict())
        with pytest.raises(ServerRefused):
            await channel.call(method, {})


@in_loop
async def test_hostile_bodies_are_refused_and_leave_the_channel_as_it_was(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        client = await ScriptedClient(rig, 0).join()
        for body in ({}, {"session_id": 3}, {"session_id": "s", "batch": -1, "max_length": 1, "prompt_tokens": 0}):
            with pytest.raises(SwarmFailure):
                await client.channel.call("open", body)
        assert not client.channel.closed.is_set()


@in_loop
async def test_a_channel_without_hello_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geopetals.coordinator.service.HELLO_S", 0.2)
    async with Rig(tmp_path) as rig:
        channel = await rig.connect(peer(1))
        await asyncio.wait_for(channel.run(), 20)
        with pytest.raises(ControlLost):
            await channel.call("hello", {})


@in_loop
async def test_admins_see_and_order(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        await ready(rig, ScriptedServer(rig, 0))
        admin = await rig.connect(peer(5))
        await admin.call("hello", m.Hello(version=1, role="admin", token=rig.token(Role.ADMIN)).to_dict())
        status = await admin.call("status", {})
        assert status["coordinator"]["connected"] == {"server": 1, "client": 0, "admin": 1, "relay": 0}
        assert [server["peer"] for server in status["servers"]] == [peer(0)]
        assert await admin.call("replan", {"reason": "because"}) == {"asked": True}
        plan = await admin.call("plan", {})
        assert plan["cluster"]["model"]["blocks"] == BLOCKS
        made = await admin.call("token.create", {"role": "client", "name": "ann"})
        await ScriptedClient(rig, 3).join(made["token"])
        listed = (await admin.call("token.list", {}))["items"]
        assert {"id": made["id"], "name": "ann"}.items() <= listed[-1].items()
        assert not any("gp2" in str(value) for entry in listed for value in entry.values())


@in_loop
async def test_tokens_cannot_be_tried_one_after_another(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        channel = await rig.connect(peer(1))
        hello = m.Hello(version=m.VERSION, role="client", token="gp2nonsense").to_dict()
        for _ in range(5):
            with pytest.raises(NotAdmitted):
                await channel.call("hello", hello)
        with pytest.raises(Busy) as caught:
            await channel.call("hello", hello)
        assert caught.value.retry_after_s is not None


async def ask_on_and_on(client: ScriptedClient) -> None:
    for _ in range(1000):
        await client.channel.call("links", m.Links(links=()).to_dict())


@in_loop
async def test_a_member_that_asks_too_much_is_told_to_wait(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        client = await ScriptedClient(rig, 0).join()
        with pytest.raises(Busy):
            await ask_on_and_on(client)
        assert not client.channel.closed.is_set()
