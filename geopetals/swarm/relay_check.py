"""Which relays take newcomers: found out before p2pd is told of them, since it is told once, at its start.

With a fixed list go-libp2p's autorelay uses none of the relays for three minutes unless all of them are there and are
relays, and asks one that was not again after 30 s (relay_finder.go: minCandidates, bootDelay, minInterval). It counts
them by peer id, so that two addresses of one relay are one too many for ever.
"""

import asyncio
from collections.abc import Iterable

from geopetals.errors import NetworkError
from geopetals.swarm.network import GuardedP2P, NetworkConfig, lone_p2pd
from geopetals.swarm.relay_protocol import UNREACHABLE, ask_limits

_LISTENS_TIMEOUT_S = 4.0
_CONNECT_TIMEOUT_S = 5.0
_ANSWER_TIMEOUT_S = 5.0
_LEAST_BYTES = 1 << 20
"""Less is granted by a relay that is still to be started again until its limits are right (see relay.py)."""


async def granting(addresses: Iterable[str]) -> tuple[str, ...]:
    """One address of each relay that takes a reservation now. Raises NetworkError if p2pd cannot be started."""
    by_relay: dict[str, list[str]] = {}
    for address in await listening(addresses):
        by_relay.setdefault(address.rpartition("/p2p/")[2], []).append(address)
    if not by_relay:
        return ()
    async with lone_p2pd(NetworkConfig(client_only=True)) as p2p:
        found = await asyncio.gather(*(_granting(p2p, relay, known) for relay, known in by_relay.items()))
    return tuple(address for address in found if address is not None)


async def _granting(p2p: GuardedP2P, relay: str, addresses: list[str]) -> str | None:
    for address in addresses:
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                await p2p.connect(address)
            granted = await ask_limits(p2p, relay, timeout_s=_ANSWER_TIMEOUT_S)
        except (NetworkError, TimeoutError, ValueError, *UNREACHABLE):
            continue
        if not granted.data_bytes or granted.data_bytes >= _LEAST_BYTES:
            return address
    return None


async def listening(addresses: Iterable[str]) -> tuple[str, ...]:
    """Those that take a TCP connection. p2pd is not asked: after failed dials it does not dial for up to 5 minutes."""
    asked = tuple(addresses)
    found = await asyncio.gather(*map(_listens, asked))
    return tuple(address for address, listens in zip(asked, found, strict=True) if listens)


async def _listens(address: str) -> bool:
    _, _, host, _, port, *_ = [*address.split("/"), *5 * [""]]
    try:
        async with asyncio.timeout(_LISTENS_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host, int(port))
    except (OSError, TimeoutError, ValueError):
        return False
    writer.close()
    return True
