"""The streams on which servers push steps to each other: one for each session and pair of servers, opened once."""

import asyncio
import contextlib
import logging
from typing import Protocol

from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure, DispatchFailure, P2PDaemonError
from hivemind.proto import runtime_pb2

from geopetals.errors import GeoPetalsError
from geopetals.swarm.heartbeat import LINK_SILENCE_S, Silence
from geopetals.swarm.limits import PeerLimits
from geopetals.swarm.rates import Rates
from geopetals.swarm.ring_messages import PUSH_STREAM, NextHop, hello, read_hello
from geopetals.swarm.wire import (
    BadInput,
    WireError,
    close,
    frame,
    read_message,
    read_metadata,
    send,
    send_error,
    short_peer,
)

log = logging.getLogger(__name__)

OPEN_TIMEOUT_S = 15.0
_NO_STREAM = (ControlFailure, DispatchFailure, P2PDaemonError, ConnectionError, asyncio.IncompleteReadError, ValueError)


class LinkRefused(Exception):
    """The next server takes no pushes from us; the text says why."""


class PushLink:
    """Our end of the stream to the next server. It sends heartbeats back, so that a broken link is noticed."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer_id: str) -> None:
        self._reader, self._writer, self._peer_id = reader, writer, peer_id
        self._silence = Silence(LINK_SILENCE_S)
        self._lost = asyncio.get_running_loop().create_future()

    @classmethod
    async def open(cls, p2p: P2P, following: NextHop) -> "PushLink":
        """Raises LinkRefused."""
        writer = None
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                peer = PeerID.from_base58(following.peer_id)
                _, reader, writer = await p2p.call_binary_stream_handler(peer, PUSH_STREAM)
                send(writer, frame(runtime_pb2.ExpertRequest(metadata=hello(following.session_id))))
                if await read_message(reader, runtime_pb2.ExpertResponse, peer=following.peer_id) is None:
                    raise LinkRefused("it ended the stream")
            return cls(reader, writer, following.peer_id)
        except BaseException as error:
            if writer is not None:
                close(writer)
            if isinstance(error, TimeoutError):
                raise LinkRefused(f"no answer within {OPEN_TIMEOUT_S:.0f} s") from error
            if isinstance(error, (GeoPetalsError, WireError, *_NO_STREAM)):
                reason = " ".join(str(error).split())
                raise LinkRefused(reason or type(error).__name__) from error
            raise

    async def send(self, data: bytes) -> None:
        """What is sent into a link that is lost goes nowhere: the client has been told."""
        if self._lost.done() or self._writer.is_closing():
            return
        with contextlib.suppress(ConnectionError):
            self._writer.write(data)
            await self._writer.drain()

    async def wait_lost(self) -> str:
        """Returns why the link is lost, as soon as it is."""
        reading = asyncio.create_task(self._read())
        try:
            why: str = await self._lost
            return why
        finally:
            reading.cancel()

    def tick(self, seconds: float) -> None:
        if self._silence.lasts(seconds):
            self._lose("silent")

    def close(self) -> None:
        close(self._writer)

    async def _read(self) -> None:
        try:
            while await read_message(self._reader, runtime_pb2.ExpertResponse, peer=self._peer_id) is not None:
                self._silence.heard()
            self._lose("ended")
        except (asyncio.IncompleteReadError, ConnectionError):
            self._lose("reset")
        except (GeoPetalsError, WireError) as error:
            self._lose(str(error))

    def _lose(self, why: str) -> None:
        if not self._lost.done():
            self._lost.set_result(why)


class PushTarget(Protocol):
    """The session that pushed steps are for."""

    @property
    def previous(self) -> str | None: ...

    def attach_upstream(self, writer: asyncio.StreamWriter) -> None: ...

    def detach_upstream(self, writer: asyncio.StreamWriter) -> None: ...

    async def feed(self, request: runtime_pb2.ExpertRequest, *, pushed: bool) -> None: ...

    def fail(self, error: Exception) -> None: ...


class Targets(Protocol):
    async def wait_for(self, session_id: str, timeout_s: float) -> PushTarget | None: ...


class PushReceiver:
    """Answers the streams that previous servers open."""

    def __init__(self, targets: Targets, limits: PeerLimits, rates: Rates) -> None:
        self._targets, self._limits, self._rates = targets, limits, rates
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        peer = info.peer_id.to_base58()
        try:
            await self._serve(peer, reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            log.debug("push.ended from=%s", short_peer(peer))
        except (GeoPetalsError, WireError) as error:
            log.info("push.refused from=%s reason=%.500s", short_peer(peer), error)
            send_error(writer, error)
        except Exception as error:
            log.exception("push.failed from=%s", short_peer(peer))
            send_error(writer, RuntimeError(f"internal error: {type(error).__name__}"))
        finally:
            self._tasks.discard(task)
            close(writer)

    async def close(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with self._limits.link(peer):
            target = await self._introduce(peer, reader)
        target.attach_upstream(writer)
        try:
            send(writer, frame(runtime_pb2.ExpertResponse()))
            while (request := await self._read(peer, reader)) is not None:
                await target.feed(request, pushed=True)
        except (GeoPetalsError, WireError) as error:
            target.fail(BadInput(f"server {short_peer(peer)} pushed what is no step: {error}"))
            raise
        finally:
            target.detach_upstream(writer)

    async def _read(self, peer: str, reader: asyncio.StreamReader) -> runtime_pb2.ExpertRequest | None:
        await self._limits.message(peer)
        large = self._limits.large_message(peer)
        return await read_message(reader, runtime_pb2.ExpertRequest, peer=peer, large=large, rates=self._rates)

    async def _introduce(self, peer: str, reader: asyncio.StreamReader) -> PushTarget:
        """The session that the stream is for; its client must have named this peer as the one that pushes."""
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                first = await self._read(peer, reader)
        except TimeoutError:
            raise WireError("a push stream must name its session first") from None
        session_id = read_hello(read_metadata(first.metadata) if first is not None else {})
        target = await self._targets.wait_for(session_id, OPEN_TIMEOUT_S)
        if target is None or target.previous != peer:
            raise WireError("there is no session here that you may push into")
        return target
