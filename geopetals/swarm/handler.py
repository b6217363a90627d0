"""PETALS' RPCs as one block server answers them: rpc_inference, rpc_forward, rpc_backward, rpc_push and rpc_info."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack
from typing import Any, TypeVar

import torch
from hivemind.p2p import P2P, P2PContext, PeerID
from hivemind.p2p.p2p_daemon_bindings.control import DEFAULT_MAX_MSG_SIZE
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.proto import runtime_pb2
from hivemind.utils.streaming import combine_from_streaming, split_for_streaming
from hivemind.utils.tensor_descr import BatchTensorDescriptor

import geopetals
from geopetals.errors import GeoPetalsError, MemoryShortage, ServerFull
from geopetals.swarm import block_ops
from geopetals.swarm.compute import ComputeThread, Priority
from geopetals.swarm.kv_budget import KVBudget
from geopetals.swarm.server_session import Push, ServerSession, SessionRequest, read_session_request, read_uids
from geopetals.swarm.stack import PETALS_VERSION
from geopetals.swarm.stage import Stage
from geopetals.swarm.wire import (
    HANDLER,
    MAX_FRAME_BYTES,
    WireError,
    error_frame,
    read_message,
    read_metadata,
    serialize,
    short_peer,
    write_metadata,
)

log = logging.getLogger(__name__)

Result = TypeVar("Result")

STEP_TIMEOUT_S = 300.0
_END_OF_STREAM_TIMEOUT_S = 10.0
_PUSH_TIMEOUT_S = 30.0
_FORWARD_TOKENS = 16384


class BlockHandler:
    """Answers peers for the blocks of one stage. Lives on the event loop; computes in the compute thread."""

    def __init__(
        self, stage: Stage, compute: ComputeThread, budget: KVBudget, *, swarm: str, length_limit: int
    ) -> None:
        self._stage, self._compute, self.budget = stage, compute, budget
        self._swarm, self._length_limit = swarm, length_limit
        self._served = range(stage.start, stage.end)
        self._sessions: dict[str, ServerSession | None] = {}
        self._streams: set[asyncio.Task[Any]] = set()
        self._pushes: set[asyncio.Task[None]] = set()
        self._p2p: P2P | None = None

    @property
    def num_sessions(self) -> int:
        return len(self._streams)

    async def attach(self, p2p: P2P) -> None:
        """Register the RPCs under PETALS' names."""
        self._p2p = p2p
        await p2p.add_binary_stream_handler(f"{HANDLER}.rpc_inference", self._inference_stream)
        request = runtime_pb2.ExpertRequest
        await p2p.add_protobuf_handler(f"{HANDLER}.rpc_info", self.rpc_info, runtime_pb2.ExpertUID)
        await p2p.add_protobuf_handler(f"{HANDLER}.rpc_push", self.rpc_push, request)
        await p2p.add_protobuf_handler(f"{HANDLER}.rpc_forward", self.rpc_forward, request)
        await p2p.add_protobuf_handler(f"{HANDLER}.rpc_backward", self.rpc_backward, request)
        for name, function in (
            ("rpc_forward_stream", self.rpc_forward_stream),
            ("rpc_backward_stream", self.rpc_backward_stream),
        ):
            await p2p.add_protobuf_handler(
                f"{HANDLER}.{name}", function, request, stream_input=True, stream_output=True
            )

    async def close(self) -> None:
        """End all sessions; their caches are freed before this returns."""
        tasks = [*self._streams, *self._pushes]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- inference -----------------------------------------------------------------------------------------------------

    async def _inference_stream(
        self, info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._streams.add(task)
        peer = info.peer_id.to_base58()
        try:
            await self._serve_stream(peer, reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            log.debug("session.lost client=%s", short_peer(peer))
        except (WireError, GeoPetalsError) as error:
            log.info("session.refused client=%s reason=%s", short_peer(peer), error)
            writer.write(error_frame(error))
        except torch.OutOfMemoryError:
            log.warning("session.out_of_memory client=%s", short_peer(peer))
            writer.write(error_frame(ServerFull("the server's device ran out of memory.")))
        except Exception as error:
            log.exception("session.failed client=%s", short_peer(peer))
            writer.write(error_frame(RuntimeError(f"internal error: {type(error).__name__}")))
        finally:
            self._streams.discard(task)
            writer.close()

    async def _serve_stream(self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inbox = _Inbox(reader, peer)
        try:
            await self._serve_requests(inbox, writer)
            await inbox.wait_for_end()
        finally:
            inbox.close()

    async def _serve_requests(self, inbox: "_Inbox", writer: asyncio.StreamWriter) -> None:
        first = await inbox.next_request()
        if first is None:
            return
        request = read_session_request(first, served=self._served, swarm=self._swarm, length_limit=self._length_limit)
        async with AsyncExitStack() as held:
            session = await inbox.unless_gone(self._open(request, held, writer))
            log.debug("session.open span=%d:%d batch=%d", request.span.start, request.span.stop, request.batch)
            message: runtime_pb2.ExpertRequest | None = first
            while message is not None:
                await session.step(message)
                await writer.drain()
                message = await inbox.next_request()

    async def _open(self, request: SessionRequest, held: AsyncExitStack, writer: asyncio.StreamWriter) -> ServerSession:
        if request.session_id is not None:
            self._claim(request.session_id, held)
        await held.enter_async_context(self.budget.reserve(request.block_tokens, timeout_s=request.alloc_timeout_s))
        try:
            kv = await self._compute.run(
                lambda: self._stage.allocate_kv(
                    request.span.start, request.span.stop, batch=request.batch, max_length=request.max_length
                )
            )
        except MemoryShortage as error:
            raise ServerFull(str(error)) from error
        session = ServerSession(
            request,
            kv,
            stage=self._stage,
            compute=self._compute,
            swarm=self._swarm,
            respond=writer.write,
            push=self._start_push,
        )
        if request.session_id is not None:
            self._sessions[request.session_id] = session
        return session

    def _claim(self, session_id: str, held: AsyncExitStack) -> None:
        """Take the id before anything is awaited: two clients may ask for the same one at once."""
        if session_id in self._sessions:
            raise WireError("this session id is in use")
        self._sessions[session_id] = None
        held.callback(self._sessions.pop, session_id, None)

    # -- push ----------------------------------------------------------------------------------------------------------

    async def rpc_push(self, request: runtime_pb2.ExpertRequest, context: P2PContext) -> runtime_pb2.ExpertResponse:
        """A step that the previous server of the chain sends; to know the session's id is the permission."""
        session = self._sessions.get(str(read_metadata(request.metadata).get("session_id")))
        if session is None:
            log.debug("push.unknown_session from=%s", short_peer(context.remote_id.to_base58()))
        else:
            await session.step(request)
        return runtime_pb2.ExpertResponse()

    def _start_push(self, push: Push) -> None:
        task = asyncio.create_task(self._send_push(push))
        self._pushes.add(task)
        task.add_done_callback(self._pushes.discard)

    async def _send_push(self, push: Push) -> None:
        assert self._p2p is not None
        try:
            async with asyncio.timeout(_PUSH_TIMEOUT_S):
                await self._p2p.call_protobuf_handler(
                    PeerID.from_base58(push.peer_id), f"{HANDLER}.rpc_push", push.request, runtime_pb2.ExpertResponse
                )
        except Exception as error:  # noqa: BLE001 - the client sends the step itself too: a lost push costs time only
            log.info("push.failed to=%s reason=%r", short_peer(push.peer_id), error)

    # -- forward and backward ------------------------------------------------------------------------------------------

    async def rpc_forward(self, request: runtime_pb2.ExpertRequest, context: P2PContext) -> runtime_pb2.ExpertResponse:
        return runtime_pb2.ExpertResponse(tensors=await self._forward(request))

    async def rpc_backward(self, request: runtime_pb2.ExpertRequest, context: P2PContext) -> runtime_pb2.ExpertResponse:
        return runtime_pb2.ExpertResponse(tensors=await self._backward(request))

    async def rpc_forward_stream(
        self, requests: AsyncIterator[runtime_pb2.ExpertRequest], context: P2PContext
    ) -> AsyncIterator[runtime_pb2.ExpertResponse]:
        for part in _parts(await self._forward(await _gather(requests))):
            yield part

    async def rpc_backward_stream(
        self, requests: AsyncIterator[runtime_pb2.ExpertRequest], context: P2PContext
    ) -> AsyncIterator[runtime_pb2.ExpertResponse]:
        for part in _parts(await self._backward(await _gather(requests))):
            yield part

    async def _forward(self, request: runtime_pb2.ExpertRequest) -> list[runtime_pb2.Tensor]:
        span = read_uids(request.uid, served=self._served, swarm=self._swarm)
        structure = read_metadata(request.metadata).get("args_structure")

        def compute() -> list[runtime_pb2.Tensor]:
            step = block_ops.read_step(request.tensors, structure, self._stage, span)
            self._check_length(step.hidden)
            with torch.inference_mode():
                return [serialize(block_ops.forward(self._stage, span, step.hidden, step.prompts))]

        return await self._compute.run(compute, Priority.BATCH)

    async def _backward(self, request: runtime_pb2.ExpertRequest) -> list[runtime_pb2.Tensor]:
        span = read_uids(request.uid, served=self._served, swarm=self._swarm)
        structure = read_metadata(request.metadata).get("args_structure")

        def compute() -> list[runtime_pb2.Tensor]:
            arguments = block_ops.unpack(request.tensors, structure)
            if len(arguments) < 2:
                raise WireError("rpc_backward takes inputs, gradients and prompts")
            hidden = block_ops.check_hidden(arguments[0], self._stage)
            self._check_length(hidden)
            grad_output = block_ops.check_hidden(arguments[1], self._stage)
            prompts = block_ops.check_prompts(arguments[2] if len(arguments) > 2 else None, hidden, span, self._stage)
            grads = block_ops.backward(self._stage, span, hidden, grad_output, prompts)
            return [serialize(grad) for grad in grads]

        return await self._compute.run(compute, Priority.BATCH)

    def _check_length(self, hidden: torch.Tensor) -> None:
        limit = max(self._length_limit, _FORWARD_TOKENS)
        if hidden.shape[1] > limit:
            raise WireError(f"this server takes {limit} tokens of a sequence at a time, got {hidden.shape[1]}")

    # -- info ----------------------------------------------------------------------------------------------------------

    async def rpc_info(self, request: runtime_pb2.ExpertUID, context: P2PContext) -> runtime_pb2.ExpertInfo:
        """PETALS' description of this server and, if a block is named, of that block's inputs and outputs."""
        info: dict[str, Any] = {
            "version": PETALS_VERSION,
            "geopetals": geopetals.__version__,
            "dht_client_mode": False,
            "cache_tokens_available": self.budget.left,
        }
        if request.uid:
            read_uids(request.uid, served=self._served, swarm=self._swarm)
            info |= _schemas(self._stage)
        return runtime_pb2.ExpertInfo(serialized_info=write_metadata(info))


def _schemas(stage: Stage) -> dict[str, Any]:
    """The tensor descriptions that stock clients ask for before their first request."""
    none = runtime_pb2.CompressionType.NONE
    hidden = BatchTensorDescriptor(1, 2048, stage.hidden_size, dtype=stage.dtype, compression=none)
    prompts = BatchTensorDescriptor((), dtype=stage.dtype)
    hypo_ids = BatchTensorDescriptor((), dtype=torch.int64)
    return {
        "forward_schema": ((hidden,), {}),
        "outputs_schema": (hidden,),
        "keyword_names": (),
        "inference_schema": ((hidden, prompts, hypo_ids), {}),
    }


class _Inbox:
    """The requests of one inference stream, with an eye on whether the client is still there."""

    def __init__(self, reader: asyncio.StreamReader, peer: str) -> None:
        self._reader, self._peer = reader, peer
        self._ahead: asyncio.Task[runtime_pb2.ExpertRequest | None] | None = None

    async def next_request(self) -> runtime_pb2.ExpertRequest | None:
        """The next step; None when the client says that it is done."""
        try:
            async with asyncio.timeout(STEP_TIMEOUT_S):
                request = await self._next_message()
        except TimeoutError:
            raise WireError(f"the session was idle for {STEP_TIMEOUT_S:.0f} s and is closed") from None
        return request if request is not None and request.tensors else None

    async def unless_gone(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Do `work`, but drop it when the client's stream ends meanwhile: it must not hold a place in the queue."""
        task, ahead = asyncio.create_task(work), self._read_ahead()
        try:
            await asyncio.wait({task, ahead}, return_when=asyncio.FIRST_COMPLETED)
            if ahead.done() and ahead.exception() is not None:
                ahead.result()
            return await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def wait_for_end(self) -> None:
        """Stock clients see a broken pipe if the server closes first: they write once more after their last message."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_OF_STREAM_TIMEOUT_S):
                while await self._next_message() is not None:
                    continue

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.cancel()
            self._ahead.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _next_message(self) -> runtime_pb2.ExpertRequest | None:
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            return await ahead
        return await read_message(self._reader, runtime_pb2.ExpertRequest, peer=self._peer)

    def _read_ahead(self) -> "asyncio.Task[runtime_pb2.ExpertRequest | None]":
        if self._ahead is None:
            self._ahead = asyncio.create_task(read_message(self._reader, runtime_pb2.ExpertRequest, peer=self._peer))
        return self._ahead


async def _gather(requests: AsyncIterator[runtime_pb2.ExpertRequest]) -> runtime_pb2.ExpertRequest:
    """One request out of a stream of parts: a part with a dtype starts a new tensor."""
    whole = runtime_pb2.ExpertRequest()
    tensors: list[list[runtime_pb2.Tensor]] = []
    size = 0
    async for request in requests:
        whole.uid, whole.metadata = whole.uid or request.uid, whole.metadata or request.metadata
        if request.uid != whole.uid:
            raise WireError("block uids differ within one request")
        for part in request.tensors:
            size += len(part.buffer)
            if size > MAX_FRAME_BYTES:
                raise WireError(f"a request is over the limit of {MAX_FRAME_BYTES} bytes")
            if part.dtype or not tensors:
                tensors.append([])
            tensors[-1].append(part)
    whole.tensors.extend(combine_from_streaming(parts) for parts in tensors)
    return whole


def _parts(tensors: list[runtime_pb2.Tensor]) -> list[runtime_pb2.ExpertResponse]:
    return [
        runtime_pb2.ExpertResponse(tensors=[part])
        for tensor in tensors
        for part in split_for_streaming(tensor, DEFAULT_MAX_MSG_SIZE)
    ]
