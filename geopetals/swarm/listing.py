"""What a server lets the swarm's DHT know of itself, renewed before it expires."""

import asyncio
import contextlib
import heapq
import logging
from collections.abc import Callable, Mapping

from geopetals.swarm.holding import Holding, Loader
from geopetals.swarm.identity import ModelIdentity
from geopetals.swarm.network import Network
from geopetals.swarm.profile import Throughput
from geopetals.swarm.quantization import stored_quantization
from geopetals.swarm.records import UPDATE_PERIOD_S, announce
from geopetals.swarm.stack import PETALS_VERSION, ServerInfo, ServerState

log = logging.getLogger(__name__)

_FAREWELL_TIMEOUT_S = 1.0
_RETRY_S = 3.0
_MOST_LINKS = 16
"""Records are small, and there is one for each block."""


class Listing:
    """The record of one server, of one span at a time."""

    def __init__(
        self, loader: Loader, identity: ModelIdentity, network: Network, *, swarm: str, name: str | None
    ) -> None:
        self._loader, self._identity, self._swarm, self._name = loader, identity, swarm, name
        self._quantization = loader.quantization or stored_quantization(loader.checkpoint.config) or "none"
        self._info: ServerInfo | None = None
        self._hashes: dict[int, str] = {}
        self.network = network
        self.links: Callable[[], Mapping[str, float]] = dict
        """Round trips in seconds to other servers, by peer id, for clients that no coordinator tells their way."""

    async def joining(self, start: int, end: int) -> None:
        """These blocks will be there soon."""
        self._hashes = {}
        self._info = ServerInfo(
            state=ServerState.JOINING,
            throughput=0.0,
            start_block=start,
            end_block=end,
            public_name=self._name,
            version=PETALS_VERSION,
            torch_dtype=str(self._loader.dtype).removeprefix("torch."),
            quant_type=self._quantization,
            using_relay=self.network.is_relayed,
        )
        await self.renew()

    async def online(self, holding: Holding, speed: Throughput, free_block_tokens: int) -> None:
        start, end = holding.span
        if self._info is None or (self._info.start_block, self._info.end_block) != (start, end):
            await self.joining(start, end)
        info = self._info
        assert info is not None
        self._hashes = holding.block_hashes
        info.state = ServerState.ONLINE
        info.throughput = speed.of_server(holding.num_blocks)
        info.inference_rps, info.forward_rps = speed.inference_rps, speed.forward_rps
        self._note_free(free_block_tokens)
        await self.renew()

    def _note_free(self, free_block_tokens: int) -> None:
        if self._info is not None and self._info.state is ServerState.ONLINE:
            self._info.cache_tokens_left = 2 * free_block_tokens  # PETALS counts keys and values of each block

    async def offline(self) -> None:
        """Nobody is to come here any more: not to wait for the record to expire."""
        if self._info is None:
            return
        self._info.state = ServerState.OFFLINE
        with contextlib.suppress(TimeoutError):  # the record expires by itself
            async with asyncio.timeout(_FAREWELL_TIMEOUT_S):
                await self.renew()
        self._info = None

    async def renew(self) -> bool:
        """False if the DHT cannot be told now."""
        network, info, emulated = self.network, self._info, self._loader.emulated
        if info is None:
            return True
        info.using_relay = network.is_relayed
        info.next_pings = dict(heapq.nsmallest(_MOST_LINKS, self.links().items(), key=lambda link: link[1])) or None
        try:
            await announce(
                network.node,
                self._swarm,
                info,
                identity=self._identity,
                block_hashes=self._hashes,
                num_blocks=self._loader.checkpoint.num_blocks,
                emulated=emulated.status() if emulated is not None else None,
            )
        except Exception as error:  # noqa: BLE001 - the next round may succeed; a dead p2pd is noticed elsewhere
            log.warning("announce.failed reason=%r", error)
            return False
        return True

    async def keep_renewing(self, free_block_tokens: Callable[[], int]) -> None:
        """Until cancelled."""
        is_told = True
        while True:
            await asyncio.sleep(UPDATE_PERIOD_S if is_told else _RETRY_S)
            self._note_free(free_block_tokens())
            is_told = await self.renew()
