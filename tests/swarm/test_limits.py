"""What one peer may take, by a clock of the test's own."""

import asyncio
import contextlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geopetals.errors import ServerFull
from geopetals.swarm.limits import Bucket, Limits, PeerLimits
from geopetals.swarm.wire import WireError


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@given(st.lists(st.floats(0, 0.2), min_size=30, max_size=200))
def test_a_bucket_never_gives_more_than_its_rate(pauses: list[float]) -> None:
    rate, most, now, given_ = 10.0, 5.0, 0.0, 0
    bucket = Bucket(rate, most, now)
    for pause in pauses:
        now += pause
        given_ += bucket.take_if_there(now)
    assert given_ <= most + rate * now + 1e-6
    assert given_ >= min(len(pauses), int(most))


def test_what_is_taken_on_credit_is_paid_by_waiting() -> None:
    bucket = Bucket(10.0, 2.0, 0.0)
    assert [bucket.take(0.0) for _ in range(4)] == pytest.approx([0.0, 0.0, 0.1, 0.2])
    assert bucket.take(0.3) == 0.0


@pytest.mark.parametrize("kind", ["session", "call"])
def test_too_many_at_a_time_are_refused_and_others_are_not(kind: str) -> None:
    limits = PeerLimits(Limits(sessions=2, calls=2), clock=Clock())
    enter: Callable[[str], contextlib.AbstractContextManager[None]] = getattr(limits, kind)
    with enter("a"), enter("a"):
        with pytest.raises(ServerFull, match="at most 2"), enter("a"):
            pytest.fail("a third")
        with enter("b"):
            pass
    with enter("a"):
        pass


def test_too_many_calls_a_second_are_refused_until_time_has_passed() -> None:
    clock = Clock()
    limits = PeerLimits(Limits(calls_per_s=2, burst_s=2), clock=clock)
    for _ in range(4):
        with limits.call("a"):
            pass
    with pytest.raises(ServerFull, match="a second"), limits.call("a"):
        pytest.fail("a fifth")
    clock.now += 0.5
    with limits.call("a"):
        pass


def test_push_streams_that_name_no_session_are_counted() -> None:
    limits = PeerLimits(Limits(links=1), clock=Clock())
    with limits.link("a"):
        with pytest.raises(WireError), limits.link("a"):
            pytest.fail("a second")
        with limits.link("b"):
            pass
    with limits.link("a"):
        pass


def test_messages_are_read_later_and_give_way_meanwhile() -> None:
    async def main() -> None:
        limits, others = PeerLimits(Limits(messages_per_s=500, message_burst_s=0.01)), 0

        async def somebody_else() -> None:
            nonlocal others
            while True:
                await asyncio.sleep(0)
                others += 1

        task = asyncio.create_task(somebody_else())
        for _ in range(20):
            await limits.message("a")
        task.cancel()
        assert others > 0

    asyncio.run(main())


def test_a_peer_has_few_passes_in_line() -> None:
    async def main() -> None:
        limits, order = PeerLimits(Limits(passes=2)), list[str]()

        async def compute(peer: str) -> None:
            async with limits.compute_pass(peer):
                order.append(peer)
                await asyncio.sleep(0)

        await asyncio.gather(*(compute(peer) for peer in "aaaaaab"))
        assert order.index("b") == 2

    asyncio.run(main())


def test_peers_are_forgotten_but_for_those_that_hold_something() -> None:
    limits = PeerLimits(Limits(sessions=1), clock=Clock())
    with limits.session("holder"):
        for number in range(10_000):
            with limits.call(str(number)):
                pass
        assert len(limits._peers) <= 4096
        with pytest.raises(ServerFull), limits.session("holder"):
            pytest.fail("a second one")
