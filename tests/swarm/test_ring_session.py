"""What a ring session takes, from whom, and how it ends."""

import asyncio
import contextlib
from typing import Any

import pytest
import torch
from hivemind.proto import runtime_pb2
from torch import Tensor

from geopetals.errors import ServerFull, ServerRefused
from geopetals.swarm import wire
from geopetals.swarm.heartbeat import Silence
from geopetals.swarm.ring_messages import KEY, MAX_CHUNK_BYTES, PUSH_STREAM, Opening, Step, Want, hello
from geopetals.swarm.ring_session import RingSession
from geopetals.swarm.stage import Stage
from geopetals.swarm.wire import frame, read_message, serialize
from tests.swarm.handler_rig import DEADLINE_S, HELD, HIDDEN, PEER, TOTAL, Client, Server, first, play, randn

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def open_ring(server: Server) -> Client:
    client = await server.connect(session_id="s")
    opening = Opening(heartbeat_s=0.1, is_last=True, previous=PEER.to_base58()).to_dict()
    client.send(first(client, torch.zeros(1, 0, HIDDEN), **{KEY: opening}))
    await read(client.reader)
    return client


async def open_push(server: Server) -> Streams:
    reader, writer = await server.open(PUSH_STREAM)
    writer.write(frame(runtime_pb2.ExpertRequest(metadata=hello("s"))))
    return reader, writer


async def read(reader: asyncio.StreamReader) -> Any:
    async with asyncio.timeout(DEADLINE_S):
        return await read_message(reader, runtime_pb2.ExpertResponse, peer=PEER.to_base58())


async def read_on(reader: asyncio.StreamReader) -> None:
    """Until an error comes."""
    while True:
        await read(reader)


def step(
    number: int, hidden: Tensor, *more: Tensor, position: int = 0, want: Want = Want.NOTHING
) -> runtime_pb2.ExpertRequest:
    tensors = [serialize(tensor) for tensor in (hidden, *more)]
    metadata = Step(number, position, want).to_bytes()
    return runtime_pb2.ExpertRequest(tensors=tensors, metadata=metadata)


def of_bytes(count: int) -> Tensor:
    return torch.zeros(1, count // (4 * HIDDEN), HIDDEN)


def test_one_stream_at_a_time_pushes_into_a_session(stage: Stage) -> None:
    async def scenario(server: Server) -> None:
        client = await open_ring(server)
        reader, writer = await open_push(server)
        await read(reader)
        late, late_writer = await open_push(server)
        with pytest.raises(ServerRefused, match="open already"):
            await read(late)
        await read(reader)  # a heartbeat: the session goes on
        for end in (late_writer, writer):
            end.close()
        client.vanish()

    play(stage, scenario)


def test_a_push_stream_ends_with_its_session_however_much_waits(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(server: Server) -> None:
        stuck = asyncio.Event()
        monkeypatch.setattr(server.handler._inference._scheduler, "infer", lambda *_: stuck.wait())
        client = await open_ring(server)
        reader, writer = await open_push(server)
        await read(reader)
        for number in range(40):
            writer.write(frame(step(number, randn(1, 1))))
        (session,) = rings(server)
        await server.wait_until(session._steps.full)
        client.vanish()
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await read_on(reader)
        writer.close()
        await asyncio.wait_for(asyncio.gather(*server.tasks), DEADLINE_S)

    play(stage, scenario)


def test_a_client_that_dies_is_noticed_while_its_steps_wait(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(server: Server) -> None:
        stuck = asyncio.Event()
        monkeypatch.setattr(server.handler._inference._scheduler, "infer", lambda *_: stuck.wait())
        client = await open_ring(server)
        for number in range(40):
            client.send(step(number, randn(1, 1)))
        (session,) = rings(server)
        await server.wait_until(session._steps.full)
        client.vanish()
        await server.wait_until(server.is_free)

    play(stage, scenario)


def test_a_client_that_neither_reads_nor_speaks_is_noticed_while_its_steps_wait(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "_CLOSE_GRACE_S", 0.1)

    async def scenario(server: Server) -> None:
        client = await open_ring(server)
        (session,) = rings(server)
        session._writer.write(bytes(2**22))  # unread
        for number in range(40):
            client.send(step(number, randn(1, 1), position=number, want=Want.ALL))
        await server.wait_until(session._steps.full)
        session._client_silence = Silence(0.3)
        await server.wait_until(lambda: server.budget.left == TOTAL)
        await asyncio.wait_for(asyncio.gather(*server.tasks), DEADLINE_S)
        await asyncio.wait_for(client.reader.read(), DEADLINE_S)  # the stream is closed although it was not read
        client.writer.close()

    play(stage, scenario)


def test_a_client_that_dies_in_the_queue_leaves_it_though_it_had_sent_more(stage: Stage) -> None:
    async def scenario(server: Server) -> None:
        first_one = await server.connect()
        await first_one.begin(TOTAL // len(HELD) // 2, batch=2)
        client = await server.connect(session_id="s")
        opening = Opening(heartbeat_s=0.1, is_last=True).to_dict()
        client.send(first(client, torch.zeros(1, 0, HIDDEN), **{KEY: opening, "alloc_timeout": 500.0}))
        client.send(step(0, randn(1, 1)))
        admission = server.handler.admission
        await server.wait_until(lambda: admission.waiting == 1)
        client.vanish()
        await server.wait_until(lambda: admission.waiting == 0)
        await first_one.finish()

    play(stage, scenario)


def test_a_client_that_was_silent_for_too_long_may_come_again(stage: Stage) -> None:
    async def scenario(server: Server) -> None:
        client = await open_ring(server)
        (session,) = rings(server)
        session._client_silence = Silence(0.2)
        with pytest.raises(ServerFull, match="heard of the client"):
            await read_on(client.reader)
        client.writer.close()

    play(stage, scenario)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ([of_bytes(2 * MAX_CHUNK_BYTES + 4 * HIDDEN)], "of hidden states"),
        ([of_bytes(4), of_bytes((len(HELD) + 1) * 2 * MAX_CHUNK_BYTES + 4 * HIDDEN)], "bytes in all"),
        ([of_bytes(4)] * 4, "tensors"),
    ],
    ids=["hidden states", "prompts", "many tensors"],
)
def test_a_step_that_is_too_large_is_refused(stage: Stage, tensors: list[Tensor], words: str) -> None:
    async def scenario(server: Server) -> None:
        client = await open_ring(server)
        client.send(step(0, *tensors))
        with pytest.raises(ServerRefused, match=words):
            await read_on(client.reader)
        client.writer.close()

    play(stage, scenario)


def test_a_piece_may_have_become_wider_on_its_way(stage: Stage) -> None:
    async def scenario(server: Server) -> None:
        client = await open_ring(server)
        client.send(step(0, of_bytes(2 * MAX_CHUNK_BYTES)))
        with pytest.raises(ServerFull, match="tokens"):  # read, and only then too long for this server's cache
            await read_on(client.reader)
        client.writer.close()

    play(stage, scenario)


def rings(server: Server) -> set[RingSession]:
    return server.handler._inference._rings
