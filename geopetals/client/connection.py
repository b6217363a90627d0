"""Streams to servers, and what it looks like when there is none."""

import asyncio

from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure, DispatchFailure, P2PDaemonError

from geopetals.swarm.wire import HANDLER, gone

UNREACHABLE = (ControlFailure, DispatchFailure, P2PDaemonError, ConnectionError, asyncio.IncompleteReadError)


async def open_stream(
    p2p: P2P, peer_id: str, method: str, timeout_s: float
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    try:
        async with asyncio.timeout(timeout_s):
            _, reader, writer = await p2p.call_binary_stream_handler(PeerID.from_base58(peer_id), f"{HANDLER}.{method}")
    except TimeoutError as error:
        raise gone(peer_id, f"no connection within {timeout_s:.0f} s") from error
    except UNREACHABLE as error:
        raise gone(peer_id, "no connection") from error
    return reader, writer
