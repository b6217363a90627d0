"""Connections over real sockets: those who ask nothing are closed, those who are answered at the end hear of it."""

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from geopetals.cli.api import bind
from geopetals.gateway import http_server
from geopetals.gateway.app import Gateway
from geopetals.gateway.engine import Engine, Limits
from tests.event_loop import in_loop
from tests.gateway.fakes import Bytes, Model

WAIT_S = 20.0
BUFFER = 4096
LONG = {"model": "m", "prompt": "x", "stream": True, "max_tokens": 2000, "logprobs": 5}


@asynccontextmanager
async def served(model: Model) -> AsyncIterator[tuple[http_server.Server, int]]:
    engine = Engine(model, Bytes(), names=["m"], limits=Limits())  # type: ignore[arg-type]
    sock: socket.socket = bind("127.0.0.1", 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
    server = http_server.Server(Gateway(engine).app(), engine.give_up)
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    try:
        yield server, sock.getsockname()[1]
    finally:
        server.should_exit = True
        await asyncio.wait_for(serving, WAIT_S)
        engine.close()
        await asyncio.to_thread(model.swarm.stop)


def test_whoever_reads_the_address_can_connect() -> None:
    sock: socket.socket = bind("127.0.0.1", 0)
    with sock, socket.create_connection(sock.getsockname(), timeout=5):
        pass


@pytest.mark.parametrize(
    "sent", [b"", b"POST /v1/completions HTTP/1.1\r\nContent-Le", b"GET /version HTTP/1.1\r\nHost: x\r\n\r\nGET"]
)
@in_loop
async def test_half_a_request_is_not_waited_for_for_ever(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server.PatientProtocol, "request_timeout_s", 0.2)
    async with served(Model()) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        await asyncio.wait_for(reader.read(), WAIT_S)  # to its end
        writer.close()


async def ask_for_much(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection that takes little at a time, and a request whose answer is far more."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
    sock.connect(("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=BUFFER)
    body = json.dumps(LONG).encode()
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    return reader, writer


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while True:
            if condition():
                return
            await asyncio.sleep(0.02)


@in_loop
async def test_a_reader_who_stands_still_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server.PatientProtocol, "reader_timeout_s", 0.3)
    model = Model("y" * 2000)
    async with served(model) as (server, port):
        _, writer = await ask_for_much(port)
        await until(lambda: model.called == 1)
        await until(lambda: not server.server_state.connections and not model.open_sessions)
        writer.close()


@in_loop
async def test_a_slow_reader_gets_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server.PatientProtocol, "reader_timeout_s", 5.0)
    async with served(Model("y" * 2000)) as (_, port):
        reader, writer = await ask_for_much(port)
        text, ends = b"", b"data: [DONE]"
        async with asyncio.timeout(60):
            while ends not in text:
                text += await reader.read(BUFFER)
                await asyncio.sleep(0.001)
        assert text.count(b'"text":"y"') == 2000
        writer.close()


@in_loop
async def test_streams_hear_of_the_end_of_the_gateway(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(http_server, "_GRACE_S", 0.1)
    monkeypatch.setattr(http_server.PatientProtocol, "request_timeout_s", 0.2)  # an answer takes as long as it takes
    model = Model(blocks=True)
    body = b'{"model": "m", "prompt": "x", "stream": true}'
    with caplog.at_level(logging.WARNING):
        async with served(model) as (server, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            assert await asyncio.to_thread(model.waits.wait, WAIT_S)
            server.should_exit = True
            answer = await asyncio.wait_for(reader.read(), WAIT_S)
            writer.close()
    assert answer.startswith(b"HTTP/1.1 503")
    assert b"swarm_failure" in answer
    assert not [record for record in caplog.records if record.exc_info or "exceeded" in record.message]
