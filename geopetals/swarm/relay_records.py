"""Which relays there are, in the DHT: every relay stores its addresses under its own peer id, read with suspicion."""

import asyncio
import math
import random
from typing import Any

from hivemind.dht import DHTNode
from hivemind.utils.timed_storage import get_dht_time

from geopetals.swarm.circuits import CIRCUIT

KEY = "_geopetals.relays"
UPDATE_PERIOD_S = 30.0
_EXPIRATION_S = 90.0
_READ_TIMEOUT_S = 5.0
_MOST_RELAYS = 4
_MOST_ADDRESSES = 4
_LONGEST_ADDRESS = 384


async def announce(node: DHTNode, addresses: tuple[str, ...]) -> None:
    """For a relay: how others reach it."""
    peer_id = node.protocol.p2p.peer_id.to_base58()
    expiration = get_dht_time() + _EXPIRATION_S
    await node.store(KEY, subkey=peer_id, value=list(addresses[:_MOST_ADDRESSES]), expiration_time=expiration)


async def read(node: DHTNode, rng: random.Random) -> tuple[str, ...]:
    """The addresses of at most four relays, chosen at random. Malformed records are passed over."""
    found = await found_under(node, KEY, timeout_s=_READ_TIMEOUT_S)
    relays = [addresses for peer, value in found.items() if (addresses := _addresses(peer, value))]
    rng.shuffle(relays)
    return tuple(address for addresses in relays[:_MOST_RELAYS] for address in addresses)


async def found_under(node: DHTNode, key: str, *, timeout_s: float) -> dict[Any, Any]:
    """What the DHT holds under a key, by subkey; empty if that cannot be read, or not in time."""
    search = await node.get_many([key], sufficient_expiration_time=math.inf, return_futures=True)
    future = search[key]
    try:
        await asyncio.wait([future], timeout=timeout_s)
        if not future.done() or future.cancelled() or future.exception() is not None:
            return {}
    finally:
        future.cancel()
    entry = future.result()
    found = entry.value if entry is not None and isinstance(entry.value, dict) else {}
    return {subkey: value.value for subkey, value in found.items()}


def _addresses(peer: Any, value: Any) -> list[str]:
    if not isinstance(peer, str) or not isinstance(value, list):
        return []
    return [address for address in value[:_MOST_ADDRESSES] if _is_address(address) and address.endswith(f"/p2p/{peer}")]


def _is_address(value: Any) -> bool:
    if not isinstance(value, str) or len(value) > _LONGEST_ADDRESS or not value.isascii() or not value.isprintable():
        return False
    return value.startswith("/") and CIRCUIT not in value and "," not in value
