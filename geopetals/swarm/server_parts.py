"""What a block server is made of, whoever decides on its blocks."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from geopetals.progress import Reporter
from geopetals.swarm import devices
from geopetals.swarm.holding import Holding, Loader
from geopetals.swarm.identity import ModelIdentity
from geopetals.swarm.listing import Listing
from geopetals.swarm.place import Place
from geopetals.swarm.profile import Throughput
from geopetals.swarm.server_config import ReadyServer, ServerConfig
from geopetals.swarm.service import Service


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerParts:
    """Of one run of a server, once it stands in the network."""

    config: ServerConfig
    swarm: str
    identity: ModelIdentity
    loader: Loader
    place: Place
    service: Service
    listing: Listing
    reporter: Reporter
    on_ready: Callable[[ReadyServer], None]

    async def serve(self, holding: Holding, speed: Throughput) -> None:
        """Open to sessions, and let the swarm know."""
        await self.service.serve(holding)
        await self.listing.online(holding, speed, self.service.free_block_tokens)

    async def keep_place(self, on_back: Callable[[], Awaitable[None]]) -> None:
        """Until cancelled: renew the records, and come back whenever the network is lost. Raises NetworkError."""

        async def back() -> None:
            self.listing.network = self.place.network
            await self.service.move_to(self.place.network)
            await self.listing.renew()
            await on_back()

        await together(
            self.place.keep(on_lost=self.service.close, on_back=back),
            self.listing.keep_renewing(lambda: self.service.free_block_tokens),
        )

    def tell_ready(self, holding: Holding, token: str) -> None:
        network, (start, end) = self.place.network, holding.span
        self.on_ready(
            ReadyServer(
                peer_id=network.peer_id,
                p2pd_pid=network.p2p.daemon_pid,
                start=start,
                end=end,
                num_blocks=self.loader.checkpoint.num_blocks,
                weights_bytes=holding.stage.memory_bytes,
                kv_bytes=holding.kv_bytes,
                process_bytes=devices.process_memory_bytes(),
                token=token,
                emulated=self.config.emulate.to_dict() if self.config.emulate is not None else None,
            )
        )


async def together(*works: Coroutine[Any, Any, None]) -> None:
    """Until the first of them fails, whose exception is raised, or all have ended; the others are cancelled."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
