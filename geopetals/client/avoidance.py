"""Servers and links that failed lately: routes go around them for a while, at a price or at any price."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from geopetals.errors import ServerFull, ServerMoving, SwarmFailure
from geopetals.swarm.wire import short_peer

log = logging.getLogger(__name__)

_FULL_PENALTY_S, _LONGEST_FULL_S = 10.0, 60.0
_FAILED_PENALTY_S = 1000.0
_BAD_LINK_S = 60.0
_MOVING_S = 5.0
"""A server that gives up its blocks says so in the DHT within that time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Avoided:
    """Since and until when, and at what price in seconds per token."""

    since: float
    until: float
    penalty_s: float


class Avoidance:
    """What a client remembers of failures."""

    def __init__(self, *, ban_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`ban_s`: how long a server that failed is avoided."""
        self._ban_s, self._clock = ban_s, clock
        self._servers: dict[str, _Avoided] = {}
        self._links: dict[tuple[str, str], float] = {}

    def __contains__(self, peer_id: str) -> bool:
        return peer_id in self._servers

    def add(self, peer_id: str, error: SwarmFailure) -> None:
        """At a price if the server is only full, at any price if it failed."""
        now, until_s, penalty_s = self._clock(), self._ban_s, float("inf")
        if isinstance(error, ServerFull):
            penalty_s = _FULL_PENALTY_S
            if isinstance(error, ServerMoving):
                until_s = _MOVING_S
            elif error.free_in_s is not None:
                until_s = min(error.free_in_s, _LONGEST_FULL_S)
        self._servers[peer_id] = _Avoided(since=now, until=now + until_s, penalty_s=penalty_s)
        log.info("server.avoided server=%s reason=%s", short_peer(peer_id), error)

    def add_link(self, peer_id: str, following: str) -> None:
        """Both are there, but not for each other."""
        self._links[peer_id, following] = self._clock() + _BAD_LINK_S

    def is_link_good(self, peer_id: str, following: str) -> bool:
        return self._links.get((peer_id, following), 0.0) < self._clock()

    def bad_links(self) -> list[tuple[str, str]]:
        return [pair for pair in self._links if not self.is_link_good(*pair)]

    def is_banned(self, peer_id: str) -> bool:
        return self.penalty_s(peer_id) == float("inf")

    def penalty_s(self, peer_id: str, *, answered_at: float | None = None) -> float:
        """The price of a server now. With `answered_at`, failures before that do not count as for ever: the server may
        have failed to do one thing, or have been started again.
        """
        avoided = self._servers.get(peer_id)
        if avoided is None or self._clock() >= avoided.until:
            return 0.0
        if answered_at is not None and avoided.since < answered_at:
            return min(avoided.penalty_s, _FAILED_PENALTY_S)
        return avoided.penalty_s
