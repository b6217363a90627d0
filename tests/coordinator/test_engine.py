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
from geopetals.coordinator.core.actions import Action, Assign, MakePlan
from geopetals.coordinator.engine import Engine, Unfit
from geopetals.coordinator.recorded import note_core, replay_store
from geopetals.coordinator.store import LoggedEvent, Store, StoreError
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


def check_replays(store: Store, events: int) -> None:
    note_core(store, FACTS, SETTINGS)
    replayed = replay_store(store)
    assert len(replayed.decisions) == events
    assert not replayed.differences


@in_loop
async def test_an_event_that_the_core_cannot_take_has_never_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = peer(9)
    take = Core._registered

    def fail_half_way(core: Core, event: ev.ServerRegistered, now: float) -> None:
        take(core, event, now)
        if event.peer == bad:
            raise OverflowError("intermediate overflow in fsum")

    monkeypatch.setattr(Core, "_registered", fail_half_way)
    swarm = Swarm(tmp_path / "live.db", 3)
    for _ in range(30):
        await swarm.engine.settle(swarm.random_event())
    await until(lambda: not swarm.engine.is_planning, "the plan is made")
    await swarm.engine.settle(ev.Tick())
    before, number = plain(swarm.engine.core.snapshot()), swarm.engine.events
    for _ in range(3):
        with pytest.raises(Unfit):
            await swarm.engine.settle(ev.ServerRegistered(peer=bad, register=register()))
        assert not swarm.engine.apply(ev.ServerRegistered(peer=bad, register=register()))
        assert plain(swarm.engine.core.snapshot()) == before
        assert swarm.engine.events == number
    for _ in range(20):
        await swarm.engine.settle(swarm.random_event())
    await until(lambda: not swarm.engine.is_planning, "the plan is made")
    await swarm.engine.settle(ev.Tick())
    assert not swarm.engine.failed.done()
    check_replays(swarm.store, swarm.engine.events)
    await swarm.close()


@in_loop
async def test_a_server_with_which_time_cannot_pass_is_thrown_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, tick = peer(9), Core._tick

    def fail_with_it(core: Core, event: ev.Tick, now: float) -> None:
        if core.hears(bad):
            raise ValueError("no cluster")
        tick(core, event, now)

    monkeypatch.setattr(Core, "_tick", fail_with_it)
    swarm = Swarm(tmp_path / "live.db", 0)
    await swarm.engine.settle(ev.ServerRegistered(peer=peer(0), register=register()))
    await swarm.engine.settle(ev.ServerRegistered(peer=bad, register=register()))
    assert not swarm.engine.apply(ev.Tick())
    assert swarm.engine.apply(ev.Tick())
    assert swarm.engine.core.hears(peer(0))
    assert not swarm.engine.core.hears(bad)
    await until(lambda: not swarm.engine.is_planning, "the plan is made")
    await swarm.close()


@in_loop
async def test_an_action_that_fails_holds_up_no_other(tmp_path: Path) -> None:
    swarm = Swarm(tmp_path / "live.db", 0)
    seen: list[Action] = []

    def fail(action: Action) -> None:
        seen.append(action)
        raise RuntimeError("the member's channel is broken")

    swarm.engine.perform = fail
    for number in range(3):
        await asyncio.wait_for(swarm.engine.settle(ev.ServerRegistered(peer=peer(number), register=register())), 20)
    expected = [each for logged in swarm.store.events() for each in logged.actions if each["kind"] != MakePlan.__name__]
    assert len(seen) >= len(expected) > 1
    await swarm.close()


@in_loop
async def test_a_stop_while_a_plan_is_made_is_replayed_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "live.db"
    swarm = Swarm(path, 5)
    for number in range(3):
        await swarm.engine.settle(ev.ServerRegistered(peer=peer(number), register=register(memory_bytes=60_000)))
    while not swarm.engine.is_planning:
        swarm.clock.now += 0.5
        swarm.engine.apply(ev.Tick())
    await swarm.close()
    again = Swarm(path, 6)
    again.clock.now = swarm.clock.now + 1
    again.engine.restarted()
    assert again.engine.is_planning == (again.engine.core.planning.open_job is not None)
    for _ in range(20):
        await again.engine.settle(again.random_event())
    await until(lambda: not again.engine.is_planning, "the plan is made")
    await again.engine.settle(ev.Tick())
    check_replays(again.store, again.engine.events)
    await again.close()


@in_loop
async def test_time_goes_on_after_a_restart_although_the_clock_was_set_back(tmp_path: Path) -> None:
    path = tmp_path / "live.db"
    swarm = Swarm(path, 0)
    await swarm.engine.settle(ev.Tick())
    last = swarm.engine.now()
    await swarm.close()
    store, clock = Store(path), Clock()
    clock.now = last - 3600
    engine = Engine(Core(FACTS, SETTINGS), store, clock=clock)
    engine.recover()
    assert engine.now() == last
    clock.now += 7
    assert engine.now() == last + 7
    await engine.close()
    store.close()


@in_loop
async def test_a_coordinator_killed_long_after_its_last_snapshot_comes_back_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "live.db"
    monkeypatch.setattr("geopetals.coordinator.engine._SNAPSHOT_EVENTS", 60)
    seen = 0
    for run in range(3):
        swarm = Swarm(path, run)
        assert swarm.engine.events == seen
        swarm.engine.restarted()
        for _ in range(50):
            await swarm.engine.settle(swarm.random_event())
        monkeypatch.setattr("geopetals.coordinator.engine._SNAPSHOT_EVENTS", 10_000)
        for _ in range(700):
            swarm.engine.apply(ev.Tick())
        await swarm.engine.settle(ev.Tick())
        await until(lambda swarm=swarm: not swarm.engine.is_planning, "the plan is made")  # type: ignore[misc]
        await swarm.engine.settle(ev.Tick())
        seen = swarm.engine.events
        await swarm.engine._journal.close()  # what a kill leaves: no snapshot at the end
        assert [logged.number for logged in swarm.store.events()] == list(range(1, seen + 1))
        swarm.store.close()
        swarm.journal.close()


@in_loop
async def test_a_state_that_cannot_be_read_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "live.db"
    store = Store(path)
    store.write([LoggedEvent(number, 1.0, {"kind": "Tick"}) for number in range(1, 4)])
    store.write([LoggedEvent(4, 2.0, {"kind": "OfALaterRelease"})])
    engine = Engine(Core(FACTS, SETTINGS), store, clock=Clock())
    with pytest.raises(StoreError, match="another --state"):
        engine.recover()
    await engine.close()
    assert store.last_event() == (4, 2.0)
    assert store.latest_snapshot() is None
    store.close()
