"""What peers reach at one p2pd: the RPCs of whichever handler serves blocks now, or the word that none does.

p2pd keeps a name once it is registered, and takes each name once only; handlers come and go when a server moves to
other blocks. To a handler the desk looks like its P2P.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo

from geopetals.errors import GeoPetalsError
from geopetals.swarm.network import GuardedP2P
from geopetals.swarm.ring_messages import PUSH_STREAM
from geopetals.swarm.wire import HANDLER, send_error

_FOR_RUNNING_SESSIONS = {PUSH_STREAM, f"{HANDLER}.rpc_push", f"{HANDLER}.rpc_info"}
_HEAR_OUT_S, _MOST_HEARD = 2.0, 64

Stream = Callable[[StreamInfo, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Call = Callable[[Any, Any], Awaitable[Any]]


class FrontDesk:
    """Registers names with one p2pd. Lives on the event loop."""

    def __init__(self, p2p: GuardedP2P) -> None:
        self._p2p = p2p
        self._streams: dict[str, Stream] = {}
        self._calls: dict[str, Call] = {}
        self._names: set[str] = set()
        self._refusal: GeoPetalsError | None = None
        self._heard = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._p2p, name)

    async def add_binary_stream_handler(self, name: str, handler: Stream) -> None:
        self._streams[name] = handler
        if name in self._names:
            return
        self._names.add(name)

        async def serve(info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            error = self._why_refused(name)
            if error is None:
                await self._streams[name](info, reader, writer)
            else:
                await self._turn_away(error, reader, writer)

        await self._p2p.add_binary_stream_handler(name, serve)

    async def add_protobuf_handler(self, name: str, handler: Call, input_protobuf_type: Any, **options: Any) -> None:
        self._calls[name] = handler
        if name in self._names:
            return
        self._names.add(name)

        async def answer(request: Any, context: Any) -> Any:
            error = self._why_refused(name)
            if error is not None:
                raise error
            return await self._calls[name](request, context)

        await self._p2p.add_protobuf_handler(name, answer, input_protobuf_type, **options)

    def admit(self) -> None:
        """Let everybody in again."""
        self._refusal = None

    def refuse(self, reason: GeoPetalsError) -> None:
        """Let in what belongs to sessions that are open, and nothing else."""
        self._refusal = reason

    def forget(self, reason: GeoPetalsError) -> None:
        """Refuse everything, and keep nothing of the handler that was there."""
        self._refusal = reason
        self._streams.clear()
        self._calls.clear()

    def _why_refused(self, name: str) -> GeoPetalsError | None:
        is_there = name in self._streams or name in self._calls
        return None if is_there and name in _FOR_RUNNING_SESSIONS else self._refusal

    async def _turn_away(
        self, error: GeoPetalsError, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Say why, and hear the peer out: a stream that is closed on its words is reset, as if by a failure."""
        send_error(writer, error)
        self._heard += 1
        try:
            async with asyncio.timeout(_HEAR_OUT_S if self._heard <= _MOST_HEARD else 0):
                while await reader.read(2**16):
                    continue
        except (TimeoutError, ConnectionError):
            return
        finally:
            self._heard -= 1
            writer.close()
