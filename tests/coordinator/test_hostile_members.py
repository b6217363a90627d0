"""Members that break off, lie or ask for too much: the coordinator stays whole, and others do not notice."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from geopetals.coordinator import messages as m
from geopetals.coordinator.core import Core
from geopetals.coordinator.core import events as ev
from geopetals.credentials.certificate import Role
from geopetals.errors import Busy, ServerRefused
from tests.coordinator.actors import ScriptedClient, ScriptedServer, until
from tests.coordinator.rig import BLOCKS, Rig, peer, register
from tests.coordinator.test_service import ready
from tests.event_loop import in_loop


async def resume(client: ScriptedClient, *sessions: m.RunningSession) -> None:
    await client.channel.call("resume", m.Resume(sessions=sessions).to_dict())


@in_loop
async def test_a_ticket_resumes_the_session_that_it_is_for_and_no_other(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        await ready(rig, ScriptedServer(rig, 0))
        client = await ScriptedClient(rig, 0).join()
        session = client.new_session()
        opened = await client.open(session)
        sessions = rig.engine.core.desk.sessions
        running = m.RunningSession(
            session_id=session.session_id, ticket=opened.ticket, chain=opened.chain, tokens_used=8
        )
        strange = (m.ChainHop(peer(77), 0, BLOCKS),)
        await client.close(session)
        await resume(
            client,
            *(replace(running, session_id=f"other{number}") for number in range(10)),
            replace(running, session_id="y" * 5000),
            replace(running, ticket=client.welcome.standby),
            replace(running, session_id="", ticket=client.welcome.standby),
            replace(running, chain=strange),
            replace(running, chain=(*running.chain, m.ChainHop("\x1b[2J", BLOCKS, BLOCKS + 1))),
        )
        assert not sessions
        await resume(client, running)
        assert list(sessions) == [session.session_id]


@in_loop
async def test_resuming_many_sessions_costs_as_much_as_asking_for_them(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        client = await ScriptedClient(rig, 0).join()
        nothing = m.RunningSession(session_id="s", ticket=b"", chain=(), tokens_used=0)
        await resume(client, *[nothing] * 256)
        with pytest.raises(Busy):
            await resume(client, *[nothing] * 256)


@in_loop
async def test_a_server_whose_new_channel_ends_before_it_registers_is_lost(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        server = ScriptedServer(rig, 0)
        token = rig.token(Role.SERVER)
        await server.join(token)
        known = rig.engine.core.servers[server.peer_id]
        assert known.present
        channel = await rig.connect(server.peer_id)
        await channel.call("hello", m.Hello(version=m.VERSION, role="server", token=token).to_dict())
        channel.close()
        await until(lambda: not known.present, "it is known to be gone")


@in_loop
async def test_a_server_whose_channel_ends_while_it_registers_is_lost(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        channel = await rig.connect(peer(0))
        await channel.call("hello", m.Hello(version=1, role="server", token=rig.token(Role.SERVER)).to_dict())
        settle = rig.engine.settle

        async def settle_slowly(event: ev.Event) -> None:
            await settle(event)
            channel.close()
            await asyncio.sleep(30)

        rig.engine.settle = settle_slowly  # type: ignore[method-assign]
        call = asyncio.create_task(channel.call("register", register().to_dict()))
        known = rig.engine.core.servers
        await until(lambda: peer(0) in known and not known[peer(0)].present, "it is known to be gone")
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)


@in_loop
async def test_when_the_coordinator_leaves_nobody_is_lost(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        server = ScriptedServer(rig, 0)
        await ready(rig, server)
        client = await ScriptedClient(rig, 0).join()
        rig.desk.stop()
        server.leave()
        client.channel.close()
        await until(lambda: not len(rig.members), "the channels have ended")
        core = rig.engine.core
        assert core.servers[server.peer_id].present
        assert core.clients[client.peer_id].away_since is None


@in_loop
async def test_what_was_answered_with_done_is_on_the_disk(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        server = ScriptedServer(rig, 0)
        await ready(rig, server)
        client = await ScriptedClient(rig, 0).join()
        first, second = client.new_session(), client.new_session()
        opened = await client.open(first)
        await client.open(second)
        assert rig.view.sessions(10)[0]["measured"] is None

        def kinds() -> set[str]:
            return {logged.body["kind"] for logged in rig.store.events()}

        running = m.RunningSession(session_id=first.session_id, ticket=opened.ticket, chain=opened.chain, tokens_used=9)
        await resume(client, running)
        assert "SessionResumed" in kinds()
        await client.close(first, m.Measured(tokens=5))
        assert rig.view.sessions(10)[0]["measured"]["tokens"] == 5
        await client.channel.call("cancel", m.Cancel(session_id=second.session_id).to_dict())
        assert "SessionCancelled" in kinds()
        assert server.channel is not None
        await server.channel.call("leave", {})
        assert "ServerLeft" in kinds()


@in_loop
async def test_one_join_token_is_for_so_many_members_at_a_time(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        rig.authority.peers_per_token = 2
        token = rig.token(Role.CLIENT)
        first, second = [await ScriptedClient(rig, number).join(token) for number in range(2)]
        with pytest.raises(Busy, match="join token"):
            await ScriptedClient(rig, 2).join(token)
        await ScriptedClient(rig, 3).join()
        await ScriptedClient(rig, 1).join(token)
        assert second.peer_id != first.peer_id
        first.channel.close()
        await until(lambda: rig.members.get(first.peer_id) is None, "the first has gone")
        await ScriptedClient(rig, 2).join(token)


@in_loop
async def test_sessions_are_asked_for_in_the_name_of_the_join_token(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        await ready(rig, ScriptedServer(rig, 0))
        client = await ScriptedClient(rig, 0).join()
        member = rig.members.get(client.peer_id)
        assert member is not None
        await client.open(client.new_session())
        (asked,) = [logged.body for logged in rig.store.events() if logged.body["kind"] == "SessionAsked"]
        assert asked["group"] == member.token_id


@in_loop
async def test_registering_again_and_again_is_refused_over_all_channels(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        token = rig.token(Role.SERVER)
        for _ in range(5):
            await ScriptedServer(rig, 0).join(token)
        with pytest.raises(Busy):
            await ScriptedServer(rig, 0).join(token)
        await ScriptedServer(rig, 1).join(token)


@in_loop
async def test_a_member_that_sends_megabytes_is_told_to_wait(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        client = await ScriptedClient(rig, 0).join()
        body = {**m.Links(links=()).to_dict(), "junk": b"x" * 900_000}
        for _ in range(4):
            await client.channel.call("links", body)
        with pytest.raises(Busy):
            await client.channel.call("links", body)
        assert not client.channel.closed.is_set()


@in_loop
async def test_a_server_that_the_core_cannot_take_is_refused_and_kept_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = Core._registered

    def fail_half_way(core: Core, event: ev.ServerRegistered, now: float) -> None:
        take(core, event, now)
        if event.peer == peer(9):
            raise OverflowError("intermediate overflow in fsum")

    monkeypatch.setattr(Core, "_registered", fail_half_way)
    async with Rig(tmp_path) as rig:
        await ready(rig, ScriptedServer(rig, 0))
        bad, token = ScriptedServer(rig, 9), rig.token(Role.SERVER)
        with pytest.raises(ServerRefused, match="cannot work with"):
            await bad.join(token)
        assert bad.channel is not None
        await asyncio.wait_for(bad.channel.closed.wait(), 20)
        with pytest.raises(Busy, match="try later"):
            await bad.join(token)
        client = await ScriptedClient(rig, 0).join()
        assert (await client.open(client.new_session())).status == "admitted"
        assert not rig.engine.core.knows(peer(9))


@in_loop
async def test_asking_for_longer_sessions_costs_more_than_other_calls(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        client = await ScriptedClient(rig, 0).join()
        longer = m.Extend(session_id="nobody's", max_length=256).to_dict()
        asked = 0
        while True:
            try:
                await client.channel.call("extend", longer)
            except Busy:
                break
            except ServerRefused:
                asked += 1
        assert 40 <= asked <= 100
        with pytest.raises(Busy):
            await client.channel.call("extend", longer)
