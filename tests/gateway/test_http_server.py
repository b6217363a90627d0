"""Connections over real sockets: those who ask nothing are closed, those who are answered at the end hear of it."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from geopetals.cli.api import bind
from geopetals.gateway import http_server
from geopetals.gateway.app import Gateway
from geopetals.gateway.engine import Engine, Limits
from tests.event_loop import in_loop
from tests.gateway.fakes import Bytes, Model

WAIT_S = 20.0


@asynccontextmanager
async def served(model: Model) -> AsyncIterator[tuple[http_server.Server, int]]:
    engine = Engine(model, Bytes(), names=["m"], limits=Limits())  # type: ignore[arg-type]
    sock: socket.socket = bind("127.0.0.1", 0)
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
