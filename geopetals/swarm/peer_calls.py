"""Unary calls of peers: counted, and answered with an error that says no more than they need to know."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import torch
from hivemind.p2p import P2PContext

from geopetals import metrics
from geopetals.errors import GeoPetalsError, ServerFull
from geopetals.swarm.limits import PeerLimits
from geopetals.swarm.wire import WireError, short_peer

log = logging.getLogger(__name__)

Request = TypeVar("Request")
Answer = TypeVar("Answer")


@contextlib.contextmanager
def told_to_peers(peer: str) -> Iterator[None]:
    """Errors that may be told go through; of others only the name is."""
    try:
        yield
    except (WireError, GeoPetalsError) as error:
        log.info("call.refused client=%s reason=%.500s", short_peer(peer), error)
        metrics.REQUESTS_REFUSED.labels(type(error).__name__).inc()
        raise
    except torch.OutOfMemoryError as error:
        log.warning("call.out_of_memory client=%s", short_peer(peer))
        raise ServerFull("the server's device ran out of memory.") from error
    except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
        raise
    except Exception as error:
        log.exception("call.failed client=%s", short_peer(peer))
        raise RuntimeError(f"internal error: {type(error).__name__}") from None


def limited(
    limits: PeerLimits, function: Callable[[Request, str], Awaitable[Answer]]
) -> Callable[[Request, P2PContext], Awaitable[Answer]]:
    """A handler for hivemind; `function` takes the request and the caller's peer id."""

    async def handle(request: Request, context: Any) -> Answer:
        peer = context.remote_id.to_base58()
        try:
            with told_to_peers(peer), limits.call(peer):
                return await function(request, peer)
        except asyncio.CancelledError:  # hivemind forgets only calls that end with an answer or an Exception
            raise ConnectionAbortedError("the call was cancelled") from None

    return handle
