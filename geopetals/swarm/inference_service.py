"""rpc_inference: a stream for each session, spoken as PETALS does or, where the client asks for it, as a ring."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any

import torch
from hivemind.p2p import P2P
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.proto import runtime_pb2

from geopetals import metrics
from geopetals.errors import GeoPetalsError, MemoryShortage, ServerBroken, ServerFull
from geopetals.swarm.admission import Admission
from geopetals.swarm.cache_growth import CacheGrowth
from geopetals.swarm.compute import ComputeThread
from geopetals.swarm.gate import Gate, Grant
from geopetals.swarm.heartbeat import tick
from geopetals.swarm.inbox import STEP_TIMEOUT_S, Inbox
from geopetals.swarm.kv_budget import Reservation
from geopetals.swarm.kv_cache import SessionKV
from geopetals.swarm.limits import PeerLimits
from geopetals.swarm.rates import Rates
from geopetals.swarm.ring_messages import KEY, VERSION, Opening, read_credential
from geopetals.swarm.ring_session import RingSession
from geopetals.swarm.scheduler import Scheduler
from geopetals.swarm.server_session import Push, ServerSession, SessionRequest, read_session_request
from geopetals.swarm.session_registry import SessionRegistry
from geopetals.swarm.stage import Stage
from geopetals.swarm.wire import (
    WireError,
    close,
    drain,
    frame,
    read_metadata,
    send,
    send_error,
    short_peer,
    write_metadata,
)

log = logging.getLogger(__name__)

_HEAR_OUT_S, _MOST_TURNED_AWAY = 2.0, 64


class InferenceService:
    """All inference sessions of one server."""

    def __init__(
        self,
        stage: Stage,
        compute: ComputeThread,
        admission: Admission,
        scheduler: Scheduler,
        *,
        swarm: str,
        length_limit: int,
        limits: PeerLimits,
        rates: Rates,
        gate: Gate,
        push: Callable[[Push], None],
    ) -> None:
        self._stage, self._compute, self._admission, self._scheduler = stage, compute, admission, scheduler
        self._gate = gate
        self._limits, self._rates = limits, rates
        self._turned_away = 0
        self._swarm, self._length_limit, self._push = swarm, length_limit, push
        self._served = range(stage.start, stage.end)
        self._streams: set[asyncio.Task[Any]] = set()
        self._rings: set[RingSession] = set()
        self._ticking: asyncio.Task[None] | None = None
        self._p2p: P2P | None = None
        self.sessions = SessionRegistry()

    @property
    def num_sessions(self) -> int:
        return len(self._streams)

    def start(self, p2p: P2P) -> None:
        self._p2p = p2p
        self._ticking = asyncio.create_task(tick(self._tick))

    def end_sessions(self, error: GeoPetalsError) -> None:
        """With a word to the clients that can be told; the others' end with `close()`."""
        for session in self._rings:
            session.fail(error)

    async def close(self) -> None:
        """End all sessions; their caches are freed before this returns."""
        tasks = [*self._streams, *([] if self._ticking is None else [self._ticking])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def serve(self, info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._streams.add(task)
        peer = info.peer_id.to_base58()
        try:
            await self._serve_within_limits(peer, reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            log.debug("session.lost client=%s", short_peer(peer))
        except MemoryShortage as error:
            log.warning("session.out_of_memory client=%s reason=%.500s", short_peer(peer), error)
            send_error(writer, ServerFull(str(error)))
        except (WireError, GeoPetalsError) as error:
            log.info("session.refused client=%s reason=%.500s", short_peer(peer), error)
            metrics.REQUESTS_REFUSED.labels(type(error).__name__).inc()
            send_error(writer, error)
        except torch.OutOfMemoryError:
            log.warning("session.out_of_memory client=%s", short_peer(peer))
            send_error(writer, ServerFull("the server's device ran out of memory."))
        except Exception as error:
            log.exception("session.failed client=%s", short_peer(peer))
            send_error(writer, ServerBroken(f"internal error: {type(error).__name__}"))
        finally:
            self._streams.discard(task)
            close(writer)

    async def _serve_within_limits(self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(self._limits.session(peer))
            except ServerFull as error:
                await self._turn_away(error, reader, writer)
                return
            await self._limits.opening(peer)
            await self._serve_stream(peer, reader, writer)

    async def _turn_away(self, error: ServerFull, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Say why, and hear the client out: a stream that is closed on its words is reset, as if by a failure."""
        metrics.REQUESTS_REFUSED.labels(type(error).__name__).inc()
        send_error(writer, error)
        if self._turned_away >= _MOST_TURNED_AWAY:
            return
        self._turned_away += 1
        try:
            async with asyncio.timeout(_HEAR_OUT_S):
                while await reader.read(2**16):
                    continue
        except TimeoutError:
            return
        finally:
            self._turned_away -= 1

    async def _serve_stream(self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inbox = Inbox(reader, peer, self._limits, self._rates)
        try:
            first = await inbox.next_request()
            if first is not None:
                request = read_session_request(
                    first, served=self._served, swarm=self._swarm, length_limit=self._length_limit
                )
                async with AsyncExitStack() as held:
                    grant = await inbox.unless_gone(held.enter_async_context(self._leave(peer, request)))
                    if request.session_id is not None:
                        self.sessions.claim(request.session_id, held)
                    if request.opening is None:
                        await self._serve_petals(request, first, inbox, writer, held)
                    else:
                        await self._serve_ring(request, request.opening, grant, inbox, writer, held)
            await inbox.wait_for_end()
        finally:
            inbox.close()

    def _leave(self, peer: str, request: SessionRequest) -> AbstractAsyncContextManager[Grant]:
        credential = b"" if request.opening is None else request.opening.credential
        return self._gate.opening(
            peer, credential, span=request.span, batch=request.batch, max_length=request.max_length
        )

    async def _reserve(
        self, request: SessionRequest, held: AsyncExitStack, *, called: str = ""
    ) -> tuple[SessionKV, Reservation]:
        admitted = await held.enter_async_context(
            self._admission.admit(
                request.block_tokens,
                timeout_s=request.alloc_timeout_s,
                session_id=called or request.session_id or "",
                recovers=request.opening is not None and request.opening.recovery,
            )
        )
        try:
            admitted.kv = await self._compute.run(
                lambda: self._stage.allocate_kv(
                    request.span.start, request.span.stop, batch=request.batch, max_length=request.max_length
                )
            )
        except MemoryShortage as error:
            raise ServerFull(str(error)) from error
        return admitted.kv, admitted.reservation

    async def _serve_petals(
        self,
        request: SessionRequest,
        first: runtime_pb2.ExpertRequest,
        inbox: Inbox,
        writer: asyncio.StreamWriter,
        held: AsyncExitStack,
    ) -> None:
        kv, _ = await inbox.unless_gone(self._reserve(request, held))
        session = ServerSession(
            request,
            kv,
            stage=self._stage,
            scheduler=self._scheduler,
            swarm=self._swarm,
            respond=lambda data: send(writer, data),
            push=self._push,
        )
        if request.session_id is not None:
            self.sessions.put(request.session_id, session)
        log.debug("session.open span=%d:%d batch=%d", request.span.start, request.span.stop, request.batch)
        message: runtime_pb2.ExpertRequest | None = first
        while message is not None:
            await session.step(message)
            await drain(writer, timeout_s=STEP_TIMEOUT_S)
            message = await inbox.next_request()

    async def _serve_ring(
        self,
        request: SessionRequest,
        opening: Opening,
        grant: Grant,
        inbox: Inbox,
        writer: asyncio.StreamWriter,
        held: AsyncExitStack,
    ) -> None:
        session = RingSession(request.span, request.batch, opening, writer, stage=self._stage)
        self._rings.add(session)
        held.callback(session.close)
        held.callback(self._rings.discard, session)
        grant.on_revoked = session.fail
        reserving = self._reserve(request, held, called=grant.session_id)
        kv, reservation = await inbox.unless_gone(reserving, session.failed)
        growth = CacheGrowth(kv, reservation, self._compute, limit=self._length_limit, grant=grant)
        if request.session_id is not None:
            self.sessions.put(request.session_id, session)
        log.debug("session.open span=%d:%d batch=%d ring", request.span.start, request.span.stop, request.batch)
        send(writer, frame(runtime_pb2.ExpertResponse(metadata=write_metadata({KEY: {"version": VERSION}}))))
        works: list[Coroutine[Any, Any, None]] = [session.run(kv, growth, self._scheduler)]
        if opening.next_hop is not None:
            assert self._p2p is not None
            works.append(session.keep_link(self._p2p, opening))
        await _until_read(_read_steps(inbox, session, grant), works, session.failed)

    def _tick(self, seconds: float) -> None:
        self._admission.tick()
        for session in self._rings:
            session.tick(seconds)


async def _read_steps(inbox: Inbox, session: RingSession, grant: Grant) -> None:
    """Until the client says that it is done; raises when it vanishes."""
    while True:
        session.is_listening = True
        message = await inbox.next_message()
        session.is_listening = False
        session.heard_client()
        if message is None or not (message.tensors or message.metadata):
            return
        if message.tensors:
            await session.feed(message, pushed=False)
        elif credential := read_credential(read_metadata(message.metadata)):
            grant.extend(credential)


async def _until_read(
    reading: Coroutine[Any, Any, None], works: list[Coroutine[Any, Any, None]], failed: asyncio.Future[None]
) -> None:
    """Runs all together until the reading ends; the first error of any of them ends all."""
    reader = asyncio.create_task(reading)
    tasks = {reader, *map(asyncio.create_task, works)}
    pending: set[asyncio.Future[None]] = {*tasks, failed}
    try:
        while not reader.done():
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for ended in done:
                ended.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
