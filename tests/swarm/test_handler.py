import asyncio
import contextlib
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hivemind.p2p import PeerID
from hivemind.proto import runtime_pb2
from hivemind.utils.streaming import combine_from_streaming, split_for_streaming
from hivemind.utils.tensor_descr import BatchTensorDescriptor
from torch import Tensor

from geopetals.errors import GeoPetalsError, ServerFull, ServerRefused
from geopetals.swarm import handler as handler_module
from geopetals.swarm.checkpoint import Checkpoint
from geopetals.swarm.compute import ComputeThread
from geopetals.swarm.handler import BlockHandler
from geopetals.swarm.kv_budget import KVBudget
from geopetals.swarm.stack import DUMMY, DUMMY_INT64, pack_args_kwargs
from geopetals.swarm.stage import Stage, load_stage
from geopetals.swarm.wire import (
    HANDLER,
    WireError,
    deserialize,
    end_of_stream,
    frame,
    read_message,
    read_metadata,
    serialize,
    write_metadata,
)
from tests.models import save_llama

HIDDEN, SWARM, HELD = 64, "tiny", range(2, 5)
TOTAL, LENGTH_LIMIT = 240, 64
DEADLINE_S = 20.0
PEER = PeerID.from_base58("12D3KooWAkxmPQg8FgoTvy7Wi2hWbjBJYuFBQ1q2JX7oxEkXb4jD")
NEXT = "12D3KooWEPHzfSGU63Bgd7ZoSxNsZqagLxM1xeDi2URp4JUeZCuV"
Scenario = Callable[["Server"], Awaitable[None]]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    directory: Path = save_llama(tmp_path_factory.mktemp("handler"))
    checkpoint = Checkpoint.open(str(directory))
    return load_stage(checkpoint, HELD.start, HELD.stop, dtype=torch.float32, device=torch.device("cpu"))


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

    def __init__(self, stage: Stage, compute: ComputeThread) -> None:
        self.stage = stage
        self.budget = KVBudget(TOTAL)
        self.handler = BlockHandler(stage, compute, self.budget, swarm=SWARM, length_limit=LENGTH_LIMIT)
        self.p2p = FakeP2P()
        self.tasks: list[asyncio.Task[None]] = []

    async def connect(self, *, session_id: str | None = None, span: range = HELD) -> "Client":
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_unix_connection(sock=theirs)
        stream = self.p2p.streams[f"{HANDLER}.rpc_inference"]
        self.tasks.append(asyncio.create_task(stream(SimpleNamespace(peer_id=PEER), reader, writer)))
        return Client(*await asyncio.open_unix_connection(sock=ours), session_id=session_id, span=span)

    async def call(self, name: str, request: Any) -> Any:
        return await self.p2p.calls[f"{HANDLER}.{name}"](request, SimpleNamespace(remote_id=PEER))

    async def call_stream(self, name: str, requests: list[Any]) -> list[Any]:
        async def parts() -> AsyncIterator[Any]:
            for request in requests:
                yield request

        answers = self.p2p.calls[f"{HANDLER}.{name}"](parts(), SimpleNamespace(remote_id=PEER))
        return [answer async for answer in answers]

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
        with pytest.raises(ServerRefused) as caught:
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
async def serving(stage: Stage) -> AsyncIterator[Server]:
    compute = ComputeThread(asyncio.get_running_loop())
    server = Server(stage, compute)
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


def play(stage: Stage, scenario: Scenario) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), serving(stage) as server:
            await scenario(server)

    asyncio.run(main())


# A conversation


@pytest.mark.parametrize("reserve_first", [True, False])
def test_a_conversation_gives_what_the_stage_gives(stage: Stage, reserve_first: bool) -> None:
    """Stock clients send the first tokens with the request for cache; ours reserves first."""
    hidden = randn(2, 8)

    async def scenario(server: Server) -> None:
        client = await server.connect(session_id="s")
        more = {} if reserve_first else {"max_length": 8}
        if reserve_first:
            await client.begin(8, batch=2)
        outputs = [await client.step(hidden[:, :5], **more)]
        assert server.budget.used == 3 * 2 * 8
        assert server.handler.num_sessions == 1
        outputs += [await client.step(hidden[:, 5:6]), await client.step(hidden[:, 6:])]
        assert close_to(torch.cat(outputs, dim=1), stage.run(hidden, HELD.start, HELD.stop))
        await client.finish()

    with torch.inference_mode():
        play(stage, scenario)


def test_a_part_of_the_span_is_served_and_paid(stage: Stage) -> None:
    async def scenario(server: Server) -> None:
        client = await server.connect(span=range(3, 4))
        found = await client.step(randn(1, 4), max_length=10)
        assert server.budget.used == 10
        assert close_to(found, stage.run(randn(1, 4), 3, 4))
        await client.finish()

    with torch.inference_mode():
        play(stage, scenario)


def test_rows_are_reordered(stage: Stage) -> None:
    past, new, order = randn(3, 4), randn(3, 1, seed=1), torch.tensor([2, 2, 0])

    async def scenario(server: Server) -> None:
        client = await server.connect()
        await client.step(past, max_length=10)
        found = await client.step(new, hypo_ids=order)
        whole = stage.run(torch.cat([past[order], new], dim=1), HELD.start, HELD.stop)
        assert close_to(found, whole[:, 4:])
        await client.finish()

    with torch.inference_mode():
        play(stage, scenario)


def test_sessions_do_not_disturb_each_other(stage: Stage) -> None:
    async def talk(server: Server, seed: int) -> None:
        hidden = randn(1, 6, seed=seed)
        client = await server.connect(session_id=f"s{seed}")
        outputs = [await client.step(hidden[:, :3], max_length=6)]
        outputs += [await client.step(hidden[:, token : token + 1]) for token in range(3, 6)]
        assert close_to(torch.cat(outputs, dim=1), stage.run(hidden, HELD.start, HELD.stop))
        await client.finish()

    async def scenario(server: Server) -> None:
        async with asyncio.TaskGroup() as group:
            for seed in range(8):
                group.create_task(talk(server, seed))

    with torch.inference_mode():
        play(stage, scenario)


def test_steps_without_ids_are_all_computed(stage: Stage) -> None:
    async def scenario(server: Server) -> None:
        client = await server.connect()
        await client.step(randn(1, 2), max_length=4, step_id=None)
        again = await client.step(randn(1, 2), step_id=None)
        whole = stage.run(torch.cat([randn(1, 2)] * 2, dim=1), HELD.start, HELD.stop)
        assert close_to(again, whole[:, 2:])
        await client.finish()

    with torch.inference_mode():
        play(stage, scenario)


# How a session ends


async def vanish(client: Client) -> None:
    client.vanish()


async def half_a_message(client: Client) -> None:
    client.writer.write(frame(client.request(randn(1, 1)))[:-5])
    await client.writer.drain()
    client.writer.close()


async def only_the_end_mark(client: Client) -> None:
    client.writer.write(end_of_stream())
    client.writer.write_eof()
    await client.closed()


async def an_error_of_the_client(client: Client) -> None:
    client.writer.write(b"\x01" + (4).to_bytes(8, "big") + b"\x0a\x02no")
    with pytest.raises(ServerRefused):
        await client.receive()
    await client.closed()


async def garbage(client: Client) -> None:
    client.writer.write(b"GET / HTTP/1.1\r\n\r\n")
    await client.refusal()


async def a_step_that_is_too_long(client: Client) -> None:
    client.send(client.request(randn(1, 9)))
    assert "8" in await client.refusal()


async def a_step_of_another_batch(client: Client) -> None:
    client.send(client.request(randn(2, 1)))
    assert "batch of 1" in await client.refusal()


async def vanish_while_computing(client: Client) -> None:
    for _ in range(3):
        client.send(client.request(randn(1, 1)))
    await client.writer.drain()
    client.vanish()


@pytest.mark.parametrize(
    "end",
    [
        Client.finish,
        vanish,
        half_a_message,
        only_the_end_mark,
        an_error_of_the_client,
        garbage,
        a_step_that_is_too_long,
        a_step_of_another_batch,
        vanish_while_computing,
    ],
    ids=lambda end: end.__name__,
)
def test_the_cache_is_free_after(stage: Stage, end: Callable[[Client], Awaitable[None]]) -> None:
    async def scenario(server: Server) -> None:
        client = await server.connect(session_id="s")
        await client.step(randn(1, 2), max_length=8)
        assert server.budget.left < TOTAL
        await end(client)
        await server.serves_honestly()
        again = await server.connect(session_id="s")  # the name is free too
        await again.begin(8)
        await again.finish()

    play(stage, scenario)


def test_an_idle_session_is_closed(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handler_module, "STEP_TIMEOUT_S", 0.05)

    async def scenario(server: Server) -> None:
        client = await server.connect()
        await client.begin(8)
        assert "idle" in await client.refusal()
        await server.serves_honestly()

    play(stage, scenario)


def test_a_stream_that_never_asks_is_closed(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handler_module, "STEP_TIMEOUT_S", 0.05)

    async def scenario(server: Server) -> None:
        client = await server.connect()
        assert "idle" in await client.refusal()

    play(stage, scenario)


def test_a_client_that_is_done_and_stays_is_closed_without_cache(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(handler_module, "_END_OF_STREAM_TIMEOUT_S", 0.2)

    async def scenario(server: Server) -> None:
        client = await server.connect()
        await client.begin(8)
        client.send(runtime_pb2.ExpertRequest())
        await server.wait_until(lambda: server.budget.left == TOTAL)
        assert not server.is_free()
        await server.wait_until(server.is_free)
        client.writer.close()

    play(stage, scenario)
    assert "Traceback" not in caplog.text


def test_shutting_down_ends_all_sessions(stage: Stage) -> None:
    async def scenario(server: Server) -> None:
        clients = [await server.connect() for _ in range(3)]
        for client in clients:
            await client.begin(8)
        await server.handler.close()
        assert server.is_free()
        for client in clients:
            client.writer.close()
        for task in server.tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        server.tasks.clear()

    play(stage, scenario)


# What is refused


def first(client: Client, hidden: Tensor | None = None, **metadata: Any) -> runtime_pb2.ExpertRequest:
    return client.request(randn(1, 2) if hidden is None else hidden, **{"max_length": 8, **metadata})


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no length": ({"max_length": None}, "max_length"),
    "no tokens": ({"max_length": 0}, "max_length"),
    "a negative length": ({"max_length": -1}, "max_length"),
    "too long a session": ({"max_length": LENGTH_LIMIT + 1}, str(LENGTH_LIMIT)),
    "a length of text": ({"max_length": "8"}, "max_length"),
    "a session id of a wrong kind": ({"session_id": 7}, "session_id"),
    "a negative wait": ({"alloc_timeout": -1}, "alloc_timeout"),
    "an endless wait": ({"alloc_timeout": float("inf")}, "alloc_timeout"),
    "a wait of text": ({"alloc_timeout": "1"}, "alloc_timeout"),
    "no time at all": ({"alloc_timeout": float("nan")}, "alloc_timeout"),
    "a structure of something else": ({"args_structure": {"a": 1}}, "args_structure|arguments"),
}


@pytest.mark.parametrize(("metadata", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_a_wrong_wish_is_refused(stage: Stage, metadata: dict[str, Any], words: str) -> None:
    async def scenario(server: Server) -> None:
        client = await server.connect()
        client.send(first(client, **metadata))
        text = await client.refusal()
        assert any(word in text for word in words.split("|"))
        await server.serves_honestly()

    play(stage, scenario)


@pytest.mark.parametrize(
    ("uid", "words"),
    [
        ("", "tiny"),
        ("other.2", "tiny"),
        ("tiny", "tiny"),
        ("tiny.", "tiny"),
        ("tiny.x", "tiny"),
        ("tiny.-1", "tiny"),
        ("tiny.2.0", "tiny"),
        ("tiny.2  tiny.3", "tiny"),
        ("tiny.99999999999999999999", "tiny"),
        ("tiny.1 tiny.2", "2:5"),
        ("tiny.4 tiny.5", "2:5"),
        ("tiny.2 tiny.4", "consecutive"),
        ("tiny.4 tiny.3", "consecutive"),
        ("tiny.2 tiny.2", "consecutive"),
        ("tiny.0", "2:5"),
        ("x" * 100_000, "tiny"),
    ],
    ids=lambda value: value[:30] or "empty",
)
def test_blocks_that_are_not_served_are_refused(stage: Stage, uid: str, words: str) -> None:
    async def scenario(server: Server) -> None:
        client = await server.connect()
        client.uid = uid
        client.send(first(client))
        text = await client.refusal()
        assert words in text
        assert len(text) < 500
        await server.serves_honestly()

    play(stage, scenario)


@pytest.mark.parametrize("hidden", [torch.zeros(2, 2), torch.zeros(1, 2, HIDDEN + 1), torch.zeros(0, 1, HIDDEN)])
def test_hidden_states_of_a_wrong_shape_are_refused(stage: Stage, hidden: Tensor) -> None:
    async def scenario(server: Server) -> None:
        client = await server.connect()
        client.send(first(client, hidden))
        await client.refusal()
        await server.serves_honestly()

    play(stage, scenario)


def test_a_session_id_in_use_is_refused_and_its_owner_goes_on(stage: Stage) -> None:
    async def scenario(server: Server) -> None:
        owner, thief = await server.connect(session_id="s"), await server.connect(session_id="s")
        await owner.begin(8)
        thief.send(first(thief))
        assert "in use" in await thief.refusal()
        await owner.step(randn(1, 2))
        await owner.finish()

    play(stage, scenario)


def test_two_who_wait_cannot_both_get_the_same_session_id(stage: Stage) -> None:
    async def scenario(server: Server) -> None:
        holder = await server.connect()
        await holder.begin(TOTAL // 3 // 2, batch=2)
        twins = [await server.connect(session_id="s") for _ in range(2)]
        for twin in twins:
            twin.send(first(twin, alloc_timeout=30))
        await server.wait_until(lambda: server.handler.num_sessions == 3)
        await asyncio.sleep(0.05)
        await holder.finish()
        outcomes = await asyncio.gather(*(twin.receive() for twin in twins), return_exceptions=True)
        for twin in twins:
            twin.vanish()
        assert sorted(isinstance(outcome, Tensor) for outcome in outcomes) == [False, True]

    play(stage, scenario)


# When the cache is full


def test_a_full_server_says_so_at_once(stage: Stage) -> None:
    async def scenario(server: Server) -> None:
        holder, late = await server.connect(), await server.connect()
        await holder.begin(TOTAL // 3 // 2, batch=2)
        late.send(first(late))
        with pytest.raises(ServerFull, match="0 are free"):
            await late.receive()
        await late.closed()
        await holder.finish()
        await server.serves_honestly()

    play(stage, scenario)


def test_a_session_that_can_never_fit_does_not_wait(stage: Stage) -> None:
    async def scenario(server: Server) -> None:
        client = await server.connect()
        client.send(first(client, randn(2, 1), max_length=LENGTH_LIMIT, alloc_timeout=600))
        with pytest.raises(ServerFull, match=f"this server has {TOTAL}"):
            await client.receive()
        await client.closed()

    play(stage, scenario)


def test_who_waits_gets_the_cache_that_comes_free(stage: Stage) -> None:
    async def scenario(server: Server) -> None:
        holder, late = await server.connect(), await server.connect()
        await holder.begin(TOTAL // 3 // 2, batch=2)
        late.send(first(late, alloc_timeout=30))
        await server.wait_until(lambda: server.handler.num_sessions == 2)
        await holder.finish()
        assert (await late.receive()).shape == (1, 2, HIDDEN)
        await late.finish()

    play(stage, scenario)


def test_who_waits_too_long_is_told_that_the_server_is_full(stage: Stage) -> None:
    async def scenario(server: Server) -> None:
        holder, late = await server.connect(), await server.connect()
        await holder.begin(TOTAL // 3 // 2, batch=2)
        late.send(first(late, alloc_timeout=0.05))
        with pytest.raises(ServerFull):
            await late.receive()
        await late.closed()
        await holder.finish()

    play(stage, scenario)


def test_a_waiting_client_that_vanishes_does_not_hold_up_others(stage: Stage) -> None:
    async def scenario(server: Server) -> None:
        holder, gone = await server.connect(), await server.connect()
        await holder.begin(TOTAL // 3 // 2 - 5, batch=2)
        gone.send(first(gone, max_length=LENGTH_LIMIT, alloc_timeout=600))
        await server.wait_until(lambda: server.handler.num_sessions == 2)
        await asyncio.sleep(0.05)
        gone.vanish()
        late = await server.connect()
        late.send(first(late, alloc_timeout=2))
        with contextlib.suppress(ServerFull):
            assert (await late.receive()).shape == (1, 2, HIDDEN)
            await late.finish()
            await holder.finish()
            return
        holder.vanish()
        pytest.fail("a client that was gone kept its place in the queue")

    play(stage, scenario)


def test_a_device_without_memory_is_a_full_server(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(server: Server) -> None:
        client = await server.connect()
        await client.begin(8)
        monkeypatch.setattr(stage, "run", out_of_memory)
        client.send(client.request(randn(1, 2)))
        with pytest.raises(ServerFull):
            await client.receive()
        await client.closed()
        monkeypatch.undo()
        await server.serves_honestly()

    def out_of_memory(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    play(stage, scenario)


def test_a_fault_of_the_server_is_told_without_details(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(server: Server) -> None:
        client = await server.connect()
        await client.begin(8)
        monkeypatch.setattr(stage, "run", fail)
        client.send(client.request(randn(1, 2)))
        text = await client.refusal()
        assert "internal error: RuntimeError" in text
        assert "secret" not in text
        monkeypatch.undo()
        await server.serves_honestly()

    def fail(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("secret path")

    play(stage, scenario)


# Push


def pushed(request: runtime_pb2.ExpertRequest) -> runtime_pb2.ExpertRequest:
    """The same step as the previous server sends it."""
    copy = runtime_pb2.ExpertRequest.FromString(request.SerializeToString())
    copy.metadata = write_metadata({**read_metadata(request.metadata), "pushed": True})
    return copy


@pytest.mark.parametrize("order", ["push first", "push last", "both at once", "push twice", "push alone"])
def test_a_step_is_answered_once_however_it_comes(stage: Stage, order: str) -> None:
    hidden = randn(1, 5)

    async def scenario(server: Server) -> None:
        client = await server.connect(session_id="s")
        await client.begin(8)
        request = client.request(hidden[:, :3])
        push = pushed(request)
        if order in ("push first", "push twice", "push alone"):
            await server.call("rpc_push", push)
        if order == "push twice":
            await server.call("rpc_push", push)
        if order == "both at once":
            client.send(request)
            await asyncio.gather(server.call("rpc_push", push), client.writer.drain())
        elif order != "push alone":
            client.send(request)
        found = await client.receive()
        if order == "push last":
            await server.call("rpc_push", push)
        rest = await client.step(hidden[:, 3:])
        whole = stage.run(hidden, HELD.start, HELD.stop)
        assert close_to(torch.cat([found, rest], dim=1), whole)
        await client.finish()

    with torch.inference_mode():
        play(stage, scenario)


@pytest.mark.parametrize("metadata", [{"session_id": "nobody"}, {}, {"session_id": None}, {"session_id": [1]}])
def test_a_push_to_nobody_is_ignored(stage: Stage, metadata: dict[str, Any]) -> None:
    async def scenario(server: Server) -> None:
        answer = await server.call("rpc_push", runtime_pb2.ExpertRequest(metadata=write_metadata(metadata)))
        assert answer == runtime_pb2.ExpertResponse()

    play(stage, scenario)


def test_a_wrong_push_hurts_its_sender_only(stage: Stage) -> None:
    async def scenario(server: Server) -> None:
        client = await server.connect(session_id="s")
        await client.begin(8)
        for wrong in (client.request(randn(2, 1)), client.request(randn(1, 100))):
            with pytest.raises((WireError, GeoPetalsError)):
                await server.call("rpc_push", pushed(wrong))
        found = await client.step(randn(1, 3))
        assert close_to(found, stage.run(randn(1, 3), HELD.start, HELD.stop))
        await client.finish()

    with torch.inference_mode():
        play(stage, scenario)


def test_outputs_go_to_the_next_server_under_the_name_the_client_gave(stage: Stage) -> None:
    async def scenario(server: Server) -> None:
        client = await server.connect(session_id="s")
        await client.begin(8)
        chain = [(NEXT, "session there", 5, 8), (PEER.to_base58(), "session after", 8, 9)]
        order = torch.tensor([0])
        found = await client.step(randn(1, 3), next_servers=chain, step_id="seven", hypo_ids=order)
        await server.wait_until(lambda: len(server.p2p.pushed) == 1)
        ((peer_id, name, request),) = server.p2p.pushed
        assert (peer_id, name, request.uid) == (NEXT, f"{HANDLER}.rpc_push", "tiny.5 tiny.6 tiny.7")
        metadata = read_metadata(request.metadata)
        assert metadata["session_id"] == "session there"
        assert metadata["step_id"] == "seven"
        assert metadata["pushed"] is True
        assert [list(hop) for hop in metadata["next_servers"]] == [list(chain[1])]
        assert torch.equal(deserialize(request.tensors[0]), found)
        assert torch.equal(deserialize(request.tensors[2]), order)
        await client.step(randn(1, 1))
        await client.finish()
        assert len(server.p2p.pushed) == 1

    play(stage, scenario)


def test_a_push_that_fails_costs_nothing(stage: Stage) -> None:
    async def scenario(server: Server) -> None:
        server.p2p.push_error = ConnectionError("gone")
        client = await server.connect(session_id="s")
        await client.begin(8)
        for _ in range(2):
            await client.step(randn(1, 1), next_servers=[(NEXT, "there", 5, 8)])
        await client.step(randn(1, 1), next_servers=[("no peer id", "there", 5, 8)])
        await server.wait_until(lambda: len(server.p2p.pushed) == 2)
        await client.finish()

    play(stage, scenario)


@pytest.mark.parametrize(
    "chain",
    [
        5,
        "text",
        {"a": 1},
        {0: [NEXT, "s", 0, 1]},
        [1],
        ["abcd"],
        [[NEXT]],
        [[NEXT, "s", "a", "b"]],
        [[NEXT, "s", None, 1]],
        [[NEXT, "s", float("inf"), 1]],
        [[NEXT, "s", float("nan"), 1]],
    ],
    ids=repr,
)
def test_a_wrong_chain_is_refused(stage: Stage, chain: object, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(server: Server) -> None:
        client = await server.connect()
        await client.begin(8)
        client.send(client.request(randn(1, 1), next_servers=chain))
        text = await client.refusal()
        assert "internal error" not in text
        await server.serves_honestly()

    play(stage, scenario)
    assert "Traceback" not in caplog.text


def test_an_endless_chain_is_not_spelt_out(stage: Stage) -> None:
    async def scenario(server: Server) -> None:
        client = await server.connect()
        await client.begin(8)
        await client.step(randn(1, 1), next_servers=[(NEXT, "s", 0, 10**9)])
        await server.wait_until(lambda: len(server.p2p.pushed) == 1)
        assert len(server.p2p.pushed[0][2].uid) < 100_000
        await client.finish()

    play(stage, scenario)


# Forward, backward, info


def packed(*arguments: Tensor, uid: str = uids(HELD)) -> runtime_pb2.ExpertRequest:
    tensors, structure = pack_args_kwargs(*arguments)
    return runtime_pb2.ExpertRequest(
        uid=uid,
        tensors=[serialize(tensor) for tensor in tensors],
        metadata=write_metadata({"args_structure": structure}),
    )


def in_parts(request: runtime_pb2.ExpertRequest, size: int = 500) -> list[runtime_pb2.ExpertRequest]:
    return [
        runtime_pb2.ExpertRequest(uid=request.uid, metadata=request.metadata, tensors=[part])
        for tensor in request.tensors
        for part in split_for_streaming(tensor, size)
    ]


def joined(answers: list[runtime_pb2.ExpertResponse]) -> list[Tensor]:
    tensors: list[list[runtime_pb2.Tensor]] = []
    for answer in answers:
        for part in answer.tensors:
            if part.dtype:
                tensors.append([])
            tensors[-1].append(part)
    return [deserialize(combine_from_streaming(parts)) for parts in tensors]


async def ask(server: Server, name: str, request: runtime_pb2.ExpertRequest, *, stream: bool) -> list[Tensor]:
    if stream:
        return joined(await server.call_stream(f"{name}_stream", in_parts(request)))
    answer = await server.call(name, request)
    return [deserialize(tensor) for tensor in answer.tensors]


@pytest.mark.parametrize("stream", [False, True])
def test_forward_and_backward_are_those_of_the_stage(stage: Stage, stream: bool) -> None:
    hidden, gradient = randn(2, 7), randn(2, 7, seed=1)
    prompts = torch.randn(3, 2, 4, HIDDEN, generator=torch.Generator().manual_seed(2))
    leaf = hidden.clone().requires_grad_()
    expected = stage.run(leaf, HELD.start, HELD.stop)
    expected.backward(gradient)

    async def scenario(server: Server) -> None:
        (output,) = await ask(server, "rpc_forward", packed(hidden, DUMMY), stream=stream)
        assert close_to(output, expected.detach())
        (grad,) = await ask(server, "rpc_backward", packed(hidden, gradient, DUMMY), stream=stream)
        assert leaf.grad is not None
        assert close_to(grad, leaf.grad)
        both = await ask(server, "rpc_backward", packed(hidden, gradient, prompts), stream=stream)
        assert [tensor.shape for tensor in both] == [hidden.shape, prompts.shape]

    play(stage, scenario)


WRONG_REQUESTS = {
    "nothing": runtime_pb2.ExpertRequest(),
    "no tensors": runtime_pb2.ExpertRequest(uid=uids(HELD)),
    "another swarm": packed(randn(1, 2), randn(1, 2), uid="other.2"),
    "another block": packed(randn(1, 2), randn(1, 2), uid=uids(range(6))),
    "another hidden size": packed(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)),
    "a structure without tensors": runtime_pb2.ExpertRequest(
        uid=uids(HELD), metadata=write_metadata({"args_structure": [["x"], {}]})
    ),
    "no metadata but noise": runtime_pb2.ExpertRequest(uid=uids(HELD), metadata=b"\xc1"),
    "a list for metadata": runtime_pb2.ExpertRequest(uid=uids(HELD), metadata=b"\x90"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["rpc_forward", "rpc_backward"])
@pytest.mark.parametrize("request_", WRONG_REQUESTS.values(), ids=WRONG_REQUESTS.keys())
def test_wrong_calls_are_refused(stage: Stage, name: str, request_: runtime_pb2.ExpertRequest, stream: bool) -> None:
    async def scenario(server: Server) -> None:
        with pytest.raises((WireError, GeoPetalsError)):
            await ask(server, name, request_, stream=stream)

    play(stage, scenario)


def test_parts_for_different_blocks_are_refused(stage: Stage) -> None:
    async def scenario(server: Server) -> None:
        parts = in_parts(packed(randn(1, 7), DUMMY))
        parts[1].uid = uids(range(3, 4))
        with pytest.raises(WireError, match="differ"):
            await server.call_stream("rpc_forward_stream", parts)

    play(stage, scenario)


def test_a_stream_over_the_limit_is_refused(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handler_module, "MAX_FRAME_BYTES", 1000)

    async def scenario(server: Server) -> None:
        with pytest.raises(WireError, match="over the limit"):
            await server.call_stream("rpc_forward_stream", in_parts(packed(randn(1, 7), DUMMY)))

    play(stage, scenario)


def test_the_description_is_what_petals_clients_read(stage: Stage) -> None:
    async def scenario(server: Server) -> None:
        answer = await server.call("rpc_info", runtime_pb2.ExpertUID(uid=uids(HELD)))
        info = read_metadata(answer.serialized_info)
        inputs, keywords = info["inference_schema"]
        assert len(inputs) == 3
        assert keywords == {}
        assert all(isinstance(part, BatchTensorDescriptor) for part in inputs)
        assert inputs[0].dtype == torch.float32
        assert len(info["forward_schema"][0]) == 1
        assert len(info["outputs_schema"]) == 1
        assert not info["keyword_names"]
        assert info["cache_tokens_available"] == TOTAL
        assert info["version"].startswith("2.2.0")
        bare = read_metadata((await server.call("rpc_info", runtime_pb2.ExpertUID())).serialized_info)
        assert bare["dht_client_mode"] is False
        with pytest.raises(WireError):
            await server.call("rpc_info", runtime_pb2.ExpertUID(uid="other.1"))

    play(stage, scenario)


# Noise


def noise(random_: random.Random, client: Client) -> Iterator[bytes]:
    """Messages of growing plausibility."""
    yield random_.randbytes(random_.randrange(1, 60))
    yield bytes([random_.randrange(2)]) + random_.randrange(40).to_bytes(8, "big") + random_.randbytes(40)
    request = first(client, randn(1, 2))
    good = bytearray(frame(request))
    for _ in range(random_.randrange(1, 6)):
        good[random_.randrange(9, len(good))] = random_.randrange(256)
    yield bytes(good)
    request.metadata = random_.randbytes(random_.randrange(30))
    yield frame(request)
    values = [None, True, -1, 2**40, 1.5, "", "text", b"\xff", [], {}, [1, [2]], {"a": {}}, float("nan")]
    keys = ["max_length", "session_id", "step_id", "args_structure", "alloc_timeout", "next_servers"]
    chosen = {key: random_.choice(values) for key in random_.sample(keys, random_.randrange(1, 4))}
    yield frame(first(client, randn(1, 2), **chosen))
    mixed = first(client, randn(1, 2))
    for tensor in mixed.tensors:
        if random_.random() < 0.5:
            tensor.size[:] = [random_.choice([0, 1, 2, HIDDEN, 2**32 - 1]) for _ in range(random_.randrange(5))]
        if random_.random() < 0.3:
            tensor.dtype = random_.choice(["object", "int64", "bfloat16", "", "float16"])
    yield frame(mixed)


@pytest.mark.parametrize("seed", range(25))
def test_no_noise_breaks_the_server(stage: Stage, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(server: Server) -> None:
        random_ = random.Random(seed)
        for opened in (False, True):
            for number in range(6):
                client = await server.connect(session_id=f"{opened} {number}")
                if opened:
                    await client.begin(8)
                client.writer.write(list(noise(random_, client))[number])
                client.writer.write_eof()
                async with asyncio.timeout(DEADLINE_S):
                    await client.reader.read()
                client.writer.close()
        await server.serves_honestly()

    play(stage, scenario)
    assert "Traceback" not in caplog.text
