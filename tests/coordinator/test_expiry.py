"""What expires, and what is not known any more: members and sessions that are well go on."""

import time
from pathlib import Path

import pytest

from geopetals.coordinator import messages as m
from geopetals.errors import Busy, NotAdmitted, ServerRefused
from tests.coordinator.actors import ScriptedClient, ScriptedServer, until
from tests.coordinator.rig import Rig
from tests.event_loop import in_loop


@in_loop
async def test_a_server_whose_certificate_has_expired_is_lost_and_may_come_back(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        server = await ScriptedServer(rig, 0).join()
        member = rig.members.get(server.peer_id)
        assert member is not None
        member.expires_at = rig.engine.now() - 1.0
        rig.desk.expel_revoked()
        await until(lambda: rig.members.get(server.peer_id) is None, "the channel ends")
        await until(lambda: rig.engine.core.servers[server.peer_id].away_since is not None, "it counts as away")
        await server.join()
        rig.desk.expel_revoked()
        assert rig.engine.core.servers[server.peer_id].away_since is None
        assert rig.members.get(server.peer_id) is not None


@in_loop
async def test_an_unknown_session_is_not_told_that_it_cannot_grow(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        client = await ScriptedClient(rig, 0).join()
        for _ in range(2):  # with no server, and with one
            with pytest.raises(ServerRefused, match="does not know this session") as caught:
                await client.channel.call("extend", m.Extend(session_id="forgotten", max_length=64).to_dict())
            assert not isinstance(caught.value, Busy)
            await ScriptedServer(rig, 0).join()


@in_loop
async def test_a_session_may_be_resumed_for_a_day_after_its_ticket_has_expired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Rig(tmp_path) as rig:
        server = await ScriptedServer(rig, 0).join()
        server.keep_reporting()
        client = await ScriptedClient(rig, 0).join()
        session = client.new_session()
        opened = m.Opened(status="queued")
        while opened.status != "admitted":
            try:
                opened = await client.open(session)
            except Busy:
                await server.report()
        now = time.time()
        for later_s, is_good in ((2 * 3600.0, True), (30 * 3600.0, False)):
            monkeypatch.setattr(rig.entrance, "_clock", lambda later_s=later_s: now + later_s)
            if is_good:
                assert rig.entrance.read_ticket(opened.ticket, client.peer_id).session_id == session.session_id
            else:
                with pytest.raises(NotAdmitted, match="expired"):
                    rig.entrance.read_ticket(opened.ticket, client.peer_id)
