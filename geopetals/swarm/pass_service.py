"""rpc_forward and rpc_backward: passes without a cache, what training is made of."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

import torch
from hivemind.p2p.p2p_daemon_bindings.control import DEFAULT_MAX_MSG_SIZE
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.proto import runtime_pb2
from hivemind.utils.streaming import combine_from_streaming, split_for_streaming

from geopetals.errors import GeoPetalsError, NotAdmitted
from geopetals.swarm import block_ops
from geopetals.swarm.compute import ComputeThread, Priority
from geopetals.swarm.gate import Gate
from geopetals.swarm.inbox import STEP_TIMEOUT_S
from geopetals.swarm.limits import PeerLimits
from geopetals.swarm.peer_calls import told_to_peers
from geopetals.swarm.ring_messages import read_credential
from geopetals.swarm.server_session import read_uids
from geopetals.swarm.stage import Stage
from geopetals.swarm.wire import (
    MAX_FRAME_BYTES,
    WireError,
    close,
    drain,
    frame,
    read_message,
    read_metadata,
    send,
    send_error,
    serialize,
    short_peer,
)

log = logging.getLogger(__name__)

_FORWARD_TOKENS = 16384
_REQUEST_TIMEOUT_S = 300.0
_MAX_PARTS = 4096
_HEAR_OUT_S, _MOST_TURNED_AWAY = 5.0, 64
Pass = Callable[[runtime_pb2.ExpertRequest, str], Awaitable[list[runtime_pb2.Tensor]]]


class PassService:
    """Forward and backward passes through blocks of one stage."""

    def __init__(
        self,
        stage: Stage,
        compute: ComputeThread,
        *,
        swarm: str,
        length_limit: int,
        limits: PeerLimits,
        gate: Gate,
    ) -> None:
        self._stage, self._compute, self._limits, self._gate = stage, compute, limits, gate
        self._swarm, self._length_limit = swarm, length_limit
        self._served = range(stage.start, stage.end)
        self._streams: set[asyncio.Task[None]] = set()
        self._turned_away = 0

    async def close(self) -> None:
        tasks = list(self._streams)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def forward(self, request: runtime_pb2.ExpertRequest, peer: str) -> runtime_pb2.ExpertResponse:
        self._admit(peer, request)
        return runtime_pb2.ExpertResponse(tensors=await self._forward(request, peer))

    async def backward(self, request: runtime_pb2.ExpertRequest, peer: str) -> runtime_pb2.ExpertResponse:
        self._admit(peer, request)
        return runtime_pb2.ExpertResponse(tensors=await self._backward(request, peer))

    async def serve_forward(self, info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._serve(self._forward, info, reader, writer)

    async def serve_backward(
        self, info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await self._serve(self._backward, info, reader, writer)

    async def _serve(
        self, function: Pass, info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """One call whose tensors travel in parts. Not by hivemind's handler, which reads messages of any length."""
        task = asyncio.current_task()
        assert task is not None
        self._streams.add(task)
        peer = info.peer_id.to_base58()
        try:
            with self._limits.call(peer), told_to_peers(peer):
                async with asyncio.timeout(_REQUEST_TIMEOUT_S):
                    request = await _gather(self._parts(peer, reader))
                for part in _parts(await function(request, peer)):
                    send(writer, frame(part))
                    await drain(writer, timeout_s=STEP_TIMEOUT_S)
        except (asyncio.IncompleteReadError, ConnectionError):
            log.debug("pass.lost client=%s", short_peer(peer))
        except TimeoutError:
            send_error(writer, WireError(f"the request did not arrive within {_REQUEST_TIMEOUT_S:.0f} s"))
        except NotAdmitted as error:
            await self._turn_away(error, reader, writer)
        except (WireError, GeoPetalsError, RuntimeError) as error:
            send_error(writer, error)
        finally:
            self._streams.discard(task)
            close(writer)

    async def _turn_away(self, error: NotAdmitted, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Say why, and hear the client out: a stream that is closed on its words is reset, as if by a failure."""
        send_error(writer, error)
        if self._turned_away >= _MOST_TURNED_AWAY:
            return
        self._turned_away += 1
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(_HEAR_OUT_S):
                while await reader.read(2**16):
                    continue
        self._turned_away -= 1

    async def _parts(self, peer: str, reader: asyncio.StreamReader) -> AsyncIterator[runtime_pb2.ExpertRequest]:
        large = self._limits.large_message(peer)
        is_admitted = False
        while True:
            await self._limits.message(peer)
            part = await read_message(reader, runtime_pb2.ExpertRequest, peer=peer, large=large)
            if part is None:
                return
            if not is_admitted:
                self._admit(peer, part)
                is_admitted = True
            yield part

    def _admit(self, peer: str, request: runtime_pb2.ExpertRequest) -> None:
        self._gate.admit_pass(peer, read_credential(read_metadata(request.metadata)))

    async def _forward(self, request: runtime_pb2.ExpertRequest, peer: str) -> list[runtime_pb2.Tensor]:
        span = read_uids(request.uid, served=self._served, swarm=self._swarm)
        structure = read_metadata(request.metadata).get("args_structure")

        def compute() -> list[runtime_pb2.Tensor]:
            step = block_ops.read_step(request.tensors, structure, self._stage, span)
            self._check_length(step.hidden)
            with torch.inference_mode():
                return [serialize(block_ops.forward(self._stage, span, step.hidden, step.prompts))]

        async with self._limits.compute_pass(peer):
            return await self._compute.run(compute, Priority.BATCH)

    async def _backward(self, request: runtime_pb2.ExpertRequest, peer: str) -> list[runtime_pb2.Tensor]:
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

        async with self._limits.compute_pass(peer):
            return await self._compute.run(compute, Priority.BATCH)

    def _check_length(self, hidden: torch.Tensor) -> None:
        """A pass is one piece of work, which sessions have to wait for."""
        limit = max(self._length_limit, _FORWARD_TOKENS)
        if hidden.shape[0] * hidden.shape[1] > limit:
            raise WireError(f"this server takes {limit} tokens at a time, got {hidden.shape[0]} x {hidden.shape[1]}")


async def _gather(requests: AsyncIterator[runtime_pb2.ExpertRequest]) -> runtime_pb2.ExpertRequest:
    """One request out of a stream of parts: a part with a dtype starts a new tensor."""
    whole = runtime_pb2.ExpertRequest()
    tensors: list[list[runtime_pb2.Tensor]] = []
    size = parts = 0
    async for request in requests:
        whole.uid, whole.metadata = whole.uid or request.uid, whole.metadata or request.metadata
        if request.uid != whole.uid:
            raise WireError("block uids differ within one request")
        for part in request.tensors:
            size += len(part.buffer)
            parts += 1
            if size > MAX_FRAME_BYTES or parts > _MAX_PARTS:
                raise WireError(f"a request is over the limit of {MAX_FRAME_BYTES} bytes in {_MAX_PARTS} parts")
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
