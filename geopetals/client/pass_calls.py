"""The client's end of one server's rpc_forward and rpc_backward."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PHandlerError
from hivemind.proto import runtime_pb2
from hivemind.utils.streaming import combine_from_streaming, split_for_streaming

from geopetals.client.connection import UNREACHABLE, open_stream
from geopetals.client.routing import Hop
from geopetals.swarm.records import block_uids
from geopetals.swarm.ring_messages import credential_shown
from geopetals.swarm.stack import CHAIN_DELIMITER, DUMMY, pack_args_kwargs
from geopetals.swarm.wire import (
    HANDLER,
    UNARY_LIMIT_BYTES,
    WireError,
    deserialize,
    end_of_stream,
    error_from_text,
    frame,
    gone,
    read_message,
    serialize,
    write_metadata,
)

_PART_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class PassOptions:
    """Time limits, and the certificate to show in a swarm that is not open to everybody."""

    connect_timeout_s: float
    request_timeout_s: float
    credential: bytes = b""


async def call_forward(
    p2p: P2P,
    hop: Hop,
    swarm: str,
    hidden: torch.Tensor,
    prompts: torch.Tensor | None,
    options: PassOptions,
) -> torch.Tensor:
    """rpc_forward on one server: hidden states [batch, tokens, hidden] after its blocks, nothing cached.

    `prompts` [blocks of the hop, batch or 1, prefix, hidden] are added to the first positions of each block's
    input. Raises ServerGone, ServerFull or ServerRefused.
    """
    arguments = (hidden, DUMMY if prompts is None else prompts)
    answer = await _call(p2p, hop, swarm, "rpc_forward", arguments, options)
    if len(answer) != 1 or answer[0].shape != hidden.shape:
        raise gone(hop.peer_id, "it answered a forward pass with another shape")
    return answer[0]


async def call_backward(
    p2p: P2P,
    hop: Hop,
    swarm: str,
    hidden: torch.Tensor,
    grad_output: torch.Tensor,
    prompts: torch.Tensor | None,
    options: PassOptions,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """rpc_backward on one server: gradients with respect to `hidden`, which it is given, and to `prompts`.

    Both have the shape of what they belong to. Raises ServerGone, ServerFull or ServerRefused.
    """
    arguments = (hidden, grad_output, DUMMY if prompts is None else prompts)
    answer = await _call(p2p, hop, swarm, "rpc_backward", arguments, options)
    if len(answer) != (1 if prompts is None else 2) or answer[0].shape != hidden.shape:
        raise gone(hop.peer_id, "it answered a backward pass with other shapes")
    if prompts is None:
        return answer[0], None
    grad_prompts = answer[1]
    if grad_prompts.ndim == 4 and prompts.shape[1] == 1 < grad_prompts.shape[1] == hidden.shape[0]:
        grad_prompts = grad_prompts.sum(dim=1, keepdim=True)  # stock servers answer for each row
    if grad_prompts.shape != prompts.shape:
        raise gone(hop.peer_id, "it answered a backward pass with other shapes")
    return answer[0], grad_prompts


async def _call(
    p2p: P2P,
    hop: Hop,
    swarm: str,
    method: str,
    arguments: tuple[torch.Tensor, ...],
    options: PassOptions,
) -> list[torch.Tensor]:
    """One request: unary where it is small enough, in parts on a stream otherwise."""
    tensors, structure = pack_args_kwargs(*arguments)
    shown = credential_shown(options.credential) if options.credential else {}
    request = runtime_pb2.ExpertRequest(
        uid=CHAIN_DELIMITER.join(block_uids(swarm, hop.start, hop.end)),
        tensors=[serialize(tensor) for tensor in tensors],
        metadata=write_metadata({"args_structure": structure, **shown}),
    )
    try:
        async with asyncio.timeout(options.request_timeout_s):
            if request.ByteSize() <= UNARY_LIMIT_BYTES:
                answer = await _call_unary(p2p, hop.peer_id, method, request)
            else:
                answer = await _call_stream(p2p, hop.peer_id, f"{method}_stream", request, options.connect_timeout_s)
        return [deserialize(tensor) for tensor in answer]
    except TimeoutError as error:
        raise gone(hop.peer_id, f"no answer within {options.request_timeout_s:.0f} s") from error
    except WireError as error:
        raise gone(hop.peer_id, f"it sent what is no answer: {error}") from error


async def _call_unary(
    p2p: P2P, peer_id: str, method: str, request: runtime_pb2.ExpertRequest
) -> Sequence[runtime_pb2.Tensor]:
    try:
        response = await p2p.call_protobuf_handler(
            PeerID.from_base58(peer_id), f"{HANDLER}.{method}", request, runtime_pb2.ExpertResponse
        )
    except P2PHandlerError as error:
        raise error_from_text(str(error), peer_id) from error
    except UNREACHABLE as error:
        raise gone(peer_id, "no connection") from error
    tensors: Sequence[runtime_pb2.Tensor] = response.tensors
    return tensors


async def _call_stream(
    p2p: P2P, peer_id: str, method: str, request: runtime_pb2.ExpertRequest, connect_timeout_s: float
) -> Sequence[runtime_pb2.Tensor]:
    """A call whose tensors travel in parts; the end of the stream ends the answer."""
    reader, writer = await open_stream(p2p, peer_id, method, connect_timeout_s)
    parts: list[list[runtime_pb2.Tensor]] = []
    try:
        for tensor in request.tensors:
            for part in split_for_streaming(tensor, _PART_BYTES):
                message = runtime_pb2.ExpertRequest(uid=request.uid, metadata=request.metadata, tensors=[part])
                writer.write(frame(message))
                await writer.drain()
        writer.write(end_of_stream())
        while True:
            try:
                response = await read_message(reader, runtime_pb2.ExpertResponse, peer=peer_id)
            except asyncio.IncompleteReadError as end:
                if end.partial or not parts:
                    raise
                break
            if response is None:
                break
            for part in response.tensors:
                if part.dtype or not parts:
                    parts.append([])
                parts[-1].append(part)
    except UNREACHABLE as error:
        raise gone(peer_id, "the connection was lost") from error
    finally:
        writer.close()
    return [combine_from_streaming(tensor_parts) for tensor_parts in parts]
