"""A server's place in the network: its p2pd is replaced when it is lost, with the same identity and port."""

import logging
from collections.abc import Awaitable, Callable

from geopetals.progress import Reporter
from geopetals.swarm.entering import Entrance
from geopetals.swarm.network import Network
from geopetals.swarm.reachability import wait_lost

log = logging.getLogger(__name__)


class Place:
    """Where the server is reached."""

    def __init__(self, entrance: Entrance, reporter: Reporter) -> None:
        self._entrance, self._reporter = entrance, reporter
        self._network: Network | None = None

    @property
    def is_taken(self) -> bool:
        return self._network is not None

    @property
    def network(self) -> Network:
        """The network of now, or the one that was lost last. Only once it `is_taken`."""
        assert self._network is not None
        return self._network

    async def take(self) -> None:
        """Raises NetworkError."""
        self._network = await self._entrance.enter()

    async def keep(self, *, on_lost: Callable[[], Awaitable[None]], on_back: Callable[[], Awaitable[None]]) -> None:
        """Until cancelled. Raises NetworkError if the place cannot be taken again."""
        while True:
            lost = self.network
            why = await wait_lost(lost)
            log.warning("network.lost server=%s reason=%s", lost.peer_id, why)
            self._reporter.line(f"{why}: joining the swarm again")
            await on_lost()
            await lost.stop()
            self._network = await self._entrance.enter_again(lost, why)
            await on_back()

    async def leave(self) -> None:
        if self._network is not None:
            await self._network.stop()
