"""How a process can be reached: by everybody, through relays, or not at all; and by which way it is connected to whom.

p2pd's AutoNAT asks two or more public peers to dial it and keeps the verdict in its metrics, 15 s after its start at
the earliest. A relay address is lost without a word when the relay goes silently, and libp2p does not come back within
100 s to a relay that was restarted; both are mended here (see FACTS in docs/nat.md).
"""

import asyncio
import logging
import random
import re
import time
from collections.abc import Coroutine, Iterable
from enum import StrEnum
from typing import Any

from geopetals.swarm import relay_records
from geopetals.swarm.circuits import drop
from geopetals.swarm.circuits import links as links
from geopetals.swarm.circuits import relay_of as relay_of
from geopetals.swarm.network import GuardedP2P, Network
from geopetals.swarm.relay_check import granting
from geopetals.swarm.relay_protocol import ping

log = logging.getLogger(__name__)

_VERDICT = re.compile(rb"^libp2p_autonat_reachability_status (\d)", re.MULTILINE)
_VERDICT_PERIOD_S = 2.0
_METRICS_TIMEOUT_S = 5.0
_RELAY_PERIOD_S = 2.0
_RELAY_TIMEOUT_S = 4.0
_RELAY_LOST_S = 6.0


class Reachability(StrEnum):
    """What AutoNAT has found out."""

    UNKNOWN = "unknown"
    PUBLIC = "public"
    PRIVATE = "private"


class Lost(StrEnum):
    """Why a process has to take its place in the swarm anew."""

    DAEMON = "p2pd died"
    RELAY = "no relay passes anything on to this server any more"
    NAT = "other peers cannot dial this server"


async def verdict(network: Network) -> Reachability:
    """AutoNAT's, of a network with a `metrics_port`."""
    try:
        async with asyncio.timeout(_METRICS_TIMEOUT_S):
            found = _VERDICT.search(await _metrics(network.config.metrics_port or 0))
    except (OSError, TimeoutError):
        return Reachability.UNKNOWN
    number = int(found[1]) if found else 0
    return {1: Reachability.PUBLIC, 2: Reachability.PRIVATE}.get(number, Reachability.UNKNOWN)


async def _metrics(port: int) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
        return await reader.read(-1)
    finally:
        writer.close()


async def wait_lost(network: Network) -> Lost:
    """Wait until the network has to be started anew, and tell why."""
    reasons: list[Coroutine[Any, Any, Lost]] = [_daemon_dead(network)]
    if network.config.relays:
        reasons.append(_relays_lost(network))
    elif network.config.metrics_port is not None:
        reasons.append(_found_private(network))
    tasks = [asyncio.create_task(reason) for reason in reasons]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return done.pop().result()
    finally:
        for task in tasks:
            task.cancel()


async def _daemon_dead(network: Network) -> Lost:
    await network.p2p.wait_daemon()
    return Lost.DAEMON


async def _found_private(network: Network) -> Lost:
    """Later verdicts count, too: a machine may move behind a NAT. Without a relay a new start would mend nothing."""
    warned = False
    while True:
        await asyncio.sleep(_VERDICT_PERIOD_S)
        if await verdict(network) is not Reachability.PRIVATE:
            continue
        if network.config.spare_relays or await relay_records.read(network.node, random.Random()):
            return Lost.NAT
        if not warned:
            log.warning("reachability.private server=%s relays=0", network.peer_id)
            warned = True


async def _relays_lost(network: Network) -> Lost:
    """Until for a while a relay takes newcomers, but none has given an address: p2pd has given up on it, a new one has
    not.

    Where no relay does a new p2pd could do no better, and direct connections would be lost.
    """
    known, named = (*network.config.relays, *network.config.spare_relays), tuple[str, ...]()
    used_at = time.monotonic()
    while True:
        await asyncio.sleep(_RELAY_PERIOD_S)
        try:
            if await _uses_relay(network.p2p, await network.addresses()):
                used_at = time.monotonic()
                continue
            if time.monotonic() - used_at < _RELAY_LOST_S:
                continue
            named = await relay_records.read(network.node, random.Random()) or named
            if await granting(dict.fromkeys((*known, *named))):
                return Lost.RELAY
        except Exception as error:  # noqa: BLE001 - p2pd's own death is noticed elsewhere
            log.info("relay.check_failed reason=%r", error)


async def _uses_relay(p2p: GuardedP2P, addresses: Iterable[str]) -> bool:
    """Whether a relay that has given us an address answers.

    The connection to one that does not is dropped, so that its address goes at once instead of after 37 s.
    """
    given = sorted({relay_of(address) for address in addresses})
    answers = await asyncio.gather(*(ping(p2p, relay, timeout_s=_RELAY_TIMEOUT_S) for relay in given))
    for relay, answered in zip(given, answers, strict=True):
        if not answered:
            log.warning("relay.silent relay=%s", relay)
            await drop(p2p, relay)
    return any(answers)
