"""How far away the servers are: round trips of small messages, measured again and again over libp2p.

A link that becomes slow counts as slow after its second slow sample; one sample alone says little. A call shows that a
server's handler is there; a ping is answered by its p2pd and costs the server nothing.
"""

import asyncio
import logging
import statistics
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection

from hivemind.p2p import PeerID
from hivemind.proto import runtime_pb2

from geopetals.swarm.network import GuardedP2P
from geopetals.swarm.probing import measure_rtt
from geopetals.swarm.wire import HANDLER, short_peer

log = logging.getLogger(__name__)

_SAMPLES = 3
_STALE_S = 60.0
_AT_ONCE = 64


class Distances:
    """Seconds for a round trip to each server that answers."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._samples: dict[str, deque[tuple[float, float]]] = {}

    def __contains__(self, peer_id: str) -> bool:
        return peer_id in self._samples

    def rtt_s(self, peer_id: str) -> float:
        """The median of the recent samples; the last one where all are old. Raises KeyError for an unknown server."""
        samples, now = self._samples[peer_id], self._clock()
        recent = [seconds for at, seconds in samples if now - at <= _STALE_S]
        return statistics.median(recent) if recent else samples[-1][1]

    def known(self) -> dict[str, float]:
        return {peer_id: self.rtt_s(peer_id) for peer_id in self._samples}

    def add(self, peer_id: str, rtt_s: float) -> None:
        self._samples.setdefault(peer_id, deque(maxlen=_SAMPLES)).append((self._clock(), rtt_s))

    def keep(self, peers: Collection[str]) -> None:
        """Forget all servers but these."""
        self._samples = {peer_id: samples for peer_id, samples in self._samples.items() if peer_id in peers}

    async def call(self, p2p: GuardedP2P, peers: Collection[str], timeout_s: Callable[[str], float]) -> None:
        """Call each of the servers; who does not answer in time is forgotten."""

        async def one(peer_id: str) -> float | None:
            return await self._call(p2p, peer_id, timeout_s(peer_id))

        await self._sample(peers, one)

    async def ping(self, p2p: GuardedP2P, peers: Collection[str]) -> None:
        """Ping each of the servers; who does not answer is forgotten."""

        async def one(peer_id: str) -> float | None:
            try:
                return await measure_rtt(p2p, peer_id)
            except Exception as error:  # noqa: BLE001 - whatever a stranger's machine does, we only do not use it
                log.info("ping.failed server=%s reason=%r", short_peer(peer_id), error)
                return None

        await self._sample(peers, one)

    async def _sample(self, peers: Collection[str], measure: Callable[[str], Awaitable[float | None]]) -> None:
        at_once = asyncio.Semaphore(_AT_ONCE)

        async def one(peer_id: str) -> None:
            async with at_once:
                rtt_s = await measure(peer_id)
            if rtt_s is None:
                self._samples.pop(peer_id, None)
            else:
                self.add(peer_id, rtt_s)

        await asyncio.gather(*map(one, peers))

    async def _call(self, p2p: GuardedP2P, peer_id: str, timeout_s: float) -> float | None:
        """The first call to a server also connects: it is made twice then."""
        took_s = None
        try:
            async with asyncio.timeout(timeout_s):
                for _ in range(1 if peer_id in self._samples else 2):
                    began = self._clock()
                    await p2p.call_protobuf_handler(
                        PeerID.from_base58(peer_id),
                        f"{HANDLER}.rpc_info",
                        runtime_pb2.ExpertUID(),
                        runtime_pb2.ExpertInfo,
                    )
                    took_s = self._clock() - began
        except Exception as error:  # noqa: BLE001 - whatever a stranger's machine does, we only do not use it
            log.info("call.failed server=%s reason=%r", short_peer(peer_id), error)
        return took_s
