import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hivemind.proto import runtime_pb2

from geopetals.errors import ServerMoving
from geopetals.swarm.front_desk import FrontDesk
from geopetals.swarm.ring_messages import PUSH_STREAM
from geopetals.swarm.wire import HANDLER, read_message
from tests.swarm.handler_rig import FakeP2P

INFERENCE, FORWARD, INFO = f"{HANDLER}.rpc_inference", f"{HANDLER}.rpc_forward", f"{HANDLER}.rpc_info"
MOVING = ServerMoving("it moves.")


class OnceP2P(FakeP2P):
    """Takes each name once, as p2pd does."""

    async def add_binary_stream_handler(self, name: str, function: Any) -> None:
        assert name not in self.streams
        await super().add_binary_stream_handler(name, function)

    async def add_protobuf_handler(self, name: str, function: Any, kind: Any, **options: Any) -> None:
        assert name not in self.calls
        await super().add_protobuf_handler(name, function, kind, **options)


class Handler:
    """Answers with its name."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def attach(self, desk: FrontDesk) -> None:
        for stream in (INFERENCE, PUSH_STREAM):
            await desk.add_binary_stream_handler(stream, self.serve)
        for call in (FORWARD, INFO):
            await desk.add_protobuf_handler(call, self.answer, runtime_pb2.ExpertRequest)

    async def serve(self, info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(self.name.encode())
        writer.close()

    async def answer(self, request: Any, context: Any) -> str:
        return self.name


@contextlib.asynccontextmanager
async def stream(p2p: FakeP2P, name: str) -> AsyncIterator[asyncio.StreamReader]:
    ours, theirs = socket.socketpair()
    ends = await asyncio.open_unix_connection(sock=theirs)
    reader, writer = await asyncio.open_unix_connection(sock=ours)
    serving = asyncio.create_task(p2p.streams[name](SimpleNamespace(), *ends))
    try:
        yield reader
    finally:
        writer.close()
        await serving


async def hear(p2p: FakeP2P, name: str) -> str:
    async with stream(p2p, name) as reader:
        return (await reader.read(10)).decode()


async def refused(p2p: FakeP2P, name: str) -> None:
    with pytest.raises(ServerMoving, match=r"it moves\."):
        async with stream(p2p, name) as reader:
            await read_message(reader, runtime_pb2.ExpertResponse, peer="")


def play(scenario: Callable[[OnceP2P, FrontDesk], Awaitable[None]]) -> None:
    async def main() -> None:
        p2p = OnceP2P()
        desk = FrontDesk(p2p)  # type: ignore[arg-type]
        async with asyncio.timeout(20):
            await Handler("first").attach(desk)
            await scenario(p2p, desk)

    asyncio.run(main())


def test_whoever_came_last_answers() -> None:
    async def scenario(p2p: OnceP2P, desk: FrontDesk) -> None:
        assert await hear(p2p, INFERENCE) == "first"
        await Handler("second").attach(desk)
        assert await hear(p2p, INFERENCE) == await p2p.calls[FORWARD](None, None) == "second"

    play(scenario)


def test_while_sessions_end_nobody_new_comes_in() -> None:
    async def scenario(p2p: OnceP2P, desk: FrontDesk) -> None:
        desk.refuse(MOVING)
        await refused(p2p, INFERENCE)
        with pytest.raises(ServerMoving):
            await p2p.calls[FORWARD](None, None)
        assert await hear(p2p, PUSH_STREAM) == await p2p.calls[INFO](None, None) == "first"
        desk.admit()
        assert await hear(p2p, INFERENCE) == "first"

    play(scenario)


def test_without_a_handler_everybody_is_told_why() -> None:
    async def scenario(p2p: OnceP2P, desk: FrontDesk) -> None:
        desk.forget(MOVING)
        for name in (INFERENCE, PUSH_STREAM):
            await refused(p2p, name)
        for name in (FORWARD, INFO):
            with pytest.raises(ServerMoving):
                await p2p.calls[name](None, None)
        await Handler("second").attach(desk)
        desk.admit()
        assert await hear(p2p, INFERENCE) == "second"

    play(scenario)
