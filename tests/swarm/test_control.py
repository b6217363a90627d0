"""The control channel: calls both ways, errors by type, silence and hostile bytes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgpack
import pytest
from hivemind.proto import runtime_pb2

from geopetals.errors import Busy, ControlLost, NotAdmitted, SwarmFailure
from geopetals.swarm import control
from geopetals.swarm.control import ControlChannel
from geopetals.swarm.control_frames import MAX_BYTES, write_frame
from geopetals.swarm.wire import frame
from tests.event_loop import in_loop

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[Streams, Streams]]:
    """Both ends of a TCP connection on loopback."""
    accepted: asyncio.Future[Streams] = asyncio.get_running_loop().create_future()
    server = await asyncio.start_server(lambda r, w: accepted.set_result((r, w)), "127.0.0.1", 0)
    async with server:
        here = await asyncio.open_connection(*server.sockets[0].getsockname())
        there = await accepted
        yield here, there
        here[1].close()
        there[1].close()


async def no_call(method: str, body: dict[str, Any]) -> dict[str, Any]:
    raise NotAdmitted(f"{method} is not for you")


def channel(streams: Streams, on_call: control.OnCall = no_call, notes: list[Any] | None = None) -> ControlChannel:
    heard: list[Any] = [] if notes is None else notes
    made = ControlChannel(*streams, "peer", on_call=on_call, on_notify=lambda *note: heard.append(note))
    made.start()
    return made


@in_loop
async def test_both_ends_call_and_answers_find_their_calls() -> None:
    async def slow_first(method: str, body: dict[str, Any]) -> dict[str, Any]:
        await asyncio.sleep(0.05 if body["n"] == 0 else 0)
        return {"double": 2 * body["n"], "method": method}

    async with connected() as (one, two):
        left, right = channel(one, slow_first), channel(two, slow_first)
        answers = await asyncio.gather(*(left.call("go", {"n": n}) for n in range(20)), right.call("back", {"n": 21}))
        assert [answer["double"] for answer in answers] == [*range(0, 40, 2), 42]
        assert answers[-1]["method"] == "back"
        left.close()
        right.close()


@pytest.mark.parametrize("error", [NotAdmitted("the token is expired."), Busy("full.", retry_after_s=2.5)])
@in_loop
async def test_errors_keep_their_type_and_text(error: Exception) -> None:
    async def refuse(method: str, body: dict[str, Any]) -> dict[str, Any]:
        raise error

    async with connected() as (one, two):
        left, right = channel(one), channel(two, refuse)
        with pytest.raises(type(error), match=str(error)) as caught:
            await left.call("open", {})
        assert getattr(caught.value, "retry_after_s", None) == getattr(error, "retry_after_s", None)
        right.close()
        left.close()


@in_loop
async def test_a_bug_is_answered_without_its_text() -> None:
    async def fail(method: str, body: dict[str, Any]) -> dict[str, Any]:
        raise KeyError("a secret")

    async with connected() as (one, two):
        left, right = channel(one), channel(two, fail)
        with pytest.raises(SwarmFailure) as caught:
            await left.call("open", {})
        assert "secret" not in str(caught.value)
        right.close()
        left.close()


@in_loop
async def test_notifications_arrive_in_order() -> None:
    async with connected() as (one, two):
        notes: list[Any] = []
        left, right = channel(one), channel(two, no_call, notes)
        for number in range(5):
            left.notify("queue", {"position": number})
        with pytest.raises(NotAdmitted):
            await left.call("after", {})
        assert notes == [("queue", {"position": number}) for number in range(5)]
        right.close()
        left.close()


@in_loop
async def test_calls_fail_when_the_other_end_goes() -> None:
    async def never(method: str, body: dict[str, Any]) -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    async with connected() as (one, two):
        left, right = channel(one), channel(two, never)
        waiting = asyncio.create_task(left.call("open", {}, timeout_s=30))
        await asyncio.sleep(0)
        right.close()
        with pytest.raises(ControlLost):
            await waiting
        await asyncio.wait_for(left.run(), 10)
        with pytest.raises(ControlLost):
            left.notify("queue", {})


@in_loop
async def test_a_silent_peer_is_lost_and_one_that_pings_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "SILENCE_S", 1.0)
    monkeypatch.setattr(control, "PING_S", 0.1)
    monkeypatch.setattr(control, "_TICK_S", 0.05)
    async with connected() as (one, two), connected() as (three, _):
        left, right, alone = channel(one), channel(two), channel(three)
        await asyncio.wait_for(alone.run(), 20)
        assert not left.closed.is_set()
        assert not right.closed.is_set()
        left.close()
        right.close()


DEEP: Any = {}
for _ in range(40):
    DEEP = {"a": DEEP}


@pytest.mark.parametrize(
    "data",
    [
        b"\x07" + bytes(8),
        b"\x00" + (MAX_BYTES + 5000).to_bytes(8, "big"),
        b"\x00" + (3).to_bytes(8, "big") + b"\xff\xff\xff",
        frame(runtime_pb2.ExpertRequest(uid="call", metadata=b"\xc1")),
        frame(runtime_pb2.ExpertRequest(uid="call", metadata=msgpack.packb([1]))),
        frame(runtime_pb2.ExpertRequest(uid="call", metadata=msgpack.packb(DEEP))),
        frame(runtime_pb2.ExpertRequest(uid="call", metadata=msgpack.packb({"a": msgpack.ExtType(64, b"x")}))),
        write_frame("call", {"id": "x", "method": "m", "body": {}}),
        write_frame("call", {"id": 1, "method": 3, "body": {}}),
        write_frame("notify", {"method": "m", "body": []}),
    ],
)
@in_loop
async def test_hostile_bytes_end_the_channel(data: bytes) -> None:
    async with connected() as (one, two):
        left = channel(one)
        two[1].write(data)
        await asyncio.wait_for(left.run(), 10)


@in_loop
async def test_unknown_kinds_and_strange_answers_are_ignored() -> None:
    async def hello(method: str, body: dict[str, Any]) -> dict[str, Any]:
        return {"ok": True}

    async with connected() as (one, two):
        left, right = channel(one), channel(two, hello)
        right._write("shout", {"x": 1})
        right._write("answer", {"id": 99, "body": {}})
        right._write("answer", {})
        assert await left.call("hello", {}) == {"ok": True}
        left.close()
        right.close()


@in_loop
async def test_too_many_calls_at_a_time_are_told_to_wait() -> None:
    gate = asyncio.Event()

    async def wait(method: str, body: dict[str, Any]) -> dict[str, Any]:
        await gate.wait()
        return {}

    async with connected() as (one, two):
        left, right = channel(one), channel(two, wait)
        calls = [asyncio.create_task(left.call("open", {})) for _ in range(65)]
        with pytest.raises(Busy):
            await calls[-1]
        gate.set()
        await asyncio.gather(*calls[:-1])
        left.close()
        right.close()


@in_loop
async def test_an_answer_that_is_too_large_is_told_as_an_error() -> None:
    async def much(method: str, body: dict[str, Any]) -> dict[str, Any]:
        return {"data": bytes(MAX_BYTES)}

    async with connected() as (one, two):
        left, right = channel(one), channel(two, much)
        with pytest.raises(SwarmFailure, match="over the limit"):
            await left.call("status", {})
        assert not left.closed.is_set()
        left.close()
        right.close()
