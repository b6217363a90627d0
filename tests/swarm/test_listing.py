"""What a server's record says of its links, and what a client reads there."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from geopetals.swarm import listing as listing_module
from geopetals.swarm.listing import Listing
from geopetals.swarm.stack import ServerInfo
from tests.event_loop import in_loop
from tests.issuing import IDENTITY


@in_loop
async def test_the_shortest_links_are_told_as_petals_does(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[ServerInfo] = []

    async def announce(node: Any, swarm: str, info: ServerInfo, **_: Any) -> None:
        told.append(ServerInfo.from_tuple(info.to_tuple()))

    monkeypatch.setattr(listing_module, "announce", announce)
    checkpoint = SimpleNamespace(config=SimpleNamespace(), num_blocks=6)
    loader: Any = SimpleNamespace(quantization="none", dtype=torch.float32, emulated=None, checkpoint=checkpoint)
    network: Any = SimpleNamespace(node=None, is_relayed=False)
    listing = Listing(loader, IDENTITY, network, swarm="tiny", name=None)
    await listing.joining(0, 3)
    listing.links = lambda: {f"peer{number}": number / 100 for number in reversed(range(100))}
    assert await listing.renew()
    assert told[0].next_pings is None
    assert told[1].next_pings == {f"peer{number}": number / 100 for number in range(16)}
