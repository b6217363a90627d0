"""The client's view of a swarm: which servers there are, how far away they are, and which ones failed lately."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from geopetals.client.avoidance import Avoidance
from geopetals.client.chain_pass import forward_batches
from geopetals.client.config import ClientConfig
from geopetals.client.coordination import Coordination
from geopetals.client.distances import Distances
from geopetals.client.known_servers import KnownServers
from geopetals.client.lease import Lease
from geopetals.client.pass_calls import PassOptions, call_backward, call_forward
from geopetals.client.routing import Candidate, Hop, shortest_chain
from geopetals.client.runtime import LoopThread
from geopetals.client.spot_check import SpotChecks
from geopetals.coordinator.messages import ChainHop, LinkSample
from geopetals.errors import NoChain, ServerFull, ServerGone, SwarmFailure
from geopetals.join_token import JoinToken
from geopetals.plan import Span
from geopetals.swarm.dht_peers import meet
from geopetals.swarm.heartbeat import tick
from geopetals.swarm.identity import ModelIdentity
from geopetals.swarm.membership import Membership
from geopetals.swarm.network import Network, NetworkConfig
from geopetals.swarm.reachability import links
from geopetals.swarm.records import ServerRecord, check_same_model, read_servers

if TYPE_CHECKING:
    from geopetals.client.chain import Chain

log = logging.getLogger(__name__)

Result = TypeVar("Result")
_UNKNOWN_BLOCK_S = 0.05
_FAILED_PING_S = 0.5


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
        token: JoinToken | None = None,
    ) -> None:
        """`token`: of a swarm that has a coordinator; it says who that is, and is what to show there."""
        self.swarm, self.num_blocks, self.hidden_size, self.config = swarm, num_blocks, hidden_size, config
        self._identity = identity
        self._coordinator = None if token is None else token.coordinator
        self._membership = Membership(token) if token is not None and self._coordinator is not None else None
        self.coordination: Coordination | None = None
        self._network_config = NetworkConfig(
            initial_peers=peers,
            client_only=True,
            validator=None if self._membership is None else self._membership.records,
        )
        self._loop = LoopThread()
        self._network: Network | None = None
        self._known = KnownServers()
        self._servers: list[ServerRecord] = []
        self._distances = Distances()
        self._avoided = Avoidance(ban_s=config.ban_timeout)
        self._asked_at = self._refreshed_at = float("-inf")
        self._refreshing = asyncio.Lock()
        self._chains: set[Chain] = set()
        self._ticking: asyncio.Task[None] | None = None
        self._updating: asyncio.Task[None] | None = None
        self._trusting: asyncio.Task[None] | None = None
        self.spot_checks = SpotChecks(self, rate=config.spot_check_rate)

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
        if self.coordination is not None:
            await self.coordination.close()
        if self._trusting is not None:
            self._trusting.cancel()
        await self.spot_checks.close()
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
        if self._membership is not None:
            self._trusting = self._membership.keep_current(self._network)
            self.coordination = Coordination(
                self._network.p2p,
                self._membership,
                on_connected=self._meet_coordinator,
                measure=self._measure_links,
                patience_s=self.config.coordinator_timeout,
                queue_timeout_s=self.config.queue_timeout,
            )

    async def _meet_coordinator(self) -> None:
        """It may have been away, so that the DHT nodes have forgotten each other."""
        if self._coordinator is not None:
            await meet(self.network.node, [self._coordinator.peer_id])

    def lease(self, *, output_tokens: int | None = None) -> Lease:
        """For a new session that will generate so many tokens, if that is known."""
        return Lease(self.coordination, output_tokens=output_tokens, on_wait=self.config.on_wait)

    def hops_of(self, chain: tuple[ChainHop, ...]) -> tuple[Hop, ...]:
        """A chain that the coordinator advises; empty if this client would not take it."""
        covered = [block for hop in chain for block in range(hop.start, min(hop.end, self.num_blocks + 1))]
        if covered != list(range(self.num_blocks)):
            return ()
        if not all(self._is_allowed(hop.peer_id) for hop in chain):
            return ()
        before, self._servers = self._servers, self._known.learn(chain)
        if self._servers != before:
            self._refreshed_at = float("-inf")  # it knows more than the DHT did
        if any(self._avoided.is_banned(hop.peer_id) for hop in chain):
            return ()
        protocols = {server.peer_id: server.protocol for server in self._servers}
        return tuple(
            Hop(peer_id=hop.peer_id, start=hop.start, end=hop.end, protocol=protocols[hop.peer_id]) for hop in chain
        )

    async def chain_async(self, *, refresh: bool = False, start: int = 0, end: int | None = None) -> tuple[Hop, ...]:
        """The best chain through the blocks [start, end) now; by default all. Raises NoChain that names the blocks
        without a server.
        """
        span = Span(start, self.num_blocks if end is None else end)
        if not refresh and not self._is_outdated():
            try:
                return self._shortest_chain(span)
            except NoChain as error:
                log.info("servers.refresh reason=%s", error)
        await self.refresh_async()
        try:
            return self._shortest_chain(span)
        except NoChain:
            return self._shortest_chain(span, last_resort=True)

    def _shortest_chain(self, span: Span, *, last_resort: bool = False) -> tuple[Hop, ...]:
        return shortest_chain(
            self._candidates(last_resort=last_resort),
            self.num_blocks,
            span=span,
            push=self.config.push,
            bad_links=self._avoided.bad_links(),
        )

    def replicas_of(self, hop: Hop) -> tuple[Hop, ...]:
        """Other servers for a hop's blocks; empty if there are none."""
        others = [candidate for candidate in self._candidates() if candidate.peer_id != hop.peer_id]
        try:
            return shortest_chain(others, self.num_blocks, span=Span(hop.start, hop.end), push=False)
        except NoChain:
            return ()

    def _is_outdated(self) -> bool:
        return time.monotonic() - self._refreshed_at > self.config.update_period

    def avoid(self, peer_id: str, error: SwarmFailure) -> None:
        """Route around a server for a while."""
        self._avoided.add(peer_id, error)

    def avoid_link(self, peer_id: str, following: str) -> None:
        """Relay between two servers for a while."""
        self._avoided.add_link(peer_id, following)

    def is_link_good(self, peer_id: str, following: str) -> bool:
        return self._avoided.is_link_good(peer_id, following)

    def longest_rtt_s(self, route: tuple[Hop, ...]) -> float:
        """To any server of a route, as far as that is known."""
        known = (self._distances.rtt_s(hop.peer_id) for hop in route if hop.peer_id in self._distances)
        return max(known, default=0.0)

    async def refresh_async(self) -> None:
        """Read the DHT and measure the round trips to all servers."""
        async with self._refreshing:
            asked_at = time.monotonic()
            servers = await read_servers(self.network.node, self.swarm, self.num_blocks)
            servers = check_same_model(self._identity, servers)
            servers = self._known.update(server for server in servers if self._is_allowed(server.peer_id))
            self._servers = servers
            peers = {server.peer_id for server in self._servers}
            self._distances.keep(peers)
            await self._distances.call(self.network.p2p, peers, self._ping_timeout_s)
            await meet(self.network.node, [peer_id for peer_id in peers if peer_id in self._distances])
            self._asked_at, self._refreshed_at = asked_at, time.monotonic()

    def _is_allowed(self, peer_id: str) -> bool:
        allowed = self.config.allowed_servers
        return peer_id not in self.config.blocked_servers and (allowed is None or peer_id in allowed)

    def _ping_timeout_s(self, peer_id: str) -> float:
        """One that has just failed gets less time for an answer: somebody may be waiting for the others."""
        limit_s = self.config.ping_timeout
        return min(limit_s, _FAILED_PING_S) if self._avoided.is_banned(peer_id) else limit_s

    async def _measure_links(self, named: tuple[str, ...]) -> tuple[LinkSample, ...]:
        """Round trips to all servers that the DHT or the coordinator names, for the coordinator."""
        p2p = self.network.p2p
        allowed = {peer_id for peer_id in named if self._is_allowed(peer_id)}
        await self._distances.ping(p2p, allowed | {server.peer_id for server in self._servers})
        is_relayed = await links(p2p)
        return tuple(
            LinkSample(peer_id, rtt_s, is_relayed.get(peer_id, False))
            for peer_id, rtt_s in self._distances.known().items()
        )

    def _candidates(self, *, last_resort: bool = False) -> list[Candidate]:
        """Servers that answer. As a `last_resort` those too that failed but have answered since."""
        answered_at = self._asked_at if last_resort else None
        candidates = []
        for server in self._servers:
            penalty_s = self._avoided.penalty_s(server.peer_id, answered_at=answered_at)
            if server.peer_id in self._distances and penalty_s != float("inf"):
                candidates.append(
                    Candidate(
                        peer_id=server.peer_id,
                        start=server.start,
                        end=server.end,
                        rtt_s=self._distances.rtt_s(server.peer_id),
                        block_s=1 / server.inference_rps if server.inference_rps else _UNKNOWN_BLOCK_S,
                        penalty_s=penalty_s,
                        protocol=server.protocol,
                        links=server.links,
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
            return await call_forward(self.network.p2p, hop, self.swarm, hidden, prompts, self._pass_options())
        except (ServerGone, ServerFull) as error:
            self.avoid(hop.peer_id, error)
            raise

    async def backward_on(
        self, hop: Hop, hidden: torch.Tensor, grad_output: torch.Tensor, prompts: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """rpc_backward on one server; if it fails, chains avoid it from now on."""
        try:
            return await call_backward(
                self.network.p2p, hop, self.swarm, hidden, grad_output, prompts, self._pass_options()
            )
        except (ServerGone, ServerFull) as error:
            self.avoid(hop.peer_id, error)
            raise

    def _pass_options(self) -> PassOptions:
        return PassOptions(
            connect_timeout_s=self.config.connect_timeout,
            request_timeout_s=self.config.request_timeout,
            credential=b"" if self._membership is None else self._membership.certificate,
        )
