"""Two small libp2p protocols that p2pd speaks, from the asking side: is a peer alive, and what does a relay grant?

A relay answers a reservation with the limits of its circuits (circuit relay v2, `HopMessage` in its specification), and
tells whether a peer can be reached through it. Asking that way is exact: the same handler opens the circuits.
"""

import asyncio
import os
from collections.abc import Iterator
from dataclasses import dataclass

from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure, DispatchFailure, P2PDaemonError

from geopetals.errors import NetworkError

UNREACHABLE = (ControlFailure, DispatchFailure, P2PDaemonError, OSError, asyncio.IncompleteReadError)

_HOP = "/libp2p/circuit/relay/0.2.0/hop"
_PING = "/ipfs/ping/1.0.0"
_PING_BYTES = 32
_LARGEST_ANSWER = 1 << 16
_RESERVE = bytes([2, 0x08, 0x00])  # its length; type (field 1) RESERVE (0)
_CONNECT = 1
_TYPE, _PEER, _LIMIT, _STATUS = 1, 2, 4, 5
_STATUS_MESSAGE, _OK = 2, 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Granted:
    """The limits of one circuit; 0 is none."""

    data_bytes: int
    seconds: int


async def ask_limits(p2p: P2P, relay: str, *, timeout_s: float) -> Granted:
    """What the relay grants this peer. Raises NetworkError if it does not answer, or refuses."""
    answer = await _ask(p2p, relay, _HOP, _RESERVE, timeout_s=timeout_s)
    try:
        fields = dict(_fields(answer))
        if fields.get(_TYPE) != _STATUS_MESSAGE or fields.get(_STATUS) != _OK:
            raise _no_answer(relay, f"it reserves nothing, status {fields.get(_STATUS)!r}")
        limit = dict(_fields(fields.get(_LIMIT, b"")))  # type: ignore[arg-type]
        return Granted(seconds=_number(limit.get(1, 0)), data_bytes=_number(limit.get(2, 0)))
    except (IndexError, TypeError) as error:
        raise _no_answer(relay, "it does not speak the protocol of relays") from error


async def can_reach(p2p: P2P, relay: str, peer: str, *, timeout_s: float) -> bool:
    """Whether the relay, which this peer is connected to, opens a circuit to the other peer. It is closed again."""
    name = _field(1, PeerID.from_base58(peer).to_bytes())
    message = bytes([_TYPE << 3, _CONNECT]) + _field(_PEER, name)
    try:
        answer = await _ask(p2p, relay, _HOP, bytes([len(message)]) + message, timeout_s=timeout_s)
        return dict(_fields(answer)).get(_STATUS) == _OK
    except (NetworkError, IndexError):
        return False


async def ping(p2p: P2P, peer: str, *, timeout_s: float) -> bool:
    """Whether the peer's p2pd answers."""
    sent = os.urandom(_PING_BYTES)
    try:
        return await _ask(p2p, peer, _PING, sent, timeout_s=timeout_s) == sent
    except NetworkError:
        return False


async def _ask(p2p: P2P, peer: str, protocol: str, question: bytes, *, timeout_s: float) -> bytes:
    try:
        async with asyncio.timeout(timeout_s):
            _, reader, writer = await p2p.call_binary_stream_handler(PeerID.from_base58(peer), protocol)
            try:
                writer.write(question)
                await writer.drain()
                size = _PING_BYTES if protocol == _PING else await _read_length(reader)
                answer: bytes = await reader.readexactly(size)
                return answer
            finally:
                writer.close()
    except TimeoutError as error:
        raise _no_answer(peer, f"no answer within {timeout_s:.0f} s") from error
    except UNREACHABLE as error:
        raise _no_answer(peer, "no connection") from error


def _no_answer(peer: str, why: str) -> NetworkError:
    return NetworkError(f"peer {peer} cannot be asked ({why}): is it running, and reachable from this machine?")


async def _read_length(reader: asyncio.StreamReader) -> int:
    value, shift = 0, 0
    while True:
        (byte,) = await reader.readexactly(1)
        value |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            return value
        if value > _LARGEST_ANSWER:
            raise ConnectionError("the answer is too long")


def _field(number: int, data: bytes) -> bytes:
    """Of fewer than 128 bytes."""
    return bytes([number << 3 | 2, len(data)]) + data


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values of a protobuf message: varints, and what has a length. Raises IndexError for others."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        value, position = _varint(data, position)
        if key & 7 == 0:
            yield key >> 3, value
        elif key & 7 == 2 and position + value <= len(data):
            yield key >> 3, data[position : position + value]
            position += value
        else:
            raise IndexError("a field of another kind, or cut short")


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value, shift = 0, 0
    while data[position] & 0x80:
        value |= (data[position] & 0x7F) << shift
        position, shift = position + 1, shift + 7
    return value | data[position] << shift, position + 1


def _number(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise TypeError("a field of another kind")
    return value
