"""A relay: a peer with a public address that passes on what others send to servers behind NAT. It sees only bytes: both
ends encrypt. It is a node of the DHT, too, so that a swarm of servers behind NAT alone keeps its records.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from geopetals.errors import NetworkError
from geopetals.join_token import JoinToken
from geopetals.progress import Reporter
from geopetals.swarm import relay_records
from geopetals.swarm.membership import Membership
from geopetals.swarm.network import Network, NetworkConfig, lone_p2pd, new_identity
from geopetals.swarm.p2pd_options import RelayLimits, maddr
from geopetals.swarm.relay_member import RelayMember
from geopetals.swarm.relay_protocol import Granted, ask_limits

log = logging.getLogger(__name__)

_MOST_STARTS = 40
_PROBE_TIMEOUT_S = 5.0
_RESTART_DELAY_S = 1.0
_MAX_RESTARTS_IN_A_ROW = 5
_GO_THREADS = "GOMAXPROCS"
_ANY_HOST = {"0.0.0.0": "127.0.0.1", "::": "::1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadyRelay:
    """A relay that grants what it was told to."""

    peer_id: str
    p2pd_pid: int
    addresses: tuple[str, ...]
    limits: RelayLimits
    starts: int
    """How often p2pd was started until it granted this."""


class Relay:
    """One run of a relay; `run()` returns when `stop` is set. p2pd is supervised: when it dies, another takes its place
    with the same identity and port.
    """

    def __init__(
        self,
        config: NetworkConfig,
        reporter: Reporter,
        on_ready: Callable[[ReadyRelay], None],
        *,
        token: JoinToken | None = None,
    ) -> None:
        """`token`: of the swarm whose servers are to find this relay; its role is "relay" where there is a
        coordinator.
        """
        self._limits = config.relay_limits or RelayLimits()
        identity = config.identity or new_identity()  # the same after p2pd's next start
        self._config = replace(config, relay_limits=self._limits, identity=identity)
        self._membership = self._member = None
        if token is not None and token.coordinator is not None:
            self._membership = Membership(token, identity=identity)
            self._member = RelayMember(self._membership)
            self._config = replace(self._config, validator=self._membership.records)
        self._reporter, self._on_ready = reporter, on_ready

    async def run(self, stop: asyncio.Event) -> None:
        """Raises NetworkError when the relay cannot start."""
        stopped = asyncio.create_task(stop.wait())
        try:
            network: Network | None = await self._start(self._config)
            while network is not None:
                network = await self._serve(network, stopped)
        finally:
            stopped.cancel()

    async def _serve(self, network: Network, stopped: "asyncio.Task[bool]") -> Network | None:
        """Until `stopped`, or until p2pd dies: then the one that takes its place."""
        daemon: asyncio.Task[Any] = asyncio.create_task(network.p2p.wait_daemon())
        tasks = [daemon, asyncio.create_task(self._keep_announcing(network))]
        if self._membership is not None:
            tasks.append(self._membership.keep_current(network))
        try:
            await asyncio.wait({daemon, stopped}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await network.stop()
        if stopped.done():
            return None
        log.warning("p2pd.died relay=%s", network.peer_id)
        self._reporter.line("p2pd died: starting it again")
        return await self._restart(network.config)

    async def _restart(self, config: NetworkConfig) -> Network:
        for attempt in range(_MAX_RESTARTS_IN_A_ROW):
            try:
                return await self._start(config)
            except NetworkError as error:
                log.warning("p2pd.restart_failed attempt=%d reason=%s", attempt, error)
                await asyncio.sleep(_RESTART_DELAY_S * 2**attempt)
        return await self._start(replace(config, initial_peers=()))

    async def _start(self, config: NetworkConfig) -> Network:
        """p2pd starts two relay services, and in many of its starts the one with libp2p's own limits, 128 KiB and
        2 minutes, answers: it is asked what it grants, and started again until that is right.
        """
        for start in range(1, _MOST_STARTS + 1):
            with _scheduled_otherwise(start):
                network = await Network.start(config)
            try:
                granted = await _probe(network)
            except BaseException:
                await network.stop()
                raise
            if granted == Granted(data_bytes=self._limits.data_bytes, seconds=self._limits.seconds):
                return await self._ready(network, start)
            log.info("relay.wrong_limits start=%d granted=%s", start, granted)
            await network.stop()
            config = replace(config, port=network.config.port)
        raise NetworkError(f"p2pd did not take the relay's limits in {_MOST_STARTS} starts: start the relay again.")

    async def _ready(self, network: Network, starts: int) -> Network:
        try:
            if not await self._announce(network):
                self._reporter.line("the coordinator does not answer: servers do not find this relay by themselves yet")
            addresses = await network.addresses()
        except BaseException:
            await network.stop()
            raise
        ready = ReadyRelay(
            peer_id=network.peer_id,
            p2pd_pid=network.p2p.daemon_pid,
            addresses=addresses,
            limits=self._limits,
            starts=starts,
        )
        self._on_ready(ready)
        return network

    async def _announce(self, network: Network) -> bool:
        """Raises NotAdmitted."""
        if self._member is not None and not await self._member.keep(network.p2p):
            return False
        await relay_records.announce(network.node, await network.addresses())
        return True

    async def _keep_announcing(self, network: Network) -> None:
        while True:
            await asyncio.sleep(relay_records.UPDATE_PERIOD_S)
            try:
                await self._announce(network)
            except Exception as error:  # noqa: BLE001 - the next round may succeed; a dead p2pd is noticed elsewhere
                log.warning("announce.failed reason=%r", error)


async def _probe(network: Network) -> Granted:
    """What the relay grants a second p2pd on this machine."""
    config = network.config
    address = f"{maddr(_ANY_HOST.get(config.host, config.host), config.port)}/p2p/{network.peer_id}"
    async with lone_p2pd(NetworkConfig(initial_peers=(address,), client_only=True)) as p2p:
        return await ask_limits(p2p, network.peer_id, timeout_s=_PROBE_TIMEOUT_S)


@contextlib.contextmanager
def _scheduled_otherwise(start: int) -> Iterator[None]:
    """Every second p2pd runs its goroutines on one core. Which relay service wins is a race that a machine in the same
    state may lose twenty times in a row; on one core it was won in all starts that were tried.
    """
    if start % 2 or _GO_THREADS in os.environ:
        yield
        return
    os.environ[_GO_THREADS] = "1"
    try:
        yield
    finally:
        del os.environ[_GO_THREADS]
