"""The requests of one inference stream, with an eye on whether the client is still there."""

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any, TypeVar

from hivemind.proto import runtime_pb2

from geopetals.swarm.limits import PeerLimits
from geopetals.swarm.rates import Rates
from geopetals.swarm.wire import WireError, read_message

Result = TypeVar("Result")
STEP_TIMEOUT_S = 300.0
"""For clients that send no heartbeats."""
_END_OF_STREAM_TIMEOUT_S = 10.0


class Inbox:
    """Reads the stream of one client, not faster than its limits allow."""

    def __init__(self, reader: asyncio.StreamReader, peer: str, limits: PeerLimits, rates: Rates) -> None:
        self._reader, self._peer, self._limits, self._rates = reader, peer, limits, rates
        self._ahead: asyncio.Task[runtime_pb2.ExpertRequest | None] | None = None

    async def next_request(self) -> runtime_pb2.ExpertRequest | None:
        """The next step; None when the client says that it is done."""
        try:
            async with asyncio.timeout(STEP_TIMEOUT_S):
                request = await self.next_message()
        except TimeoutError:
            raise WireError(f"the session was idle for {STEP_TIMEOUT_S:.0f} s and is closed") from None
        return request if request is not None and request.tensors else None

    async def next_message(self) -> runtime_pb2.ExpertRequest | None:
        """Whatever comes next, however late; None for the end mark."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            return await ahead
        return await self._read()

    async def unless_gone(
        self, work: Coroutine[Any, Any, Result], failed: asyncio.Future[None] | None = None
    ) -> Result:
        """Do `work`, but drop it when the client's stream ends meanwhile: it must not hold a place in the queue.

        Behind a message that waits to be read the end is not seen: `failed` has an error when it is known otherwise.
        """
        task = asyncio.create_task(work)
        watched: set[asyncio.Future[Any]] = {task, self._read_ahead(), *([] if failed is None else [failed])}
        try:
            while not task.done():
                done, watched = await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
                for ended in done - {task}:
                    ended.result()
            return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def wait_for_end(self) -> None:
        """Stock clients see a broken pipe if the server closes first: they write once more after their last message."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_OF_STREAM_TIMEOUT_S):
                while await self.next_message() is not None:
                    continue

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.cancel()
            self._ahead.add_done_callback(lambda task: task.cancelled() or task.exception())

    def _read_ahead(self) -> "asyncio.Task[runtime_pb2.ExpertRequest | None]":
        if self._ahead is None:
            self._ahead = asyncio.create_task(self._read())
        return self._ahead

    async def _read(self) -> runtime_pb2.ExpertRequest | None:
        await self._limits.message(self._peer)
        large = self._limits.large_message(self._peer)
        kind = runtime_pb2.ExpertRequest
        return await read_message(self._reader, kind, peer=self._peer, large=large, rates=self._rates)
