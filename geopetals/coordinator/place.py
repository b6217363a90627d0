"""The coordinator's place in the network: the same peer id and port, whatever happens to p2pd."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace

from geopetals.coordinator.store import Store
from geopetals.credentials.authority import Authority
from geopetals.credentials.ledger import SwarmFacts
from geopetals.errors import NetworkError
from geopetals.progress import Reporter
from geopetals.swarm import control
from geopetals.swarm.control import ControlChannel
from geopetals.swarm.membership import OwnMembership
from geopetals.swarm.network import Network, NetworkConfig

log = logging.getLogger(__name__)

_RETRY_S = 1.0


class Place:
    """`network` is the one that runs; it is another one after p2pd has died."""

    network: Network

    def __init__(self, store: Store, authority: Authority, config: NetworkConfig, facts: SwarmFacts) -> None:
        """`config.port` 0 takes the port of last time. `facts` for join tokens, but for what the network tells."""
        self.authority = authority
        self._store, self._facts = store, facts
        self._membership = OwnMembership(authority, swarm=facts.swarm, is_open=facts.open)
        self._config = replace(config, validator=self._membership.records)

    async def enter(self) -> None:
        """Raises NetworkError."""
        port = self._config.port or int(self._store.fact("port") or 0)
        self.network = await Network.start(replace(self._config, port=port))
        self._store.keep_fact("port", self.network.config.port)
        facts = replace(self._facts, coordinator_peer_id=self.network.peer_id, addresses=await self.network.addresses())
        if facts != self.authority.facts:
            self.authority.describe_swarm(facts)

    async def leave(self) -> None:
        await self.network.stop()

    async def keep(
        self,
        on_channel: Callable[[ControlChannel], Awaitable[None]],
        reporter: Reporter,
        on_return: Callable[[], None],
    ) -> None:
        """Serve control channels until cancelled; when p2pd ends, start another, and call `on_return` once members can
        be heard again.
        """
        returns = False
        while True:
            await control.listen(self.network.p2p, on_channel)
            if returns:
                on_return()
            returns = True
            publishing = asyncio.create_task(self._membership.keep_published(self.network))
            try:
                code = await self.network.p2p.wait_daemon()
            finally:
                publishing.cancel()
            log.warning("network.p2pd_ended code=%d", code)
            await self.network.stop()
            await self._enter_again()
            reporter.line("the coordinator's p2pd had ended and has been started again")

    async def _enter_again(self) -> None:
        while True:
            await asyncio.sleep(_RETRY_S)
            try:
                await self.enter()
                return
            except NetworkError as error:
                log.warning("network.not_started reason=%s", error)
