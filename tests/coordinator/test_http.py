"""What the coordinator shows over HTTP, and to whom."""

import asyncio
import contextlib
import json
import socket
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from geopetals.cli.status import render
from geopetals.coordinator.admin import jsonable
from geopetals.coordinator.http import HttpServer, make_app
from geopetals.errors import NetworkError
from tests.coordinator.actors import ScriptedClient, ScriptedServer, until
from tests.coordinator.rig import Rig, peer
from tests.event_loop import in_loop


@asynccontextmanager
async def served(rig: Rig, *, token: str | None = None) -> AsyncIterator[str]:
    server = HttpServer(make_app(rig.view, token=token), host="127.0.0.1", port=0)
    try:
        yield await server.start()
    finally:
        await server.stop()


def fetch(address: str, token: str | None = None) -> tuple[int, str]:
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


async def get(address: str, token: str | None = None) -> tuple[int, str]:
    return await asyncio.to_thread(fetch, address, token)


@in_loop
async def test_it_shows_what_runs_and_nothing_secret(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig, served(rig) as url:
        server = await ScriptedServer(rig, 0, name="barn").join()
        server.keep_reporting()
        await until(lambda: rig.engine.core.servers[server.peer_id].serving is not None, "it serves")
        client = await ScriptedClient(rig, 0).join()
        session = client.new_session()
        await client.open(session)
        shown = {page: await get(f"{url}/{page}") for page in ("status", "plan", "history", "sessions", "metrics")}
        assert all(code == 200 for code, _ in shown.values())
        status = json.loads(shown["status"][1])
        assert [each["name"] for each in status["servers"]] == ["barn"]
        assert [each["session_id"] for each in status["sessions"]] == [session.session_id]
        assert peer(0) in json.dumps(json.loads(shown["plan"][1])["cluster"]["servers"])
        assert 'geopetals_servers{state="ready"} 1.0' in shown["metrics"][1]
        assert json.loads(shown["sessions"][1])["items"][0]["session_id"] == session.session_id
        secrets = [key.secret().hex() for key in rig.authority._ledger.keys]
        everything = "".join(text for _, text in shown.values())
        assert "gp2" not in everything
        assert not any(secret in everything for secret in secrets)
        from rich.console import Console

        with (tmp_path / "shown").open("w") as file:
            Console(file=file, width=200).print(render(status))
        assert "barn" in (tmp_path / "shown").read_text()


@in_loop
async def test_a_token_protects_all_but_the_health_check(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig, served(rig, token="right") as url:
        assert (await get(f"{url}/health"))[0] == 200
        assert (await get(f"{url}/status"))[0] == 401
        assert (await get(f"{url}/status", "wrong"))[0] == 401
        assert (await get(f"{url}/status", "right"))[0] == 200


@in_loop
async def test_wrong_questions_are_answered_as_such(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig, served(rig) as url:
        assert (await get(f"{url}/history?limit=x"))[0] == 400
        assert (await get(f"{url}/history?limit=100000"))[0] == 400
        assert (await get(f"{url}/nothing"))[0] == 404


@in_loop
async def test_events_tell_the_status_again_and_again(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig, served(rig) as url:
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /events HTTP/1.1\r\nhost: x\r\n\r\n")
        for _ in range(2):
            await asyncio.wait_for(reader.readuntil(b"event: status\ndata: "), 20)
            told = json.loads(await asyncio.wait_for(reader.readline(), 20))
            assert told["coordinator"]["swarm"] == "swarm"
        writer.close()


@in_loop
async def test_a_port_that_is_taken_is_a_clear_error(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig, served(rig) as url:
        second = HttpServer(make_app(rig.view, token=None), host="127.0.0.1", port=int(url.rpartition(":")[2]))
        with pytest.raises(NetworkError, match="is the port taken"):
            await second.start()


def test_json_knows_no_infinity() -> None:
    assert (
        json.dumps(jsonable({"a": [float("inf"), 1.5, (float("nan"),)]}), allow_nan=False)
        == '{"a": [null, 1.5, [null]]}'
    )


def connect_to(url: str) -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=20)


def read_to_end(connection: socket.socket) -> bytes:
    """Until the other end closes it."""
    found = b""
    with connection, contextlib.suppress(ConnectionResetError):
        while data := connection.recv(65536):
            found += data
    return found


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geopetals.coordinator.http_guard.REQUEST_S", 0.3)
    monkeypatch.setattr("geopetals.coordinator.http_guard.STALLED_S", 0.3)
    monkeypatch.setattr("geopetals.coordinator.http_guard._LOOK_S", 0.05)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("begun", [b"", b"GET /health HTTP/1.1\r\nhost: x\r\nx-slow: "])
@in_loop
async def test_a_request_that_does_not_come_ends_its_connection(tmp_path: Path, begun: bytes) -> None:
    async with Rig(tmp_path) as rig, served(rig) as url:
        connection = connect_to(url)
        connection.sendall(begun)
        assert await asyncio.to_thread(read_to_end, connection) == b""
        again = connect_to(url)
        again.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nG")
        answer = await asyncio.to_thread(read_to_end, again)
        assert answer.startswith(b"HTTP/1.1 200")
        assert (await get(f"{url}/health"))[0] == 200


@pytest.mark.usefixtures("impatient")
@in_loop
async def test_an_answer_that_takes_long_is_no_idle_connection(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig, served(rig) as url:
        connection = connect_to(url)
        connection.sendall(b"GET /events HTTP/1.1\r\nhost: x\r\n\r\n")
        seen = b""
        while seen.count(b"event: status") < 3:
            seen += await asyncio.to_thread(connection.recv, 65536)
        connection.close()


@in_loop
async def test_idle_connections_keep_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geopetals.coordinator.http_guard.MAX_CONNECTIONS", 3)
    async with Rig(tmp_path) as rig, served(rig) as url:
        idle = []
        for _ in range(6):
            idle.append(connect_to(url))
            await asyncio.sleep(0.01)
        assert (await get(f"{url}/health"))[0] == 200
        ended = [await asyncio.to_thread(read_to_end, connection) for connection in idle[:3]]
        assert ended == [b""] * 3
        for connection in idle[3:]:
            connection.close()
