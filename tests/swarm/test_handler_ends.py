"""However a session ends, its cache is free."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import pytest
from hivemind.proto import runtime_pb2

from geopetals.errors import ServerRefused
from geopetals.swarm import inbox
from geopetals.swarm.stage import Stage
from geopetals.swarm.wire import (
    end_of_stream,
    frame,
)
from tests.swarm.handler_rig import TOTAL, Client, Server, play, randn


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
    monkeypatch.setattr(inbox, "STEP_TIMEOUT_S", 0.05)

    async def scenario(server: Server) -> None:
        client = await server.connect()
        await client.begin(8)
        assert "idle" in await client.refusal()
        await server.serves_honestly()

    play(stage, scenario)


def test_a_stream_that_never_asks_is_closed(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox, "STEP_TIMEOUT_S", 0.05)

    async def scenario(server: Server) -> None:
        client = await server.connect()
        assert "idle" in await client.refusal()

    play(stage, scenario)


def test_a_client_that_is_done_and_stays_is_closed_without_cache(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(inbox, "_END_OF_STREAM_TIMEOUT_S", 0.2)

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
