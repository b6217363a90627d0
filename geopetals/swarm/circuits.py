"""Connections through relays: which ones are, and an end to those on which nothing comes any more.

libp2p notices after 37 s that a relay has gone silently, and puts every new stream on the dead connection until then.
"""

import asyncio
import contextlib
import logging

from hivemind.p2p import P2P, PeerID

from geopetals.swarm.relay_protocol import UNREACHABLE, ping

log = logging.getLogger(__name__)

CIRCUIT = "/p2p-circuit"
_PERIOD_S = 2.0
_TIMEOUT_S = 5.0
_REDIALS, _REDIAL_TIMEOUT_S = 15, 20.0
_DROP_TIMEOUT_S = 1.0


async def links(p2p: P2P) -> dict[str, bool]:
    """Whether each connected peer is reached through a relay. One direct connection is enough for p2pd to use it."""
    return {peer: "" not in ways for peer, ways in (await _ways(p2p)).items()}


async def _ways(p2p: P2P) -> dict[str, set[str]]:
    """The relays through which each peer is connected; "" is a direct connection."""
    found: dict[str, set[str]] = {}
    for peer in await p2p.list_peers():
        found.setdefault(peer.peer_id.to_base58(), set()).update(relay_of(str(address)) for address in peer.addrs)
    return found


async def watch(p2p: P2P) -> None:
    """Replace relayed connections to peers that do not answer, by another relay if need be. Runs until cancelled."""
    checking: set[str] = set()

    async def check(peer: str, relays: set[str]) -> None:
        checking.add(peer)
        try:
            await _check(p2p, peer, relays)
        finally:
            checking.discard(peer)

    async with asyncio.TaskGroup() as tasks:
        while True:
            await asyncio.sleep(_PERIOD_S)
            with contextlib.suppress(*UNREACHABLE):  # p2pd's own death is noticed elsewhere
                for peer, ways in (await _ways(p2p)).items():
                    if "" not in ways and peer not in checking:
                        tasks.create_task(check(peer, ways))


async def _check(p2p: P2P, peer: str, relays: set[str]) -> None:
    asked = [peer, *sorted(relays)]
    answers = await asyncio.gather(*(ping(p2p, name, timeout_s=_TIMEOUT_S) for name in asked))
    if answers[0]:
        return
    log.info("circuit.dead peer=%s", peer)
    for name, answered in zip(asked, answers, strict=True):
        if not answered:  # p2pd would dial through a dead connection to a relay, too
            await drop(p2p, name)
    # Dialling takes seconds: by old addresses first, then by those that the DHT has. Who calls may have less patience.
    for _ in range(_REDIALS):
        if await ping(p2p, peer, timeout_s=_REDIAL_TIMEOUT_S):
            return
        await asyncio.sleep(_PERIOD_S)


def relay_of(address: str) -> str:
    """The peer id of the relay in `/ip4/.../p2p/<relay>/p2p-circuit[/p2p/<peer>]`; empty for a direct address."""
    before, circuit, _ = address.partition(CIRCUIT)
    return before.rpartition("/p2p/")[2] if circuit else ""


async def drop(p2p: P2P, peer: str) -> None:
    """Close all connections to a peer, as far as there are any."""
    with contextlib.suppress(*UNREACHABLE, TimeoutError):
        async with asyncio.timeout(_DROP_TIMEOUT_S):
            await p2p._client.disconnect(PeerID.from_base58(peer))
