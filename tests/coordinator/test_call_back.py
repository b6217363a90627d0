"""After a start the coordinator connects to the servers that it knows, as far as they are themselves."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from geopetals.coordinator import app
from geopetals.coordinator.core import events as ev
from geopetals.errors import ControlLost
from tests.coordinator.actors import ScriptedServer, until
from tests.coordinator.rig import Rig, peer, register
from tests.event_loop import in_loop


@in_loop
async def test_servers_that_are_not_back_are_called_at_their_own_addresses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []

    async def fail(p2p: Any, addresses: Sequence[str]) -> None:
        calls.append(list(addresses))
        raise ControlLost("nobody listens")

    monkeypatch.setattr(app, "connect", fail)
    monkeypatch.setattr(app, "_CALL_BACK_S", 0.05)
    place: Any = SimpleNamespace(network=SimpleNamespace(p2p=None))
    own = f"/ip4/203.0.113.7/tcp/31330/p2p/{peer(1)}"
    details = replace(register(), addresses=(f"/ip4/203.0.113.8/tcp/22/p2p/{peer(2)}", own, "/ip4/203.0.113.9/tcp/22"))
    async with Rig(tmp_path) as rig:
        await ScriptedServer(rig, 0).join()
        await rig.engine.settle(ev.ServerRegistered(peer=peer(1), register=details))
        calling = asyncio.create_task(app.call_back(rig.engine, rig.members, place, asyncio.Event()))
        await until(lambda: len(calls) >= 2, "it was called twice")
        calling.cancel()
        await asyncio.gather(calling, return_exceptions=True)
    assert all(addresses == [own] for addresses in calls)
