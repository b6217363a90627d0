"""The service of one span of blocks: its handler at the front desk, its cache, and how it comes to an end."""

import asyncio
import contextlib
import logging
from typing import Any, cast

from geopetals.errors import ServerMoving
from geopetals.swarm.admission import Held
from geopetals.swarm.compute import ComputeThread
from geopetals.swarm.front_desk import FrontDesk
from geopetals.swarm.handler import BlockHandler
from geopetals.swarm.holding import Holding
from geopetals.swarm.kv_budget import KVBudget
from geopetals.swarm.network import Network
from geopetals.swarm.rates import Rates

log = logging.getLogger(__name__)

_FAREWELL_S = 2.0
_NOTHING = {"total": 0, "free": 0, "running": 0, "waiting": 0}


class Service:
    """Serves what it is given to whoever comes to the p2pd of the moment. Lives on the event loop."""

    def __init__(self, compute: ComputeThread, *, swarm: str, **options: Any) -> None:
        """`options` are BlockHandler's."""
        self._compute, self._swarm, self._options = compute, swarm, options
        self._desk: FrontDesk | None = None
        self._handler: BlockHandler | None = None
        self._changing = asyncio.Lock()
        self.holding: Holding | None = None
        self.rates = Rates()

    async def move_to(self, network: Network) -> None:
        """Serve there from now on. Sessions of another network are gone with it."""
        async with self._changing:
            await self._close_handler()
            self._desk = FrontDesk(network.p2p)
            await self._open()

    async def serve(self, holding: Holding) -> None:
        """Serve these blocks, when none are served."""
        async with self._changing:
            self.holding = holding
            await self._open()

    async def drain(self, reason: str, timeout_s: float) -> None:
        """Let no new session in, wait for those that run, and end what runs still after the time.

        Clients are told in a way that they go on elsewhere at once.
        """
        error = ServerMoving(f"{reason}: it is leaving these blocks.")
        if self._desk is not None:
            self._desk.refuse(error)
        handler = self._handler
        if handler is None:
            return
        handler.budget.close(error)
        try:
            async with asyncio.timeout(timeout_s):
                await handler.admission.until_empty()
        except TimeoutError:
            log.info("drain.cut_short sessions=%d", handler.num_sessions)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FAREWELL_S):
                handler.end_sessions(error)
                await handler.admission.until_empty()

    def resume(self) -> None:
        """Let sessions in again, after a `drain` that was cancelled."""
        if self._handler is not None and self._desk is not None:
            self._handler.budget.reopen()
            self._desk.admit()

    async def stop(self, reason: str) -> None:
        """Serve nothing: the blocks and all caches are free when this returns."""
        async with self._changing:
            if self._desk is not None:
                self._desk.forget(ServerMoving(f"{reason}: it holds no blocks for now."))
            await self._close_handler()
            self.holding = None

    async def close(self) -> None:
        """The network is gone. What is held stays, for another one."""
        async with self._changing:
            self._desk = None
            await self._close_handler()

    def cache(self) -> dict[str, int]:
        """Block-tokens in all and free, sessions that run and wait."""
        return _NOTHING if self._handler is None else self._handler.admission.describe()

    def sessions(self) -> list[Held]:
        return [] if self._handler is None else self._handler.admission.held()

    @property
    def free_block_tokens(self) -> int:
        return 0 if self._handler is None else self._handler.budget.left

    async def _open(self) -> None:
        holding, desk = self.holding, self._desk
        if holding is None or desk is None:
            return
        self._handler = BlockHandler(
            holding.stage,
            self._compute,
            KVBudget(holding.block_tokens),
            swarm=self._swarm,
            length_limit=holding.kv_tokens,
            rates=self.rates,
            **self._options,
        )
        try:
            await self._handler.attach(cast(Any, desk))
        except Exception as error:
            if desk.is_running:
                raise
            log.info("service.not_opened reason=%r", error)  # p2pd has just died: another one comes
            return
        desk.admit()

    async def _close_handler(self) -> None:
        handler, self._handler = self._handler, None
        if handler is not None:
            await handler.close()
