"""A coordinator that does as a test says, at the other end of real control channels over TCP on loopback."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from geopetals.client import control_link
from geopetals.client.coordination import Coordination, Measure
from geopetals.coordinator.messages import ChainHop, LinkSample, LinksTaken, Opened, Predicted, Welcome
from geopetals.errors import ControlLost
from geopetals.join_token import CoordinatorAddress
from geopetals.swarm.control import ControlChannel, OnCall, OnNotify

CHAIN = (ChainHop("a", 0, 3), ChainHop("b", 3, 6))
PREDICTED = Predicted(ttft_s=0.2, tpot_s=0.1, end_to_end_s=1.0, wait_s=0.0)
PATIENCE_S = 0.3
Body = dict[str, Any]


def welcome(**changes: Any) -> Body:
    fields: Body = {
        "certificate": b"certificate",
        "trust": b"trust",
        "trust_version": 1,
        "swarm": "llama",
        "model": "llama",
        "identity": {},
        "open": False,
        "heartbeat_s": 2.0,
        "now": 0.0,
        "standby": b"standby",
    }
    return Welcome(**{**fields, **changes}).to_dict()


def admitted(ticket: bytes = b"ticket") -> Body:
    return Opened(status="admitted", ticket=ticket, chain=CHAIN, predicted=PREDICTED).to_dict()


def queued(position: int, start_in_s: float) -> Body:
    return Opened(status="queued", position=position, start_in_s=start_in_s).to_dict()


class FakeCoordinator:
    """`calls` are what was asked; `answers`, by method, what is said: a body, an error, or a function of the body."""

    def __init__(self) -> None:
        self.is_up = True
        self.calls: list[tuple[str, Body]] = []
        self.heard = asyncio.Event()
        self.channel: ControlChannel | None = None
        self.answers: dict[str, Body | Exception | Callable[[Body], Body]] = {
            "hello": welcome(),
            "links": LinksTaken(trust_version=1).to_dict(),
            "open": admitted(),
        }
        self._server: asyncio.Server | None = None
        self._serving: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)

    async def stop(self) -> None:
        self.kill()
        assert self._server is not None
        self._server.close()
        await asyncio.gather(*self._serving, return_exceptions=True)

    def kill(self) -> None:
        self.is_up = False
        if self.channel is not None:
            self.channel.close()

    def asked(self, method: str) -> list[Body]:
        return [body for name, body in self.calls if name == method]

    async def hears(self, method: str, times: int = 1) -> Body:
        """Wait until it was called so; returns the last one's body."""
        async with asyncio.timeout(20):
            while len(self.asked(method)) < times:
                self.heard.clear()
                await self.heard.wait()
        return self.asked(method)[-1]

    def notify(self, method: str, body: Body) -> None:
        assert self.channel is not None
        self.channel.notify(method, body)

    async def dial(self, p2p: Any, peer_id: str, *, on_call: OnCall, on_notify: OnNotify) -> ControlChannel:
        if not self.is_up or self._server is None:
            raise ControlLost("nobody is there.")
        reader, writer = await asyncio.open_connection(*self._server.sockets[0].getsockname())
        channel = ControlChannel(reader, writer, peer_id, on_call=on_call, on_notify=on_notify)
        channel.start()
        return channel

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.channel = ControlChannel(reader, writer, "client", on_call=self._answer, on_notify=lambda *_: None)
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        await self.channel.run()
        writer.close()
        await writer.wait_closed()

    async def _answer(self, method: str, body: Body) -> Body:
        self.calls.append((method, body))
        self.heard.set()
        answer = self.answers.get(method, {})
        if isinstance(answer, Exception):
            raise answer
        return answer(body) if callable(answer) else answer


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - of code that has no event to set for tests
            await asyncio.sleep(0.01)


class _Nowhere:
    """libp2p that finds everybody: FakeCoordinator.dial does the rest."""

    async def connect(self, address: str) -> None:
        return None


class _Member:
    """A membership that trusts everybody."""

    token = SimpleNamespace(
        credential="gp2token",
        coordinator=CoordinatorAddress(peer_id="coordinator", addresses=("/ip4/127.0.0.1/tcp/1/p2p/coordinator",)),
    )
    certificate = trust = b""

    def welcomed(self, certificate: bytes, trust: bytes) -> None:
        self.certificate, self.trust = certificate, trust

    def heard(self, trust: bytes) -> None:
        self.trust = trust


async def _nothing() -> None:
    return None


async def _measure(named: tuple[str, ...]) -> tuple[LinkSample, ...]:
    return tuple(LinkSample(peer_id, 0.05, False) for peer_id in ("a", "b", *named))


@asynccontextmanager
async def coordinated(
    *, queue_timeout_s: float = 20.0, is_up: bool = True, measure: Measure = _measure
) -> AsyncIterator[tuple[Coordination, FakeCoordinator]]:
    """A client's side, and the coordinator that it finds."""
    coordinator = FakeCoordinator()
    coordinator.is_up = is_up
    await coordinator.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(control_link, "dial", coordinator.dial)
        p2p: Any = _Nowhere()
        membership: Any = _Member()
        client = Coordination(
            p2p,
            membership,
            on_connected=_nothing,
            measure=measure,
            patience_s=PATIENCE_S,
            queue_timeout_s=queue_timeout_s,
        )
        try:
            yield client, coordinator
        finally:
            await client.close()
            await coordinator.stop()
