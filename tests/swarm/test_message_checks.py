"""Messages that would take a machine's memory, or end its process, are refused before that."""

import struct

import pytest
import torch
from google.protobuf.message import DecodeError
from hivemind.proto import runtime_pb2
from hivemind.utils.serializer import MSGPackSerializer

from geopetals.errors import ServerFull, ServerRefused
from geopetals.swarm import stack  # noqa: F401 - limits hivemind's serializer
from geopetals.swarm.message_checks import StrictRequest, parse
from geopetals.swarm.wire import (
    MAX_METADATA_BYTES,
    WireError,
    error_frame,
    error_from_text,
    read_metadata,
    serialize,
    write_metadata,
)

Request = runtime_pb2.ExpertRequest


def test_large_honest_messages_are_read() -> None:
    request = Request(uid="a.1", tensors=[serialize(torch.randn(1, 500, 64))] * 3, metadata=b"x" * 300)
    assert StrictRequest.FromString(request.SerializeToString()) == request


@pytest.mark.parametrize(
    "data",
    [
        Request(tensors=[runtime_pb2.Tensor()] * 20_000).SerializeToString(),
        b"\x12\x80\x80\x04" + bytes(2**14),  # says that it is longer than it is
        b"\x0a" + b"\xff" * 2**15,
        b"\x08\x01" * 2**14,  # numbers, where there are none
        Request(uid="x" * 2**15).SerializeToString()[:-1],
    ],
    ids=["many tensors", "cut off", "endless length", "unknown fields", "one byte short"],
)
def test_large_dishonest_messages_are_refused(data: bytes) -> None:
    with pytest.raises(DecodeError):
        parse(Request, data)


def nested(depth: int) -> bytes:
    data = b"\xc0"
    for _ in range(depth):
        inner = b"\x91" + data
        data = b"\xc9" + struct.pack(">IB", len(inner), 0x40) + inner
    return b"\x81\xa1x" + data


def test_tuples_within_tuples_do_not_end_the_process() -> None:
    """In 200 levels, 3 KB, there is more recursion than an 8 MiB stack can hold. Records in the DHT are read so too."""
    assert read_metadata(nested(10))["x"][0][0] is not None
    for depth in (25, 200, 3000):
        with pytest.raises(ValueError, match="nested"):
            MSGPackSerializer.loads(nested(depth))
        with pytest.raises(WireError):
            read_metadata(nested(depth))
    assert read_metadata(nested(10))  # the limit is for each message anew


def test_metadata_has_a_limit() -> None:
    assert read_metadata(write_metadata({"x": "y" * 1000}))
    with pytest.raises(WireError, match="over the limit"):
        read_metadata(write_metadata({"x": "y" * MAX_METADATA_BYTES}))


@pytest.mark.parametrize("free_in_s", [None, 0.0, 12.5, 1e12])
def test_when_there_will_be_room_survives_the_wire(free_in_s: float | None) -> None:
    body = error_frame(ServerFull("no room.", free_in_s=free_in_s))[9:]
    text = body[2:].decode()
    error = error_from_text(text, "peer")
    assert isinstance(error, ServerFull)
    assert str(error) == "no room."
    assert error.free_in_s == (None if free_in_s is None else min(free_in_s, 1e8))


def test_a_long_error_is_cut() -> None:
    assert len(error_frame(WireError("x" * 10**6))) < 600
    assert len(str(error_from_text("line\n" * 10**6, "peer"))) < 600
    assert isinstance(error_from_text("ServerFull(nonsense): x", "peer"), ServerFull | ServerRefused)
