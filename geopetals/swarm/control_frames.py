"""What a control channel carries: small msgpack maps in the frames of PETALS' streams, read as from a hostile peer."""

import asyncio
from typing import Any

import msgpack
from google.protobuf.message import DecodeError
from hivemind.proto import runtime_pb2

from geopetals.errors import (
    Busy,
    GeoPetalsError,
    NoChain,
    NotAdmitted,
    ServerFull,
    ServerRefused,
    SwarmFailure,
    SwarmMismatch,
    TokenError,
)
from geopetals.swarm.message_checks import parse
from geopetals.swarm.wire import WireError, frame

MAX_BYTES = 2**20
_MAX_DEPTH = 12
_MAX_TEXT = 500
_HEADER_BYTES = 9
_MESSAGE = b"\x00"
_TYPED: dict[str, type[GeoPetalsError]] = {
    kind.__name__: kind for kind in (SwarmMismatch, TokenError, ServerRefused, NoChain, SwarmFailure)
}


def write_frame(kind: str, metadata: dict[str, Any]) -> bytes:
    """Raises WireError if it is more than the other end takes."""
    data: bytes = msgpack.packb(metadata)
    if len(data) > MAX_BYTES:
        raise WireError(f"a control message of {len(data)} bytes is over the limit of {MAX_BYTES}")
    return frame(runtime_pb2.ExpertRequest(uid=kind, metadata=data))


async def read_frame(reader: asyncio.StreamReader) -> tuple[str, dict[str, Any]]:
    """The next message's kind and contents. Raises WireError, asyncio.IncompleteReadError or ConnectionError."""
    header = await reader.readexactly(_HEADER_BYTES)
    size = int.from_bytes(header[1:], "big")
    if header[:1] != _MESSAGE or size > MAX_BYTES + 1024:
        raise WireError(f"a control message is at most {MAX_BYTES} bytes long")
    try:
        message = parse(runtime_pb2.ExpertRequest, await reader.readexactly(size))
    except DecodeError as error:
        raise WireError("a control message is no valid protobuf") from error
    return message.uid, _unpack(message.metadata)


def _unpack(data: bytes) -> dict[str, Any]:
    if not data:
        return {}
    try:
        contents = msgpack.unpackb(data, ext_hook=_no_extension)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise WireError("a control message is no valid msgpack") from error
    if not isinstance(contents, dict):
        raise WireError("a control message must be a map")
    _check_depth(contents, _MAX_DEPTH)
    return contents


def _no_extension(code: int, data: bytes) -> Any:
    raise ValueError(f"extension type {code}")


def _check_depth(value: Any, left: int) -> None:
    if left == 0:
        raise WireError(f"a control message is nested more than {_MAX_DEPTH} deep")
    for part in value.values() if isinstance(value, dict) else value:
        if isinstance(part, dict | list):
            _check_depth(part, left - 1)


def describe_error(error: Exception) -> dict[str, Any]:
    """An error as the other end will raise it again. A type that it does not know becomes a SwarmFailure."""
    described: dict[str, Any] = {"kind": type(error).__name__, "text": str(error)[:_MAX_TEXT]}
    if isinstance(error, NotAdmitted):
        described["reason"] = error.reason
    if isinstance(error, Busy):
        described["retry_after_s"] = error.retry_after_s
    if isinstance(error, ServerFull):
        described["retry_after_s"] = error.free_in_s
    return described


def error_of(described: Any) -> GeoPetalsError:
    """What `describe_error` made, or anything else that a peer sends in its place."""
    if not isinstance(described, dict):
        return SwarmFailure("the other end refused without saying why.")
    kind, text, delay = described.get("kind"), described.get("text"), described.get("retry_after_s")
    text = " ".join(str(text).split())[:_MAX_TEXT]
    delay = float(delay) if isinstance(delay, int | float) and 0 <= delay < 1e8 else None
    if kind == "NotAdmitted":
        return NotAdmitted(text, reason=str(described.get("reason"))[:40])
    if kind == "Busy":
        return Busy(text, retry_after_s=delay)
    if kind == "ServerFull":
        return ServerFull(text, free_in_s=delay)
    return _TYPED.get(kind if isinstance(kind, str) else "", SwarmFailure)(text)
