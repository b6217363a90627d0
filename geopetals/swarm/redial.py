"""Connecting to a peer that may be away for long.

go-libp2p waits longer after each failed dial of an address, up to five minutes, and nothing asks it to forget that. So
whether anybody listens at all is found out without it.
"""

import asyncio
import contextlib
import logging
import re
from collections.abc import Sequence

from geopetals.errors import ControlLost
from geopetals.swarm.network import GuardedP2P
from geopetals.swarm.reachability import relay_of
from geopetals.swarm.wire import short_peer

log = logging.getLogger(__name__)

_DIRECT = re.compile(r"/(?:ip4|ip6|dns|dns4|dns6)/([^/]+)/tcp/(\d+)/")
_LISTENS_TIMEOUT_S, _CONNECT_TIMEOUT_S = 4.0, 10.0


async def connect(p2p: GuardedP2P, addresses: Sequence[str]) -> None:
    """To the peer that all of them end in. Raises ControlLost."""
    why = "it has no address"
    for address in addresses:
        if not relay_of(address) and not await _listens(address):
            why = "nobody listens at its address"
            continue
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                await p2p.connect(address)
            return
        except Exception as error:  # noqa: BLE001 - whatever the reason, there is no connection
            why = " ".join(str(error).split()) or type(error).__name__
            log.debug("redial.failed address=%s reason=%s", address, why)
    raise ControlLost(f"cannot reach {short_peer(addresses[0] if addresses else '')} ({why}).")


async def _listens(address: str) -> bool:
    """True also where it cannot be known."""
    found = _DIRECT.match(address)
    if found is None:
        return True
    try:
        async with asyncio.timeout(_LISTENS_TIMEOUT_S):
            _, writer = await asyncio.open_connection(found[1], int(found[2]))
    except (OSError, TimeoutError):
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True
