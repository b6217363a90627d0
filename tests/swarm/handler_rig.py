"""A handler with a real stage, spoken to over socket pairs by a client that speaks as PETALS does."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hivemind.p2p import PeerID
from hivemind.proto import runtime_pb2
from torch import Tensor

from geopetals.errors import ServerMoving, ServerRefused
from geopetals.swarm.compute import ComputeThread
from geopetals.swarm.gate import Gate
from geopetals.swarm.handler import BlockHandler
from geopetals.swarm.kv_budget import KVBudget
from geopetals.swarm.stack import DUMMY, DUMMY_INT64, pack_args_kwargs
from geopetals.swarm.stage import Stage
from geopetals.swarm.wire import (
    HANDLER,
    deserialize,
    end_of_stream,
    frame,
    read_message,
    serialize,
    write_metadata,
)

HIDDEN, SWARM, HELD = 64, "tiny", range(2, 5)
TOTAL, LENGTH_LIMIT = 240, 64
DEADLINE_S = 20.0
PEER = PeerID.from_base58("12D3KooWAkxmPQg8FgoTvy7Wi2hWbjBJYuFBQ1q2JX7oxEkXb4jD")
NEXT = "12D3KooWEPHzfSGU63Bgd7ZoSxNsZqagLxM1xeDi2URp4JUeZCuV"
Scenario = Callable[["Server"], Awaitable[None]]


class FakeP2P:
    """Keeps what is registered and records what is pushed."""

    def __init__(self) -> None:
        self.streams: dict[str, Any] = {}
        self.calls: dict[str, Any] = {}
        self.pushed: list[tuple[str, str, runtime_pb2.ExpertRequest]] = []
        self.push_error: Exception | None = None

    async def add_binary_stream_handler(self, name: str, function: Any) -> None:
        self.streams[name] = function

    async def add_protobuf_handler(self, name: str, function: Any, kind: Any, **_: Any) -> None:
        self.calls[name] = function

    async def call_protobuf_handler(self, peer_id: PeerID, name: str, request: Any, kind: Any) -> Any:
        self.pushed.append((peer_id.to_base58(), name, request))
        if self.push_error is not None:
            raise self.push_error
        return kind()


class Server:
    """A handler with a real stage, spoken to over socket pairs."""

    def __init__(self, stage: Stage, compute: ComputeThread, gate: Gate | None = None) -> None:
        self.stage = stage
        self.budget = KVBudget(TOTAL)
        self.handler = BlockHandler(stage, compute, self.budget, swarm=SWARM, length_limit=LENGTH_LIMIT, gate=gate)
        self.p2p = FakeP2P()
        self.tasks: list[asyncio.Task[None]] = []

    async def connect(self, *, session_id: str | None = None, span: range = HELD) -> "Client":
        return Client(*await self.open(f"{HANDLER}.rpc_inference"), session_id=session_id, span=span)

    async def call(self, name: str, request: Any) -> Any:
        return await self.p2p.calls[f"{HANDLER}.{name}"](request, SimpleNamespace(remote_id=PEER))

    async def open(self, name: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        ours, theirs = socket.socketpair()
        stream = self.p2p.streams[name]
        ends = await asyncio.open_unix_connection(sock=theirs)
        self.tasks.append(asyncio.create_task(stream(SimpleNamespace(peer_id=PEER), *ends)))
        return await asyncio.open_unix_connection(sock=ours)

    async def call_stream(self, name: str, requests: list[Any]) -> list[Any]:
        reader, writer = await self.open(f"{HANDLER}.{name}")
        answers = []
        async with asyncio.timeout(DEADLINE_S):
            with contextlib.closing(writer), contextlib.suppress(asyncio.IncompleteReadError):
                writer.write(b"".join(map(frame, requests)) + end_of_stream())
                while True:
                    answers.append(await read_message(reader, runtime_pb2.ExpertResponse, peer=PEER.to_base58()))
        return answers

    def is_free(self) -> bool:
        return self.budget.left == TOTAL and self.handler.num_sessions == 0

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():  # noqa: ASYNC110 - nobody announces what is waited for
                await asyncio.sleep(0.002)

    async def serves_honestly(self) -> None:
        """All cache is free, and a session through all of it works."""
        await self.wait_until(self.is_free)
        client = await self.connect()
        await client.begin(TOTAL // len(HELD) // 2, batch=2)
        assert self.budget.left == 0
        await client.step(randn(2, 3))
        await client.finish()
        await self.wait_until(self.is_free)


class Client:
    """Speaks as PETALS' client does."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, session_id: str | None, span: range
    ) -> None:
        self.reader, self.writer = reader, writer
        self.session_id, self.uid = session_id, uids(span)
        self._steps = 0

    def request(self, hidden: Tensor, *, hypo_ids: Tensor = DUMMY_INT64, **metadata: Any) -> runtime_pb2.ExpertRequest:
        self._steps += 1
        tensors, structure = pack_args_kwargs(hidden, DUMMY, hypo_ids)
        named = {} if self.session_id is None else {"session_id": self.session_id}
        more = {**named, "step_id": f"step {self._steps}", "args_structure": structure, **metadata}
        return runtime_pb2.ExpertRequest(
            uid=self.uid, tensors=[serialize(tensor) for tensor in tensors], metadata=write_metadata(more)
        )

    def send(self, request: runtime_pb2.ExpertRequest) -> None:
        self.writer.write(frame(request))

    async def receive(self) -> Tensor:
        async with asyncio.timeout(DEADLINE_S):
            response = await read_message(self.reader, runtime_pb2.ExpertResponse, peer=PEER.to_base58())
        assert response is not None
        return deserialize(response.tensors[0])

    async def step(self, hidden: Tensor, **options: Any) -> Tensor:
        self.send(self.request(hidden, **options))
        return await self.receive()

    async def begin(self, max_length: int, *, batch: int = 1, **metadata: Any) -> None:
        """Only reserve the cache."""
        assert (await self.step(torch.zeros(batch, 0, HIDDEN), max_length=max_length, **metadata)).shape[1] == 0

    async def refusal(self) -> str:
        with pytest.raises((ServerRefused, ServerMoving)) as caught:
            await self.receive()
        await self.closed()
        return str(caught.value)

    async def closed(self) -> None:
        """The server has ended the stream, and said nothing more."""
        async with asyncio.timeout(DEADLINE_S):
            assert await self.reader.read() == b""
        self.writer.close()

    async def finish(self) -> None:
        """PETALS' end: a message without tensors, then hivemind's mark; the server closes afterwards."""
        self.writer.write(frame(runtime_pb2.ExpertRequest()))
        await self.writer.drain()
        await asyncio.sleep(0.01)
        assert not self.reader.at_eof()
        self.writer.write(end_of_stream())
        self.writer.write_eof()
        await self.closed()

    def vanish(self) -> None:
        self.writer.transport.abort()


def uids(span: range, swarm: str = SWARM) -> str:
    return " ".join(f"{swarm}.{block}" for block in span)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(seed))


def close_to(ours: Tensor, reference: Tensor) -> bool:
    scale = float(reference.abs().max())
    return ours.shape == reference.shape and float((ours - reference).abs().max()) <= 1e-5 * scale


@contextlib.asynccontextmanager
async def serving(stage: Stage, gate: Gate | None = None) -> AsyncIterator[Server]:
    compute = ComputeThread(asyncio.get_running_loop())
    server = Server(stage, compute, gate)
    await server.handler.attach(server.p2p)  # type: ignore[arg-type]
    try:
        yield server
        await server.wait_until(server.is_free)
        for task in server.tasks:
            await task  # whatever a client does, its task ends without an exception
    finally:
        await server.handler.close()
        compute.stop()
        assert await asyncio.to_thread(compute.join, DEADLINE_S)


def play(stage: Stage, scenario: Scenario, *, gate: Callable[[], Gate] | None = None) -> None:
    """`gate` makes one on the event loop; everybody is let in if it is None."""

    async def main() -> None:
        async with asyncio.timeout(60), serving(stage, gate() if gate is not None else None) as server:
            await scenario(server)

    asyncio.run(main())


def first(client: Client, hidden: Tensor | None = None, **metadata: Any) -> runtime_pb2.ExpertRequest:
    return client.request(randn(1, 2) if hidden is None else hidden, **{"max_length": 8, **metadata})
