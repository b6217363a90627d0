"""Servers and clients as scripts: they do what members do, without blocks or a network."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable
from typing import Any

from geopetals.coordinator import messages as m
from geopetals.credentials.certificate import Role
from geopetals.errors import ControlLost
from geopetals.swarm.control import ControlChannel
from tests.coordinator.rig import FACTS, Rig, peer, register

DEADLINE_S = 30.0


async def until(test: Callable[[], bool], what: str) -> None:
    """Wait for a condition, half a minute at most."""
    end = time.monotonic() + DEADLINE_S
    while not test():
        assert time.monotonic() < end, f"waited in vain: {what}"
        await asyncio.sleep(0.02)


class ScriptedServer:
    """Loads what it is assigned in no time. `assignments` are all that it was told."""

    def __init__(self, rig: Rig, number: int, **profile: Any) -> None:
        self._rig, self.peer_id = rig, peer(number)
        self._profile = profile
        self.epoch = 0
        self.span: m.Span | None = profile.get("held")
        self.assignments: list[m.Assign] = []
        self.total = 20_000
        self.sessions: tuple[m.SessionUse, ...] = ()
        self.channel: ControlChannel | None = None
        self._reporting: asyncio.Task[None] | None = None

    async def join(self, token: str | None = None) -> "ScriptedServer":
        self.channel = await self._rig.connect(self.peer_id, on_call=self._on_call)
        hello = m.Hello(version=m.VERSION, role="server", token=token or self._rig.token(Role.SERVER))
        self.welcome = m.Welcome.from_dict(await self.channel.call("hello", hello.to_dict()))
        details = register(**{**self._profile, "held": self.span, "epoch": self.epoch})
        answer = m.Registered.from_dict(await self.channel.call("register", details.to_dict()))
        self.registered = answer
        self._take(answer.epoch, answer.span)
        await self.report()
        return self

    def keep_reporting(self) -> None:
        self._reporting = asyncio.create_task(self._keep_reporting())

    def leave(self) -> None:
        """Its connection breaks."""
        if self._reporting is not None:
            self._reporting.cancel()
        if self.channel is not None:
            self.channel.close()

    async def report(self) -> m.Reported:
        assert self.channel is not None
        ready = self.span is not None
        report = m.Report(
            epoch=self.epoch,
            state="ready" if ready else "joining",
            span=self.span,
            cache=m.CacheUse(total=self.total if ready else 0, free=self.total if ready else 0, running=0, waiting=0),
            sessions=self.sessions,
        )
        return m.Reported.from_dict(await self.channel.call("report", report.to_dict()))

    async def _keep_reporting(self) -> None:
        with contextlib.suppress(ControlLost):
            while True:
                await self.report()
                await asyncio.sleep(0.2)

    async def _on_call(self, method: str, body: dict[str, Any]) -> dict[str, Any]:
        assert method == "assign"
        assignment = m.Assign.from_dict(body)
        self.assignments.append(assignment)
        self._take(assignment.epoch, assignment.span)
        self._soon = asyncio.create_task(self.report())
        return m.Assigned(accepted=True).to_dict()

    def _take(self, epoch: int, span: m.Span | None) -> None:
        self.epoch, self.span = epoch, span


class ScriptedClient:
    """Asks for sessions; `notes` are the notifications that came."""

    def __init__(self, rig: Rig, number: int) -> None:
        self._rig, self.peer_id = rig, peer(1000 + number)
        self.notes: list[tuple[str, dict[str, Any]]] = []
        self._names = itertools.count()
        self._number = number

    async def join(self, token: str | None = None) -> "ScriptedClient":
        self.channel = await self._rig.connect(self.peer_id, on_notify=lambda *note: self.notes.append(note))
        hello = m.Hello(version=m.VERSION, role="client", token=token or self._rig.token(Role.CLIENT))
        self.welcome = m.Welcome.from_dict(await self.channel.call("hello", hello.to_dict()))
        return self

    def new_session(self, *, max_length: int = 64) -> m.Open:
        name = f"client{self._number}-{next(self._names)}"
        return m.Open(session_id=name, batch=1, max_length=max_length, prompt_tokens=8, output_tokens=max_length - 8)

    async def open(self, session: m.Open) -> m.Opened:
        return m.Opened.from_dict(await self.channel.call("open", session.to_dict()))

    async def close(self, session: m.Open, measured: m.Measured = m.Measured()) -> None:  # noqa: B008 - immutable
        await self.channel.call("close", m.Close(session_id=session.session_id, measured=measured).to_dict())

    def noted(self, kind: str, session: m.Open) -> dict[str, Any] | None:
        """The last notification of a kind about a session."""
        found = [body for name, body in self.notes if name == kind and body["session_id"] == session.session_id]
        return found[-1] if found else None


def covers_all(chain: tuple[m.ChainHop, ...]) -> bool:
    ends = [0, *(hop.end for hop in chain)]
    return [hop.start for hop in chain] == ends[:-1] and ends[-1] == FACTS.num_blocks
