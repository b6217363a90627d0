"""How much of a server one peer may take: streams, calls and messages, at a time and per second.

Peer ids cost nothing, so that this keeps an honest peer's mistake or one attacker from being noticed by others; to keep
many identities out is the business of credentials.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

from geopetals.errors import ServerFull
from geopetals.swarm.wire import WireError


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of one peer. `*_per_s` are sustained rates, of which a peer may save up `burst_s` seconds' worth.

    `sessions`: inference streams. `links`: push streams that have not named a session yet. `calls`: unary calls and
    passes that run or wait; `passes` of them compute, or are next, the others wait. Sessions and messages that
    come too fast are read later, everything else that is too much is refused.
    """

    sessions: int = 256
    links: int = 64
    calls: int = 256
    passes: int = 4
    sessions_per_s: float = 50.0
    calls_per_s: float = 200.0
    messages_per_s: float = 4000.0
    burst_s: float = 4.0
    message_burst_s: float = 0.1


class Bucket:
    """Tokens that come at `rate` per second, up to `most`. Full at first."""

    __slots__ = ("_at", "_level", "_most", "_rate")

    def __init__(self, rate: float, most: float, now: float) -> None:
        self._rate, self._most = rate, max(most, 1.0)
        self._level, self._at = self._most, now

    def take(self, now: float) -> float:
        """Take a token, on credit if there is none; returns the seconds until it is paid."""
        self._level = min(self._most, self._level + (now - self._at) * self._rate) - 1.0
        self._at = now
        return 0.0 if self._level >= 0 else -self._level / self._rate

    def take_if_there(self, now: float) -> bool:
        if self.take(now) == 0.0:
            return True
        self._level += 1.0
        return False


class _Peer:
    """What one peer has and does now."""

    def __init__(self, limits: Limits, now: float) -> None:
        burst_s = limits.burst_s
        self.sessions = self.links = self.calls = 0
        self.opening = Bucket(limits.sessions_per_s, limits.sessions_per_s * burst_s, now)
        self.calling = Bucket(limits.calls_per_s, limits.calls_per_s * burst_s, now)
        self.messages = Bucket(limits.messages_per_s, limits.messages_per_s * limits.message_burst_s, now)
        self.passes = asyncio.Semaphore(limits.passes)
        self.large_message = asyncio.Lock()

    @property
    def is_idle(self) -> bool:
        return not (self.sessions or self.links or self.calls)


_REMEMBERED_PEERS = 4096


class PeerLimits:
    """The limits of every peer of one server. Lives on the event loop."""

    def __init__(self, limits: Limits, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._peers: dict[str, _Peer] = {}

    @contextlib.contextmanager
    def session(self, peer: str) -> Iterator[None]:
        """An inference stream. Raises ServerFull: another server may have room."""
        known, limits = self._of(peer), self._limits
        if known.sessions >= limits.sessions:
            raise ServerFull(f"a peer has at most {limits.sessions} sessions at a time on this server.")
        known.sessions += 1
        try:
            yield
        finally:
            known.sessions -= 1

    @contextlib.contextmanager
    def link(self, peer: str) -> Iterator[None]:
        """A push stream that has yet to name its session. Raises WireError."""
        known = self._of(peer)
        if known.links >= self._limits.links:
            raise WireError(f"a peer opens at most {self._limits.links} push streams at a time")
        known.links += 1
        try:
            yield
        finally:
            known.links -= 1

    @contextlib.contextmanager
    def call(self, peer: str) -> Iterator[None]:
        """A unary call, or a pass on a stream. Raises ServerFull."""
        known, limits = self._of(peer), self._limits
        if known.calls >= limits.calls:
            raise ServerFull(f"a peer has at most {limits.calls} calls at a time on this server.")
        if not known.calling.take_if_there(self._clock()):
            raise ServerFull(f"a peer makes at most {limits.calls_per_s:.0f} calls a second to this server.")
        known.calls += 1
        try:
            yield
        finally:
            known.calls -= 1

    @contextlib.asynccontextmanager
    async def compute_pass(self, peer: str) -> AsyncIterator[None]:
        """One of the few passes of a peer that may wait in line for the device: peers take turns, not calls."""
        async with self._of(peer).passes:
            yield

    async def opening(self, peer: str) -> None:
        """Wait until the peer may open another session."""
        wait_s = self._of(peer).opening.take(self._clock())
        if wait_s > 0:
            await asyncio.sleep(wait_s)

    async def message(self, peer: str) -> None:
        """Wait until the peer may send another message: what is in a buffer is read without ever giving way."""
        wait_s = self._of(peer).messages.take(self._clock())
        if wait_s > 0:
            await asyncio.sleep(wait_s)

    def large_message(self, peer: str) -> asyncio.Lock:
        """Held while a large message of the peer is read: one at a time is in memory half-way."""
        return self._of(peer).large_message

    def _of(self, peer: str) -> _Peer:
        known = self._peers.get(peer)
        if known is None:
            if len(self._peers) >= _REMEMBERED_PEERS:
                self._peers = {name: other for name, other in self._peers.items() if not other.is_idle}
            known = self._peers[peer] = _Peer(self._limits, self._clock())
        return known
