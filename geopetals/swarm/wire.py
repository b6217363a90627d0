"""PETALS' messages on libp2p streams: framing, tensors and errors, read as coming from a hostile peer.

A stream carries frames: one marker byte (0 message, 1 error), eight bytes of length, a protobuf. Tensors keep the bytes
of hivemind's NONE and FLOAT16 compression. bfloat16 is sent as its own two bytes, which hivemind >= 1.1.8 reads, and
read in that form or as the float32 that hivemind sends by default.
"""

import asyncio
import math
import re
import time
from typing import Any, Protocol, TypeVar

import torch
from google.protobuf.message import DecodeError, Message
from hivemind.proto import runtime_pb2
from hivemind.proto.p2pd_pb2 import RPCError
from hivemind.utils.serializer import MSGPackSerializer

from geopetals.errors import (
    GeoPetalsError,
    InputRefused,
    NotAdmitted,
    ServerBroken,
    ServerFull,
    ServerGone,
    ServerMoving,
    ServerRefused,
)
from geopetals.swarm.message_checks import parse
from geopetals.swarm.rates import Rates

HANDLER = "TransformerConnectionHandler"
MAX_FRAME_BYTES = 256 * 2**20
UNARY_LIMIT_BYTES = 2 * 2**20
MAX_BATCH = 1024
MAX_METADATA_BYTES = 2**16
LARGE_FRAME_BYTES = 2**22

_CLOSE_GRACE_S = 20.0
_MAX_TEXT = 500
_MAX_DIMENSIONS, _MAX_LENGTH = 8, 2**27
_MESSAGE, _ERROR = b"\x00", b"\x01"
_HEADER_BYTES = 9
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int64": torch.int64}
_NONE, _FLOAT16 = runtime_pb2.CompressionType.NONE, runtime_pb2.CompressionType.FLOAT16
_BROKEN_MARK, _INPUT_MARK, _MOVING_MARK = "ServerBroken: ", "BadInput: ", "ServerMoving: "
_NOT_ADMITTED_MARK = re.compile(r"NotAdmitted\((\w{1,20})\): ")
_FULL_MARK = re.compile(r"ServerFull(?:\((\d{1,9}\.\d)\))?: ")

AnyMessage = TypeVar("AnyMessage", bound=Message)


class ByteReader(Protocol):
    """An asyncio.StreamReader, or what reads from one."""

    async def readexactly(self, n: int, /) -> bytes: ...


class WireError(ValueError):
    """What the peer sent breaks the protocol; the text goes back to it."""


class BadInput(WireError):
    """What the previous server of the chain sent cannot be computed on; the client is told whose fault it is."""


def frame(message: Message) -> bytes:
    body: bytes = message.SerializeToString()
    return _MESSAGE + len(body).to_bytes(8, "big") + body


def error_frame(error: BaseException) -> bytes:
    """An error as the peer's hivemind expects it. Its type is told by a prefix that stock clients ignore."""
    text = str(error) or type(error).__name__
    body: bytes = RPCError(message=_mark(error) + text[:_MAX_TEXT]).SerializeToString()
    return _ERROR + len(body).to_bytes(8, "big") + body


def _mark(error: BaseException) -> str:
    if isinstance(error, NotAdmitted):
        return f"NotAdmitted({error.reason}): "
    if isinstance(error, ServerMoving):
        return _MOVING_MARK
    if isinstance(error, ServerFull):
        return "ServerFull: " if error.free_in_s is None else f"ServerFull({min(error.free_in_s, 1e8):.1f}): "
    marks = ((ServerBroken, _BROKEN_MARK), (BadInput, _INPUT_MARK))
    return next((mark for kind, mark in marks if isinstance(error, kind)), "")


def send(writer: asyncio.StreamWriter, data: bytes) -> None:
    """Write to a peer. Raises ConnectionResetError if it is gone, for which uvloop has a RuntimeError."""
    if writer.is_closing():
        raise ConnectionResetError("the stream is closed")
    writer.write(data)


async def drain(writer: asyncio.StreamWriter, *, timeout_s: float) -> None:
    """Wait until there is room to write more. Raises ConnectionResetError if the peer does not read for so long."""
    try:
        async with asyncio.timeout(timeout_s):
            await writer.drain()
    except TimeoutError:
        writer.transport.abort()  # close() would wait for what is not read
        raise ConnectionResetError(f"the peer read nothing for {timeout_s:.0f} s") from None


def close(writer: asyncio.StreamWriter) -> None:
    """End a stream, in some seconds at the latest: a peer that does not read the rest would keep it open for ever."""
    writer.close()
    if writer.transport.get_write_buffer_size() > 0:
        asyncio.get_running_loop().call_later(_CLOSE_GRACE_S, writer.transport.abort)


def send_error(writer: asyncio.StreamWriter, error: BaseException) -> None:
    """The last word, if somebody is still there."""
    if not writer.is_closing():
        writer.write(error_frame(error))


def end_of_stream() -> bytes:
    """hivemind's mark after the last request: an error without a message."""
    return _ERROR + (0).to_bytes(8, "big")


def error_from_text(text: str, peer: str) -> GeoPetalsError:
    """The typed error for what a server answered."""
    text = " ".join(text.split())[:_MAX_TEXT]
    full = _FULL_MARK.match(text)
    if full is not None:
        return ServerFull(text[full.end() :], free_in_s=None if full[1] is None else float(full[1]))
    refusal = _NOT_ADMITTED_MARK.match(text)
    if refusal is not None:
        return NotAdmitted(f"server {short_peer(peer)}: {text[refusal.end() :]}", reason=refusal[1])
    if text.startswith(_BROKEN_MARK):
        return ServerBroken(text.removeprefix(_BROKEN_MARK))
    if text.startswith(_INPUT_MARK):
        return InputRefused(text.removeprefix(_INPUT_MARK))
    if text.startswith(_MOVING_MARK):
        return ServerMoving(text.removeprefix(_MOVING_MARK))
    if text.startswith("ServerMoving("):  # as hivemind's unary calls tell exceptions
        return ServerMoving(f"server {short_peer(peer)} gives up its blocks: {text}")
    if text.startswith("ServerFull("):
        return ServerFull(f"server {short_peer(peer)} takes no more: {text}")
    if "AllocationFailed" in text or "Could not allocate" in text:
        return ServerFull(f"server {short_peer(peer)} has no free attention cache: {text}")
    return ServerRefused(f"server {short_peer(peer)} refused the request: {text}")


async def read_message(
    reader: ByteReader,
    kind: type[AnyMessage],
    *,
    peer: str,
    large: asyncio.Lock | None = None,
    rates: Rates | None = None,
) -> AnyMessage | None:
    """The next message; None for hivemind's end-of-stream mark. `large` is held while a large one is read; `rates`
    hears how long it took.

    Raises asyncio.IncompleteReadError at the end of the stream, ServerFull or ServerRefused for an error frame and
    WireError for what is no frame.
    """
    began = time.perf_counter()
    header = await reader.readexactly(_HEADER_BYTES)
    there = time.perf_counter()
    size = int.from_bytes(header[1:], "big")
    if size > MAX_FRAME_BYTES:
        raise WireError(f"a message of {size} bytes is over the limit of {MAX_FRAME_BYTES}")
    if large is not None and size > LARGE_FRAME_BYTES:
        async with large:
            body = await reader.readexactly(size)
    else:
        body = await reader.readexactly(size)
        if rates is not None:
            rates.note(peer, size, waited_s=there - began, took_s=time.perf_counter() - there)
    try:
        if header[:1] == _MESSAGE:
            return parse(kind, body)
        if header[:1] == _ERROR:
            text = RPCError.FromString(body).message
            if not text:
                return None
            raise error_from_text(text, peer)
    except DecodeError as error:
        raise WireError("a message is no valid protobuf") from error
    raise WireError("a frame starts with an unknown marker")


def read_metadata(data: bytes) -> dict[str, Any]:
    """The metadata of a request: a msgpack map, or nothing."""
    if not data:
        return {}
    if len(data) > MAX_METADATA_BYTES:
        raise WireError(f"metadata of {len(data)} bytes is over the limit of {MAX_METADATA_BYTES}")
    try:
        metadata = MSGPackSerializer.loads(data)
    except Exception as error:  # extension types run code of hivemind's that may raise anything
        raise WireError("the request's metadata is no valid msgpack") from error
    if not isinstance(metadata, dict):
        raise WireError("the request's metadata is not a map")
    return metadata


def write_metadata(metadata: dict[str, Any]) -> bytes:
    data: bytes = MSGPackSerializer.dumps(metadata)
    return data


def serialize(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> runtime_pb2.Tensor:
    """A CPU or device tensor as hivemind's NONE compression writes it."""
    raw = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
    buffer = (raw.view(torch.int16) if raw.dtype == torch.bfloat16 else raw).numpy().tobytes()
    name = str(raw.dtype).removeprefix("torch.")
    return runtime_pb2.Tensor(compression=_NONE, buffer=buffer, size=raw.shape, dtype=name)


def deserialize(message: runtime_pb2.Tensor) -> torch.Tensor:
    """A tensor from a peer; its kind, shape and length are checked before anything is allocated for it."""
    dtype, compression = _DTYPES.get(message.dtype), message.compression
    if dtype is None or compression not in (_NONE, _FLOAT16):
        raise WireError(f"tensors of kind {message.dtype[:20]!r} with compression {compression} are not accepted")
    shape, data = tuple(message.size), message.buffer  # each look at a protobuf's field copies it
    if len(shape) > _MAX_DIMENSIONS or (shape and not 0 <= min(shape) <= max(shape) <= _MAX_LENGTH):
        raise WireError(f"tensors have at most {_MAX_DIMENSIONS} dimensions of at most {_MAX_LENGTH}")
    count = math.prod(shape)
    stored = _stored_dtype(compression, dtype, count, len(data))
    if count * stored.itemsize != len(data):
        raise WireError(f"a tensor of shape {shape} does not fit its {len(data)} bytes")
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=stored).reshape(shape).to(dtype)


def _stored_dtype(compression: int, dtype: torch.dtype, count: int, size: int) -> torch.dtype:
    if compression == _FLOAT16:
        return torch.float16
    if dtype != torch.bfloat16:
        return dtype
    return torch.bfloat16 if size == 2 * count else torch.float32


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether there is no NaN and no infinity in it. A sum is cheaper, and finite only then."""
    return math.isfinite(float(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())


def gone(peer: str, why: str) -> ServerGone:
    return ServerGone(f"server {short_peer(peer)} does not answer any more ({why}).")


def short_peer(peer: str) -> str:
    """The end of a peer id: enough to tell servers apart in a line of text."""
    return f"…{peer[-6:]}"
