"""Protobufs from strangers: counted before they are parsed.

Parsing multiplies: an empty tensor takes two bytes on the wire and about a hundred in memory, so that one message of
the size that is allowed could fill a machine. Messages that are too small for that are parsed at once.
"""

from typing import TypeVar

from google.protobuf.message import DecodeError, Message
from hivemind.proto import runtime_pb2

AnyMessage = TypeVar("AnyMessage", bound=Message)

MAX_FIELDS = 32
_SMALL_BYTES = 2**14
_BYTES_FIELD = 2


def parse(kind: type[AnyMessage], data: bytes) -> AnyMessage:
    """Raises DecodeError for what is no such message, or is one of far too many parts."""
    if len(data) > _SMALL_BYTES:
        _check_fields(data)
    return kind.FromString(data)


class StrictRequest:
    """hivemind asks the type of a unary request for nothing else than this."""

    @staticmethod
    def FromString(data: bytes) -> runtime_pb2.ExpertRequest:
        return parse(runtime_pb2.ExpertRequest, data)


def _check_fields(data: bytes) -> None:
    """All fields of PETALS' messages are strings of bytes: tensors, texts, metadata."""
    position = fields = 0
    while position < len(data):
        tag, position = _varint(data, position)
        length, position = _varint(data, position)
        fields += 1
        if tag & 7 != _BYTES_FIELD or fields > MAX_FIELDS:
            raise DecodeError("a large message has unknown or too many fields")
        position += length
    if position != len(data):
        raise DecodeError("a message is cut off")


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        if position >= len(data):
            break
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise DecodeError("a message is cut off")
