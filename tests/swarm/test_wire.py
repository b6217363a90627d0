import asyncio
import math
import socket
import time
from collections.abc import Sequence

import pytest
import torch
from hivemind.compression import deserialize_torch_tensor, serialize_torch_tensor
from hivemind.proto import runtime_pb2
from hivemind.proto.runtime_pb2 import CompressionType
from hivemind.utils.serializer import MSGPackSerializer
from hypothesis import given, settings
from hypothesis import strategies as st

from geopetals.errors import ServerFull, ServerRefused
from geopetals.swarm import wire
from geopetals.swarm.wire import WireError, deserialize, drain, read_message, serialize

PEER = "12D3KooWPeer"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def tensor_of(shape: Sequence[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.int64:
        return torch.randint(-(2**62), 2**62, tuple(shape), generator=generator)
    values = torch.randn(tuple(shape), generator=generator) * 1000
    return values.to(dtype)


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    bits = [tensor.flatten().view(torch.uint8) for tensor in (ours, theirs)]
    return (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape) and torch.equal(*bits)


@settings(deadline=None)
@given(SHAPES, st.sampled_from([*FLOATS, torch.int64]), st.integers(0, 2**31))
def test_every_tensor_survives_the_trip(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    tensor = tensor_of(shape, dtype, seed)
    sent = runtime_pb2.Tensor.FromString(serialize(tensor).SerializeToString())
    assert same_bits(deserialize(sent), tensor)


def test_infinities_and_nan_survive() -> None:
    tensor = torch.tensor([math.inf, -math.inf, math.nan, -0.0])
    for dtype in FLOATS:
        back = deserialize(serialize(tensor.to(dtype)))
        assert back.dtype == dtype
        assert torch.equal(back.isnan(), tensor.isnan())
        assert back[:2].tolist() == [math.inf, -math.inf]


def test_views_and_leaves_are_sent_by_value() -> None:
    base = torch.arange(12.0, requires_grad=True).reshape(3, 4)
    assert torch.equal(deserialize(serialize(base.T[1:])), base.detach().T[1:])


def test_what_is_received_can_be_written_to() -> None:
    received = deserialize(serialize(torch.zeros(3)))
    received += 1
    assert received.tolist() == [1, 1, 1]


def test_a_format_can_be_asked_for() -> None:
    assert serialize(torch.ones(2), torch.bfloat16).dtype == "bfloat16"


@settings(deadline=None)
@given(SHAPES, st.sampled_from([torch.float32, torch.float16]), st.integers(0, 2**31))
def test_the_bytes_are_those_of_hivemind(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    tensor = tensor_of(shape, dtype, seed)
    theirs = serialize_torch_tensor(tensor, CompressionType.NONE)
    assert serialize(tensor).SerializeToString() == theirs.SerializeToString()


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64])
def test_hivemind_reads_what_we_write(dtype: torch.dtype) -> None:
    tensor = tensor_of((2, 3, 4), dtype, 0)
    assert same_bits(deserialize_torch_tensor(serialize(tensor)), tensor)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64])
def test_we_read_what_hivemind_writes(dtype: torch.dtype) -> None:
    tensor = tensor_of((2, 3, 4), dtype, 0)
    assert same_bits(deserialize(serialize_torch_tensor(tensor, CompressionType.NONE)), tensor)


def test_we_read_hiveminds_half_precision_compression() -> None:
    tensor = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    received = deserialize(serialize_torch_tensor(tensor, CompressionType.FLOAT16))
    assert received.dtype == torch.float32
    assert torch.allclose(received, tensor, atol=2e-3)


def message(
    size: Sequence[int], buffer: bytes = b"", dtype: str = "float32", compression: int = 0
) -> runtime_pb2.Tensor:
    return runtime_pb2.Tensor(size=list(size), buffer=buffer, dtype=dtype, compression=compression)


@pytest.mark.parametrize(
    "hostile",
    [
        message([2], b"1234"),
        message([1], b"12345"),
        message([], b""),
        message([0], b"1234"),
        message([2**32 - 1], b"1234"),
        message([2**32 - 1] * 8, b"1234"),
        message([2**31, 2**31, 4], b""),
        message([0, 2**32 - 1, 2**32 - 1, 2**32 - 1], b""),
        message([1, 1], b"123", dtype="bfloat16"),
        message([1], b"1234", dtype="object"),
        message([1], b"1234", dtype=""),
        message([1], b"1234", dtype="float64"),
        message([1], b"1234", dtype="__class__"),
        message([1], b"1234", compression=CompressionType.QUANTILE_8BIT),
        message([1], b"1234", compression=CompressionType.BLOCKWISE_8BIT),
        message([1], b"1234", compression=77),
    ],
    ids=lambda hostile: f"{hostile.dtype or 'none'}-{list(hostile.size)}-{len(hostile.buffer)}-{hostile.compression}",
)
def test_hostile_tensors_are_refused(hostile: runtime_pb2.Tensor) -> None:
    with pytest.raises(WireError):
        deserialize(hostile)


def test_a_negative_dimension_is_no_dimension() -> None:
    # -1 as a varint of ten bytes, which protobuf cuts to the 32 bits of the field.
    raw = message([1], b"").SerializeToString().replace(b"\x12\x01\x01", b"\x12\x0a" + b"\xff" * 9 + b"\x01")
    with pytest.raises(WireError):
        deserialize(runtime_pb2.Tensor.FromString(raw))


def test_a_hundred_thousand_dimensions_cost_nothing() -> None:
    hostile = message([2**32 - 1] * 100_000, b"1234")
    began = time.process_time()
    with pytest.raises(WireError) as caught:
        deserialize(hostile)
    assert time.process_time() - began < 0.5  # multiplying them all takes 8 s
    assert len(str(caught.value)) < 1000


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=60))
def test_no_bytes_do_more_than_be_refused(data: bytes) -> None:
    try:
        hostile = runtime_pb2.Tensor.FromString(data)
    except Exception:  # noqa: BLE001 - protobuf's own errors; read_message turns them into WireError
        return
    for dtype in ("", "float32", "bfloat16", "int64"):
        hostile.dtype = hostile.dtype or dtype
        try:
            deserialize(hostile)
        except WireError:
            continue


def read(data: bytes, kind: type = runtime_pb2.ExpertResponse) -> object:
    async def scenario() -> object:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        return await read_message(reader, kind, peer=PEER)

    return asyncio.run(scenario())


def test_a_frame_survives_the_trip() -> None:
    request = runtime_pb2.ExpertRequest(uid="tiny.0", tensors=[serialize(torch.ones(2))], metadata=b"m")
    assert read(wire.frame(request), runtime_pb2.ExpertRequest) == request


def test_frames_follow_each_other() -> None:
    async def scenario() -> list[str]:
        reader = asyncio.StreamReader()
        for uid in ("a", "b"):
            reader.feed_data(wire.frame(runtime_pb2.ExpertUID(uid=uid)))
        found = [await read_message(reader, runtime_pb2.ExpertUID, peer=PEER) for _ in range(2)]
        return [part.uid for part in found if part is not None]

    assert asyncio.run(scenario()) == ["a", "b"]


def test_the_end_mark_is_no_message() -> None:
    assert read(wire.end_of_stream()) is None


@pytest.mark.parametrize("cut", [0, 1, 8, 9, 12])
def test_a_truncated_frame_is_the_end_of_the_stream(cut: int) -> None:
    whole = wire.frame(runtime_pb2.ExpertUID(uid="tiny.0"))
    assert cut < len(whole)
    with pytest.raises(asyncio.IncompleteReadError):
        read(whole[:cut])


@pytest.mark.parametrize(
    "data",
    [
        b"\x00" + (wire.MAX_FRAME_BYTES + 1).to_bytes(8, "big"),
        b"\x00" + b"\xff" * 8,
        b"\x01" + b"\xff" * 8,
        b"\x07" + (0).to_bytes(8, "big"),
        b"\x00" + (3).to_bytes(8, "big") + b"\xff\xff\xff",
        b"\x01" + (3).to_bytes(8, "big") + b"\xff\xff\xff",
    ],
)
def test_what_is_no_frame_is_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        read(data)


def test_an_oversized_frame_is_refused_before_it_is_there() -> None:
    async def scenario() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(b"\x00" + (2**40).to_bytes(8, "big"))
        async with asyncio.timeout(5):
            await read_message(reader, runtime_pb2.ExpertUID, peer=PEER)

    with pytest.raises(WireError, match="over the limit"):
        asyncio.run(scenario())


def test_a_full_server_is_known_as_such_at_the_other_end() -> None:
    with pytest.raises(ServerFull, match="3 are free"):
        read(wire.error_frame(ServerFull("3 are free.")))


def test_stock_petals_full_cache_is_known_too() -> None:
    with pytest.raises(ServerFull, match=PEER[-6:]):
        read(wire.error_frame(RuntimeError("Could not allocate 100 bytes")))


@pytest.mark.parametrize("error", [WireError("too long"), ValueError(), RuntimeError("\x00")])
def test_another_error_is_a_refusal_that_names_the_server(error: Exception) -> None:
    with pytest.raises(ServerRefused, match=PEER[-6:]):
        read(wire.error_frame(error))


def test_metadata_survives_the_trip() -> None:
    metadata = {
        "max_length": 7,
        "session_id": "s",
        "args_structure": ((b"__T0",), {}),
        "next_servers": [("p", "s", 0, 1)],
    }
    assert wire.read_metadata(wire.write_metadata(metadata)) == metadata


def test_no_metadata_is_an_empty_map() -> None:
    assert wire.read_metadata(b"") == {}


DESCRIPTOR = 0x51  # hivemind's msgpack extension for tensor descriptors


def extension(code: int, data: bytes) -> bytes:
    return b"\x81\xa1a" + b"\xc7" + bytes([len(data), code]) + data


@pytest.mark.parametrize(
    "data",
    [
        b"\x01",
        b"\xc1",
        b"\x90",
        b"\x81\xa1a",
        b"\x81\xa1\xff\x01",
        b"\x81\x91\x01\x01",
        b"\x91" * 3000 + b"\x90",
        b"\x80\x80",
        extension(DESCRIPTOR, b"\x80"),
        extension(DESCRIPTOR, b"\x90"),
        extension(DESCRIPTOR, MSGPackSerializer.dumps({"dtype": 1})),
        extension(
            DESCRIPTOR, MSGPackSerializer.dumps({"dtype": None, "layout": None, "device_type": "x", "device_index": 0})
        ),
        extension(0x40, b"\xc1"),
        extension(0x40, b"\x01"),
        extension(0xFF, b"\x01"),
    ],
)
def test_hostile_metadata_is_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        wire.read_metadata(data)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=80))
def test_any_metadata_is_a_map_or_refused(data: bytes) -> None:
    try:
        assert isinstance(wire.read_metadata(data), dict)
    except WireError:
        return


def test_a_peer_that_reads_nothing_is_dropped() -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            _, writer = await asyncio.open_unix_connection(sock=ours)
            writer.write(bytes(2**24))
            with pytest.raises(ConnectionResetError, match="read nothing"):
                await drain(writer, timeout_s=0.05)
            assert writer.is_closing()

    asyncio.run(main())
