"""Whom a DHT node knows beside those that it was started with: who has one peer alone is lost with it."""

import asyncio
from collections.abc import Iterable

from hivemind.dht import DHTNode

from geopetals.swarm.network import peer_id_of

_AT_ONCE = 16


async def meet(node: DHTNode, peer_ids: Iterable[str]) -> None:
    """Make the node know these peers, and them it; who does not answer, or is no DHT node, is passed over."""
    at_once = asyncio.Semaphore(_AT_ONCE)

    async def ping(peer_id: str) -> None:
        async with at_once:
            await node.protocol.call_ping(peer_id_of(peer_id))

    await asyncio.gather(*map(ping, peer_ids))
