"""The core, driven live: what is on the disk gives back the state it was written in, and nothing leaves before."""

import asyncio
import random
from pathlib import Path
from typing import Any

import msgpack
import pytest

from geopetals.coordinator import messages as m
from geopetals.coordinator.core import Core
from geopetals.coordinator.core import events as ev
from geopetals.coordinator.core.actions import Action, Assign
from geopetals.coordinator.engine import Engine
from geopetals.coordinator.recorded import note_core, replay_store
from geopetals.coordinator.store import Store
from tests.coordinator.actors import until
from tests.coordinator.rig import BLOCKS, FACTS, SETTINGS, peer, register
from tests.event_loop import in_loop


class Clock:
    """Time as a test says."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


class Swarm:
    """An engine whose servers do at once what they are told; `random_event` is something that may happen next."""

    def __init__(self, path: Path, seed: int) -> None:
        self.store, self.journal, self.clock = Store(path), Store(path), Clock()
        self.engine = Engine(Core(FACTS, SETTINGS), self.journal, clock=self.clock)
        self.engine.perform = self.perform
        self.engine.recover()
        self.performed: list[Action] = []
        self._random = random.Random(seed)
        self._sessions: list[tuple[str, str]] = []
        self._spans: dict[str, tuple[int, m.Span]] = {}

    def perform(self, action: Action) -> None:
        self.performed.append(action)
        if isinstance(action, Assign) and action.span is not None:
            self._spans[action.peer] = action.epoch, action.span

    def random_event(self) -> ev.Event:
        self.clock.now += self._random.expovariate(2.0)
        servers, clients = [peer(number) for number in range(4)], [peer(1000 + number) for number in range(3)]
        kind = self._random.randrange(10)
        if kind == 0:
            one = self._random.choice(servers)
            epoch, span = self._spans.get(one, (0, None))
            return ev.ServerRegistered(peer=one, register=register(held=span, epoch=epoch, memory_bytes=60_000))
        if kind == 1 and self._spans:
            return ev.ServerLost(peer=self._random.choice(sorted(self._spans)))
        if kind <= 4 and self._spans:
            return self._report(self._random.choice(sorted(self._spans)))
        if kind <= 6:
            client, name = self._random.choice(clients), f"s{self._random.randrange(10**9)}"
            self._sessions.append((client, name))
            return ev.SessionAsked(client=client, open=m.Open(session_id=name, batch=1, max_length=64, prompt_tokens=8))
        if kind == 7 and self._sessions:
            client, name = self._sessions.pop(self._random.randrange(len(self._sessions)))
            return ev.SessionClosed(client=client, session_id=name)
        if kind == 8:
            return ev.ClientLost(client=self._random.choice(clients))
        return ev.Tick()

    def _report(self, one: str) -> ev.Event:
        epoch, span = self._spans[one]
        cache = m.CacheUse(total=64 * BLOCKS, free=64 * BLOCKS, running=0, waiting=0)
        links = tuple(m.LinkSample(peer(other), self._random.uniform(0.001, 0.1), False) for other in range(2))
        report = m.Report(epoch=epoch, state="ready", span=span, cache=cache, links=links)
        return ev.ServerReported(peer=one, report=report)

    async def close(self) -> None:
        await self.engine.close()
        self.store.close()
        self.journal.close()


def plain(state: dict[str, Any]) -> Any:
    """As it is after a way over the disk."""
    return msgpack.unpackb(msgpack.packb(state), strict_map_key=False)


@pytest.mark.parametrize("seed", range(2))
@in_loop
async def test_a_restart_at_any_event_gives_the_same_state(tmp_path: Path, seed: int) -> None:
    swarm = Swarm(tmp_path / "live.db", seed)
    for number in range(80):
        await swarm.engine.settle(swarm.random_event())
        await asyncio.sleep(0.01)  # plans are made in a thread
        if number % 40 != 39:
            continue
        await until(lambda: not swarm.engine.is_planning, "the plan is made")
        await swarm.engine.settle(ev.Tick())
        copy = tmp_path / f"copy{number}.db"
        swarm.store.backup(copy)
        again = Store(copy)
        engine = Engine(Core(FACTS, SETTINGS), again, clock=swarm.clock)
        engine.recover()
        assert plain(engine.core.snapshot()) == plain(swarm.engine.core.snapshot())
        assert engine.events == swarm.engine.events
        note_core(again, FACTS, SETTINGS)
        replayed = replay_store(again)
        assert len(replayed.decisions) == engine.events
        assert not replayed.differences
        await engine.close()
        again.close()
    await swarm.close()


@in_loop
async def test_a_stop_leaves_a_snapshot_from_which_the_next_start_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "live.db"
    swarm = Swarm(path, 7)
    for _ in range(50):
        await swarm.engine.settle(swarm.random_event())
    await until(lambda: not swarm.engine.is_planning, "the plan is made")
    await swarm.close()
    before, number = plain(swarm.engine.core.snapshot()), swarm.engine.events
    store = Store(path)
    engine = Engine(Core(FACTS, SETTINGS), store, clock=swarm.clock)
    assert engine.recover() == 0
    assert engine.events == number
    assert plain(engine.core.snapshot()) == before
    await engine.close()
    store.close()


@in_loop
async def test_time_never_goes_back(tmp_path: Path) -> None:
    swarm = Swarm(tmp_path / "live.db", 0)
    await swarm.engine.settle(ev.Tick())
    before = swarm.engine.now()
    swarm.clock.now -= 500
    await swarm.engine.settle(ev.Tick())
    assert swarm.engine.now() == before
    times = [logged.at for logged in swarm.store.events()]
    assert times == sorted(times)
    await swarm.close()


@in_loop
async def test_a_full_disk_ends_it_before_anything_is_promised(tmp_path: Path) -> None:
    swarm = Swarm(tmp_path / "live.db", 0)
    await swarm.engine.settle(ev.Tick())
    swarm.journal.write = _no_space  # type: ignore[method-assign]
    swarm.performed.clear()
    swarm.engine.apply(ev.ServerRegistered(peer=peer(0), register=register()))
    with pytest.raises(OSError, match="No space"):
        await asyncio.wait_for(swarm.engine.failed, 20)
    assert not swarm.performed
    await swarm.close()


def _no_space(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")
