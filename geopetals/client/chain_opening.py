"""Opening a session on all servers of a route at once, with a link from each to the next where they can push."""

import asyncio
import logging
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING

from geopetals.client.chain import Chain
from geopetals.client.hop import HopSession
from geopetals.client.routing import Hop
from geopetals.errors import ServerFull, ServerGone
from geopetals.swarm.heartbeat import HEARTBEAT_S
from geopetals.swarm.ring_messages import NextHop, Opening

if TYPE_CHECKING:
    from geopetals.client.swarm import SwarmClient

log = logging.getLogger(__name__)

_STOCK, _BAD_LINK, _OFF = "stock PETALS does not push", "the link between the two failed lately", "push is off"


async def open_chain(
    swarm: "SwarmClient",
    route: tuple[Hop, ...],
    *,
    batch: int,
    max_length: int,
    wait_s: float,
    credential: bytes = b"",
    recovery: bool = False,
) -> Chain:
    """Reserve cache on every server of a route, at the same time on all, waiting for it at most `wait_s` seconds.

    `credential` is what servers want to see, `recovery` as in Opening. Raises SwarmFailure, or NotAdmitted.
    """
    names = [uuid.uuid4().hex for _ in route]
    openings, reasons = _plan_links(swarm, route, names)
    openings = [replace(opening, credential=credential, recovery=recovery) for opening in openings]
    works = [
        asyncio.create_task(
            HopSession.open(
                swarm.network.p2p,
                hop,
                swarm.swarm,
                opening,
                session_id=name,
                batch=batch,
                hidden_size=swarm.hidden_size,
                max_length=max_length,
                connect_timeout_s=swarm.config.connect_timeout,
                alloc_timeout_s=wait_s,
            )
        )
        for hop, opening, name in zip(route, openings, names, strict=True)
    ]
    try:
        results = await asyncio.gather(*works, return_exceptions=True)
    except asyncio.CancelledError:  # some are open already: their servers hold cache for us
        for work in works:
            work.add_done_callback(_abort_if_open)
        raise
    for hop, result in zip(route, results, strict=True):
        if isinstance(result, ServerGone | ServerFull):
            swarm.avoid(hop.peer_id, result)
    failures = [result for result in results if isinstance(result, BaseException)]
    hops = [result for result in results if isinstance(result, HopSession)]
    if failures:
        for opened in hops:
            opened.abort()
        raise failures[0]
    log.debug("session.open route=%s", ",".join(f"{hop.start}:{hop.end}" for hop in route))
    return Chain(swarm, hops, openings, reasons, batch=batch)


def _plan_links(swarm: "SwarmClient", route: tuple[Hop, ...], names: list[str]) -> tuple[list[Opening], list[str]]:
    """What each server is asked for, and why its output is relayed where it is."""
    openings, reasons = [], []
    previous: str | None = None
    for index, hop in enumerate(route):
        following = route[index + 1] if index + 1 < len(route) else None
        why, target = "", None
        if following is not None:
            why = _why_relayed(swarm, hop, following)
            target = None if why else NextHop(peer_id=following.peer_id, session_id=names[index + 1])
        openings.append(
            Opening(
                heartbeat_s=HEARTBEAT_S,
                is_last=following is None,
                next_hop=target,
                previous=previous,
                trace=swarm.config.trace,
            )
        )
        reasons.append(why)
        previous = None if target is None else hop.peer_id
    return openings, reasons


def _why_relayed(swarm: "SwarmClient", hop: Hop, following: Hop) -> str:
    if not swarm.config.push:
        return _OFF
    if not (hop.protocol and following.protocol):
        return _STOCK
    return "" if swarm.is_link_good(hop.peer_id, following.peer_id) else _BAD_LINK


def _abort_if_open(opening: "asyncio.Task[HopSession]") -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().abort()
