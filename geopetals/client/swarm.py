"""The client's view of a swarm: which servers there are, how far away they are, and which ones failed lately."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from hivemind.p2p import PeerID
from hivemind.proto import runtime_pb2

from geopetals.client.chain_pass import forward_batches
from geopetals.client.config import ClientConfig
from geopetals.client.pass_calls import call_backward, call_forward
from geopetals.client.routing import Candidate, Hop, shortest_chain
from geopetals.client.runtime import LoopThread
from geopetals.errors import NoChain, ServerFull, ServerGone, SwarmFailure
from geopetals.swarm.heartbeat import tick
from geopetals.swarm.identity import ModelIdentity
from geopetals.swarm.network import Network, NetworkConfig
from geopetals.swarm.records import ServerRecord, check_same_model, read_servers
from geopetals.swarm.wire import HANDLER, short_peer

if TYPE_CHECKING:
    from geopetals.client.chain import Chain

log = logging.getLogger(__name__)

Result = TypeVar("Result")
_FULL_PENALTY_S, _LONGEST_FULL_S = 10.0, 60.0
_UNKNOWN_BLOCK_S = 0.05
_FAILED_PENALTY_S = 1000.0
_FAILED_PING_S = 0.5
_BAD_LINK_S = 60.0
_NOBODY = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Avoided:
    """Since and until when (monotonic clock, seconds), and at what price."""

    since: float
    until: float
    penalty_s: float


class SwarmClient:
    """A connection to one swarm, with an event loop of its own. Methods named `*_async` run on that loop."""

    def __init__(
        self,
        *,
        peers: tuple[str, ...],
        swarm: str,
        num_blocks: int,
        hidden_size: int,
        identity: ModelIdentity,
        config: ClientConfig,
    ) -> None:
        self.swarm, self.num_blocks, self.hidden_size, self.config = swarm, num_blocks, hidden_size, config
        self._identity = identity
        self._network_config = NetworkConfig(initial_peers=peers, client_only=True)
        self._loop = LoopThread()
        self._network: Network | None = None
        self._servers: list[ServerRecord] = []
        self._rtt_s: dict[str, float] = {}
        self._avoided: dict[str, _Avoided] = {}
        self._asked_at = self._refreshed_at = float("-inf")
        self._refreshing = asyncio.Lock()
        self._bad_links: dict[tuple[str, str], float] = {}
        self._chains: set[Chain] = set()
        self._ticking: asyncio.Task[None] | None = None
        self._updating: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Raises NetworkError if no peer answers and SwarmMismatch if the swarm serves another model."""
        try:
            self.run(self._start_async())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Leave the swarm. Safe to call twice, and from any thread."""
        network, self._network = self._network, None
        if network is not None:
            try:
                self._loop.run(self._stop(network))
            except RuntimeError:  # called by the garbage collector on the loop's own thread: the daemon dies with us
                network.p2p._terminate()
        self._loop.stop()

    def watch(self, chain: "Chain") -> None:
        """Give the chain ticks, and close its streams with the connection if nobody does it earlier."""
        self._chains.add(chain)
        if self._ticking is None:
            self._ticking = asyncio.create_task(tick(self._tick))

    def unwatch(self, chain: "Chain") -> None:
        self._chains.discard(chain)
        if not self._chains and self._ticking is not None:
            self._ticking.cancel()
            self._ticking = None

    def _tick(self, seconds: float) -> None:
        for chain in list(self._chains):
            chain.tick(seconds)
        if self._is_outdated() and self._updating is None:  # sessions may last: whom could they turn to?
            self._updating = asyncio.create_task(self._update())

    async def _update(self) -> None:
        try:
            await self.refresh_async()
        except Exception as error:  # noqa: BLE001 - nobody waits for it; who needs it refreshes again
            log.info("refresh.failed reason=%r", error)
            self._refreshed_at = time.monotonic()
        finally:
            self._updating = None

    async def _stop(self, network: Network) -> None:
        for chain in list(self._chains):
            chain.abort()
        await network.stop()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return self._loop.run(work)

    def call_soon(self, function: Callable[[], object]) -> None:
        self._loop.call_soon(function)

    @property
    def network(self) -> Network:
        if self._network is None:
            raise SwarmFailure("the connection to the swarm is closed: open the model again with from_pretrained().")
        return self._network

    @property
    def servers(self) -> list[ServerRecord]:
        """The servers found at the last refresh."""
        return list(self._servers)

    async def _start_async(self) -> None:
        self._network = await Network.start(self._network_config)
        await self.refresh_async()

    async def chain_async(self, *, refresh: bool = False, start: int = 0, end: int | None = None) -> tuple[Hop, ...]:
        """The best chain through the blocks [start, end) now; by default all. Raises NoChain that names the blocks
        without a server.
        """
        end = self.num_blocks if end is None else end
        if not refresh and not self._is_outdated():
            try:
                return _chain_within(self._candidates(), start, end, self.num_blocks)
            except NoChain as error:
                log.info("servers.refresh reason=%s", error)
        await self.refresh_async()
        try:
            return _chain_within(self._candidates(), start, end, self.num_blocks)
        except NoChain:
            return _chain_within(self._candidates(last_resort=True), start, end, self.num_blocks)

    def _is_outdated(self) -> bool:
        return time.monotonic() - self._refreshed_at > self.config.update_period

    def avoid(self, peer_id: str, error: SwarmFailure) -> None:
        """Route around a server for a while: at a price if it is only full, at any price if it failed."""
        now, until_s, penalty_s = time.monotonic(), self.config.ban_timeout, float("inf")
        if isinstance(error, ServerFull):
            penalty_s = _FULL_PENALTY_S
            if error.free_in_s is not None:
                until_s = min(error.free_in_s, _LONGEST_FULL_S)
        self._avoided[peer_id] = _Avoided(since=now, until=now + until_s, penalty_s=penalty_s)
        log.info("server.avoided server=%s reason=%s", short_peer(peer_id), error)

    def avoid_link(self, peer_id: str, following: str) -> None:
        """Relay between two servers for a while: both are there, but not for each other."""
        self._bad_links[peer_id, following] = time.monotonic() + _BAD_LINK_S

    def is_link_good(self, peer_id: str, following: str) -> bool:
        return self._bad_links.get((peer_id, following), 0.0) < time.monotonic()

    async def refresh_async(self) -> None:
        """Read the DHT and measure the round trips to all servers."""
        async with self._refreshing:
            asked_at = time.monotonic()
            servers = await read_servers(self.network.node, self.swarm, self.num_blocks)
            servers = check_same_model(self._identity, servers)
            self._servers = [server for server in servers if server.is_online and self._is_allowed(server.peer_id)]
            times = await asyncio.gather(*(self._ping(server.peer_id) for server in self._servers))
            self._rtt_s = {
                server.peer_id: rtt_s for server, rtt_s in zip(self._servers, times, strict=True) if rtt_s is not None
            }
            self._asked_at, self._refreshed_at = asked_at, time.monotonic()

    def _is_allowed(self, peer_id: str) -> bool:
        allowed = self.config.allowed_servers
        return peer_id not in self.config.blocked_servers and (allowed is None or peer_id in allowed)

    async def _ping(self, peer_id: str) -> float | None:
        """Seconds for a round trip to a server; None if it does not answer. The first call also connects.

        One that has just failed gets less time for it: somebody may be waiting for the others.
        """
        best = None
        avoided = self._avoided.get(peer_id)
        has_failed = avoided is not None and avoided.penalty_s == float("inf") and time.monotonic() < avoided.until
        limit_s = self.config.ping_timeout
        try:
            async with asyncio.timeout(min(limit_s, _FAILED_PING_S) if has_failed else limit_s):
                for _ in range(2):
                    began = time.perf_counter()
                    await self.network.p2p.call_protobuf_handler(
                        PeerID.from_base58(peer_id),
                        f"{HANDLER}.rpc_info",
                        runtime_pb2.ExpertUID(),
                        runtime_pb2.ExpertInfo,
                    )
                    took_s = time.perf_counter() - began
                    best = took_s if best is None else min(best, took_s)
        except Exception as error:  # noqa: BLE001 - whatever a stranger's machine does, we only do not use it
            log.info("ping.failed server=%s reason=%r", short_peer(peer_id), error)
        return best

    def _candidates(self, *, last_resort: bool = False) -> list[Candidate]:
        """Servers that answer. As a `last_resort` those too that failed but have answered since: they may have failed
        to do one thing, or have been started again.
        """
        now = time.monotonic()
        candidates = []
        for server in self._servers:
            avoided = self._avoided.get(server.peer_id)
            penalty_s = avoided.penalty_s if avoided is not None and now < avoided.until else 0.0
            if avoided is not None and last_resort and avoided.since < self._asked_at:
                penalty_s = min(penalty_s, _FAILED_PENALTY_S)
            if server.peer_id in self._rtt_s and penalty_s != float("inf"):
                candidates.append(
                    Candidate(
                        peer_id=server.peer_id,
                        start=server.start,
                        end=server.end,
                        rtt_s=self._rtt_s[server.peer_id],
                        block_s=1 / server.inference_rps if server.inference_rps else _UNKNOWN_BLOCK_S,
                        penalty_s=penalty_s,
                        protocol=server.protocol,
                    )
                )
        return candidates

    async def forward_async(self, hidden: torch.Tensor, prompts: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states [batch, tokens, hidden] through all blocks, nothing cached. On failure by another chain."""
        output, _ = await forward_batches(self, hidden, prompts)
        return output

    async def forward_on(self, hop: Hop, hidden: torch.Tensor, prompts: torch.Tensor | None) -> torch.Tensor:
        """rpc_forward on one server; if it fails, chains avoid it from now on."""
        try:
            return await call_forward(self.network.p2p, hop, self.swarm, hidden, prompts, **self._timeouts())
        except (ServerGone, ServerFull) as error:
            self.avoid(hop.peer_id, error)
            raise

    async def backward_on(
        self, hop: Hop, hidden: torch.Tensor, grad_output: torch.Tensor, prompts: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """rpc_backward on one server; if it fails, chains avoid it from now on."""
        try:
            return await call_backward(
                self.network.p2p, hop, self.swarm, hidden, grad_output, prompts, **self._timeouts()
            )
        except (ServerGone, ServerFull) as error:
            self.avoid(hop.peer_id, error)
            raise

    def _timeouts(self) -> dict[str, float]:
        return {
            "connect_timeout_s": self.config.connect_timeout,
            "request_timeout_s": self.config.request_timeout,
        }


def _chain_within(candidates: list[Candidate], start: int, end: int, num_blocks: int) -> tuple[Hop, ...]:
    """The cheapest chain through [start, end): whatever is outside is taken to be served at no cost."""
    inside = [
        replace(server, start=max(server.start, start), end=min(server.end, end))
        for server in candidates
        if server.start < end and start < server.end
    ]
    outside = [
        Candidate(peer_id=_NOBODY, start=first, end=last, rtt_s=0.0, block_s=0.0)
        for first, last in ((0, start), (end, num_blocks))
        if first < last
    ]
    return tuple(hop for hop in shortest_chain(inside + outside, num_blocks) if hop.peer_id != _NOBODY)
