"""The first connections of a p2pd. Its own bootstrap is not used: it dials one peer after the other, 15 s each if they
are silent, and ends p2pd if it has dialled none itself, as when autorelay was faster with the only ones that answer.
"""

import asyncio
import logging
from collections.abc import Iterable

from geopetals.swarm.guarded_p2p import GuardedP2P

log = logging.getLogger(__name__)

_TIMEOUT_S = 20.0
_OTHERS_TIMEOUT_S = 1.0


async def meet_any(p2p: GuardedP2P, addresses: Iterable[str]) -> bool:
    """Connect to these peers: all that answer within a second of the first. False if none does."""
    tasks = [asyncio.create_task(_connect(p2p, address)) for address in dict.fromkeys(addresses)]
    try:
        for connecting in asyncio.as_completed(tasks, timeout=_TIMEOUT_S):
            if await connecting:
                await asyncio.wait(tasks, timeout=_OTHERS_TIMEOUT_S)
                return True
    except TimeoutError:
        pass
    finally:
        for task in tasks:
            task.cancel()
    return False


async def _connect(p2p: GuardedP2P, address: str) -> bool:
    try:
        await p2p.connect(address)
    except Exception as error:  # noqa: BLE001 - whatever the reason, that one is not met
        log.debug("contact.failed address=%.200s reason=%r", address, error)
        return False
    return True
