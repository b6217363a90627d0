"""The swarm's trust list in the DHT: how rotation and revocation reach members while the coordinator is away.

The coordinator's heartbeats are quicker. Every member passes the newest list on, signed as it came.
"""

import asyncio
import logging
from collections.abc import Callable

from hivemind.dht import DHTNode
from hivemind.utils.timed_storage import get_dht_time

from geopetals.credentials.trust import TrustSource
from geopetals.errors import NotAdmitted
from geopetals.swarm.record_signing import TRUST_LIFE_S, trust_key

log = logging.getLogger(__name__)

EXCHANGE_PERIOD_S = 15.0
_TIMEOUT_S = 5.0


async def keep_trust_current(
    node: DHTNode,
    trust: TrustSource,
    *,
    period_s: float = EXCHANGE_PERIOD_S,
    ours: Callable[[], bytes] | None = None,
) -> None:
    """Exchange lists with the DHT until cancelled. `ours` is where the newest list comes from, at the coordinator."""
    while True:
        try:
            if ours is not None:
                trust.offer(ours())
            async with asyncio.timeout(_TIMEOUT_S):
                await exchange_trust(node, trust)
        except TimeoutError:
            log.info("trust.exchange_failed reason=timeout")
        except Exception as error:  # noqa: BLE001 - hivemind raises anything when p2pd is away; the next round may succeed
            log.info("trust.exchange_failed reason=%r", error)
        await asyncio.sleep(period_s)


async def exchange_trust(node: DHTNode, trust: TrustSource) -> None:
    """Take the DHT's list if it is newer than ours, and store ours if it is not."""
    key = trust_key(trust.current.swarm)
    found = await node.get(key, latest=True)
    if found is not None and isinstance(found.value, bytes):
        try:
            if trust.offer(found.value):
                log.info("trust.changed version=%d revoked=%d", trust.current.version, len(trust.current.revoked))
        except NotAdmitted as error:
            log.info("trust.refused reason=%s", error)
    ours, expiration = trust.signed, trust.current.issued_at + TRUST_LIFE_S
    is_there = found is not None and found.value == ours
    if ours is not None and not is_there and expiration > get_dht_time():
        await node.store(key, ours, expiration)
