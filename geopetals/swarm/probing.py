"""Round trips from this process to other members, measured over the connections that sessions will use.

libp2p's own ping is answered by p2pd: no computing delays it, and servers without blocks answer as well. The first
sample on a connection also pays for what comes first on one; the median of the recent ones is what is told.
"""

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from statistics import median

from geopetals.coordinator.messages import LinkSample
from geopetals.swarm.network import GuardedP2P, Network, peer_id_of
from geopetals.swarm.reachability import links
from geopetals.swarm.wire import short_peer

log = logging.getLogger(__name__)

_PING, _PING_BYTES = "/ipfs/ping/1.0.0", 32
_PERIOD_S = 2.0
_MOST_PER_S = 20.0
_TIMEOUT_S = 5.0
_PINGS = 3
_WANTED_S = 60.0
_RECENT, _RECENT_S = 3, 30.0
"""A link that changes is told as such after two of three rounds."""


async def measure_rtt(p2p: GuardedP2P, peer_id: str) -> float:
    """Seconds, the median of three after the stream is open. Raises what the network raises, and TimeoutError."""
    async with asyncio.timeout(_TIMEOUT_S):
        _, reader, writer = await p2p.call_binary_stream_handler(peer_id_of(peer_id), _PING)
        try:
            took = []
            for _ in range(_PINGS):
                sent = os.urandom(_PING_BYTES)
                began = time.perf_counter()
                writer.write(sent)
                if await reader.readexactly(_PING_BYTES) != sent:
                    raise ConnectionError("the answer to a ping was another one")
                took.append(time.perf_counter() - began)
            return median(took)
        finally:
            writer.close()


class _Link:
    def __init__(self) -> None:
        self.wanted_at = 0.0
        self.relayed = False
        self.samples: deque[tuple[float, float]] = deque(maxlen=_RECENT)

    def rtt_s(self, now: float) -> float | None:
        recent = [rtt_s for at, rtt_s in self.samples if now - at < _RECENT_S]
        return median(recent) if recent else None


class Prober:
    """Measures what is wanted, each link every two seconds or less often if there are many."""

    def __init__(self, network: Callable[[], Network], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._network, self._clock = network, clock
        self._links: dict[str, _Link] = {}

    def want(self, peers: Iterable[str]) -> None:
        """Measure these for the next minute."""
        now, own = self._clock(), self._network().peer_id
        for peer in peers:
            if peer != own:
                self._links.setdefault(peer, _Link()).wanted_at = now

    def samples(self) -> tuple[LinkSample, ...]:
        """What is known now, of recent measurements."""
        now = self._clock()
        found = ((peer, link.rtt_s(now), link.relayed) for peer, link in self._links.items())
        return tuple(LinkSample(peer, rtt_s, relayed) for peer, rtt_s, relayed in found if rtt_s is not None)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            began = time.monotonic()
            await self.measure_all()
            await asyncio.sleep(max(_PERIOD_S - (time.monotonic() - began), 1 / _MOST_PER_S))

    async def measure_all(self) -> None:
        """One sample of each link, not too many a second."""
        now = self._clock()
        self._links = {peer: link for peer, link in self._links.items() if now - link.wanted_at < _WANTED_S}
        for peer in list(self._links):
            await asyncio.gather(self._measure(peer), asyncio.sleep(1 / _MOST_PER_S))
        await self._note_relays()

    async def _measure(self, peer: str) -> None:
        try:
            rtt_s = await measure_rtt(self._network().p2p, peer)
        except Exception as error:  # noqa: BLE001 - whatever the reason, there is no measurement; old ones age
            log.debug("probe.failed peer=%s reason=%r", short_peer(peer), error)
            return
        if (link := self._links.get(peer)) is not None:
            link.samples.append((self._clock(), rtt_s))

    async def _note_relays(self) -> None:
        if not self._links:
            return
        try:
            relayed = await links(self._network().p2p)
        except Exception as error:  # noqa: BLE001 - as above
            log.debug("probe.no_peers reason=%r", error)
            return
        for peer, link in self._links.items():
            link.relayed = relayed.get(peer, link.relayed)
