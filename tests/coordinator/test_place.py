"""The coordinator's place in the network, when p2pd ends and another is started."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from geopetals.coordinator import place
from geopetals.coordinator.place import Place
from geopetals.progress import Silent
from tests.event_loop import in_loop


@in_loop
async def test_whoever_could_not_be_heard_meanwhile_is_waited_for_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    again = asyncio.Event()

    async def listen(p2p: Any, on_channel: Any) -> None:
        happened.append(f"listens on {p2p.name}")

    def network(name: str, code: int | None) -> Any:
        async def wait_daemon() -> int:
            if code is None:
                again.set()
                await asyncio.Event().wait()
            return code or 0

        async def stop() -> None:
            happened.append(f"{name} stopped")

        return SimpleNamespace(p2p=SimpleNamespace(name=name, wait_daemon=wait_daemon), stop=stop)

    async def enter() -> None:
        kept.network = network("second", None)

    async def keep_published(_: Any) -> None:
        await asyncio.Event().wait()

    async def serve(channel: Any) -> None:
        raise AssertionError("nobody comes")

    monkeypatch.setattr(place.control, "listen", listen)
    monkeypatch.setattr(place, "_RETRY_S", 0.0)
    kept = Place.__new__(Place)
    kept.network = network("first", 1)
    monkeypatch.setattr(kept, "enter", enter)
    monkeypatch.setattr(kept, "_membership", SimpleNamespace(keep_published=keep_published), raising=False)
    keeping = asyncio.create_task(kept.keep(serve, Silent(), lambda: happened.append("returned")))
    await asyncio.wait_for(again.wait(), 10)
    assert happened == ["listens on first", "first stopped", "listens on second", "returned"]
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
