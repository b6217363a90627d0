"""What a chain believes of what its servers say."""

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hivemind.proto import runtime_pb2

from geopetals.client.chain import Chain
from geopetals.client.dialect import RingDialect
from geopetals.client.hop import HopSession
from geopetals.client.routing import Hop
from geopetals.errors import ServerBroken, ServerGone, SwarmFailure
from geopetals.swarm.heartbeat import SERVER_SILENCE_S, Silence
from geopetals.swarm.ring_messages import Beat, Link, NextHop, Opening, Step, Want
from geopetals.swarm.wire import frame, serialize

TIMEOUT_S, HIDDEN = 5.0, 8


class QuietHop:
    """A server that says what the test lets it say, and is never silent."""

    def __init__(self, number: int) -> None:
        self.hop = Hop(peer_id=f"server{number}", start=number, end=number + 1)
        self.has_heartbeats, self.beat, self.frames, self.silence = True, Beat(), 0, Silence(1.0)
        self.posted: list[int] = []

    def listen(self, _: object) -> None: ...

    def tick(self, _: float) -> None: ...

    def abort(self) -> None: ...

    async def drain(self) -> None: ...

    def post(self, step: Step, *_: object) -> None:
        self.posted.append(step.number)


class Swarm:
    def __init__(self) -> None:
        self.config, self.hidden_size = SimpleNamespace(request_timeout=TIMEOUT_S), HIDDEN
        self.avoided: list[str] = []
        self.bad_links: list[tuple[str, ...]] = []

    def avoid(self, peer_id: str, _: SwarmFailure) -> None:
        self.avoided.append(peer_id)

    def avoid_link(self, *pair: str) -> None:
        self.bad_links.append(pair)

    def watch(self, _: Chain) -> None: ...

    def unwatch(self, _: Chain) -> None: ...


class Rig:
    """A chain of three: the first pushes to the second, which is relayed."""

    def __init__(self) -> None:
        self.swarm, self.hops = Swarm(), [QuietHop(number) for number in range(3)]
        following = NextHop(peer_id="server1", session_id="x")
        openings = [
            Opening(heartbeat_s=0.5, is_last=False, next_hop=following),
            Opening(heartbeat_s=0.5, is_last=False),
            Opening(heartbeat_s=0.5, is_last=True),
        ]
        self.chain: Any = Chain(self.swarm, self.hops, openings, [""] * 3, batch=1)  # type: ignore[arg-type]

    async def ticks_until_failure(self, say: Any) -> int:
        """Seconds of one step until the chain gives up; `say` is called in each."""
        hidden = torch.zeros(1, 1, HIDDEN)
        step = asyncio.create_task(self.chain.run(hidden, position=0, want=Want.ALL))
        await asyncio.sleep(0)
        for second in range(100):
            say(second)
            self.chain.tick(1.0)
            if self.chain.failure is not None:
                with pytest.raises(ServerGone):
                    await step
                return second
        step.cancel()
        return 100


@pytest.fixture
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


def test_counts_that_cannot_be_gain_no_time(loop: asyncio.Runner) -> None:
    async def run() -> int:
        rig = Rig()

        def say(second: int) -> None:
            rig.hops[1].beat = Beat(second * 1000, -second, second % 2)

        return await rig.ticks_until_failure(say)

    assert loop.run(run()) <= 3 * TIMEOUT_S


def test_progress_gains_time(loop: asyncio.Runner) -> None:
    async def run() -> int:
        rig = Rig()

        def say(second: int) -> None:
            if second == 4:
                rig.hops[0].beat = Beat(1, 1, 0)

        return await rig.ticks_until_failure(say)

    assert loop.run(run()) >= 4 + TIMEOUT_S


@pytest.mark.parametrize(
    ("beats", "answers", "avoided", "bad_links"),
    [
        ([], False, ["server0"], []),
        ([Beat(1, 1, 1)], False, [], [("server0", "server1")]),
        ([Beat(10**9, 10**9, 10**9)], False, [], [("server0", "server1")]),
        ([Beat(1, 1, 1), Beat(1, 0, 0)], False, ["server1"], []),
        ([Beat(1, 1, 1), Beat(1, 1, 1)], False, ["server1"], []),
        ([Beat(1, 1, 1), Beat(1, 1, 1)], True, ["server2"], []),
        ([Beat(1, 1, 1), Beat(1, 1, 1), Beat(1, 1, 1)], True, ["server2"], []),
    ],
    ids=[
        "never computed",
        "pushed, and never received",
        "says more than can be",
        "received, and never answered",
        "says that it answered",
        "the last is slow",
        "the last says that it answered",
    ],
)
def test_who_is_to_blame_when_nothing_comes(
    loop: asyncio.Runner, beats: list[Beat], answers: bool, avoided: list[str], bad_links: list[tuple[str, str]]
) -> None:
    async def run() -> Rig:
        rig = Rig()

        def say(second: int) -> None:
            for hop, beat in zip(rig.hops, beats, strict=False):
                hop.beat = beat
            if second == 0 and answers:
                rig.chain.on_output(rig.hops[1], Step(0, 0, Want.ALL), torch.zeros(1, 1, HIDDEN))

        await rig.ticks_until_failure(say)
        return rig

    rig = loop.run(run())
    assert rig.swarm.avoided == avoided
    assert rig.swarm.bad_links == bad_links


@pytest.mark.parametrize("number", [0, 7], ids=["again and again", "not asked for"])
def test_outputs_that_nobody_waits_for_gain_no_time(loop: asyncio.Runner, number: int) -> None:
    async def run() -> tuple[int, list[int]]:
        rig = Rig()
        answer = Step(number, 0, Want.ALL), torch.zeros(1, 1, HIDDEN)
        seconds = await rig.ticks_until_failure(lambda _: rig.chain.on_output(rig.hops[1], *answer))
        return seconds, rig.hops[2].posted

    seconds, relayed = loop.run(run())
    assert seconds <= TIMEOUT_S + 1
    assert relayed == ([0] if number == 0 else [])


@pytest.mark.parametrize("link", list(Link))
@pytest.mark.parametrize("index", [1, 2])
def test_whoever_tells_of_a_link_that_it_has_not_is_at_fault(loop: asyncio.Runner, index: int, link: Link) -> None:
    async def run() -> Rig:
        rig = Rig()
        rig.chain.on_link(rig.hops[index], link, "reset")
        return rig

    rig = loop.run(run())
    assert isinstance(rig.chain.failure, ServerBroken)
    assert rig.swarm.avoided == [f"server{index}"]


def test_a_link_that_was_refused_cannot_be_lost(loop: asyncio.Runner) -> None:
    async def run() -> Rig:
        rig = Rig()
        rig.chain.on_link(rig.hops[0], Link.REFUSED, "unreachable")
        assert rig.chain.failure is None
        rig.chain.on_link(rig.hops[0], Link.LOST, "reset")
        return rig

    rig = loop.run(run())
    assert rig.swarm.avoided == ["server0"]


def test_parts_of_a_large_message_are_signs_of_life(loop: asyncio.Runner) -> None:
    """On a slow link it takes longer than the silence that a server is given."""
    received: list[torch.Size] = []

    class Listener:
        def on_output(self, _: object, step: Step, hidden: torch.Tensor) -> None:
            received.append(hidden.shape)

        def on_link(self, *_: object) -> None: ...

        def on_failure(self, *_: object) -> None: ...

    async def run() -> None:
        reader: Any = asyncio.StreamReader()
        writer: Any = SimpleNamespace(
            is_closing=lambda: True,
            close=lambda: None,
            transport=SimpleNamespace(get_write_buffer_size=lambda: 0),
        )
        dialect: Any = RingDialect()
        hop = HopSession(Hop(peer_id="server", start=0, end=1), reader, writer, dialect)
        hop.has_heartbeats = True
        hop.listen(Listener())
        message = runtime_pb2.ExpertResponse(
            tensors=[serialize(torch.zeros(1, 500, HIDDEN))], metadata=Step(0, 0, Want.ALL).to_bytes()
        )
        data = frame(message)
        for start in range(0, len(data), 2000):
            assert hop.tick(0.8 * SERVER_SILENCE_S) is None
            reader.feed_data(data[start : start + 2000])
            await asyncio.sleep(0.01)
        assert hop.tick(0.8 * SERVER_SILENCE_S) is None
        assert hop.tick(0.8 * SERVER_SILENCE_S) is not None
        hop.abort()
        await asyncio.sleep(0)

    loop.run(run())
    assert received == [(1, 500, HIDDEN)]
