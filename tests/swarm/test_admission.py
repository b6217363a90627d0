"""Who gets attention cache, and what is told to who does not."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geopetals.errors import ServerFull
from geopetals.swarm.admission import Admission, Expected, Pace, free_in_s
from geopetals.swarm.kv_budget import KVBudget

reservations = st.lists(st.tuples(st.integers(1, 50), st.none() | st.floats(0, 100)), max_size=8)


@given(st.integers(1, 200), st.integers(0, 50), reservations)
def test_predictions_are_those_of_waiting_for_each_end(needed: int, left: int, held: list[Any]) -> None:
    running = [Expected(tokens, ends) for tokens, ends in held]
    found = free_in_s(needed, left, running)
    ends = sorted({0.0, *(ends for _, ends in held if ends is not None)})
    in_time = [
        end for end in ends if left + sum(tokens for tokens, at in held if at is not None and at <= end) >= needed
    ]
    assert found == (0.0 if left >= needed else in_time[0] if in_time else None)


def test_a_pace_is_seen_after_the_prompt() -> None:
    pace = Pace()
    pace.look(0, 0.0)
    assert pace.ends_in_s(0, 600, 0.0) is None
    pace.look(500, 5.0)  # a prompt: says nothing of what follows
    assert pace.ends_in_s(500, 600, 5.0) is None
    pace.look(510, 7.0)
    assert pace.ends_in_s(510, 600, 7.0) == pytest.approx(18.0)
    assert pace.ends_in_s(510, 600, 9.0) == pytest.approx(16.0)
    assert pace.ends_in_s(510, 600, 30.0) is None  # a person reads: nobody knows


def play(scenario: Any) -> None:
    async def main() -> None:
        async with asyncio.timeout(20):
            await scenario()

    asyncio.run(main())


async def refusal(admission: Admission, block_tokens: int) -> ServerFull:
    with pytest.raises(ServerFull) as caught:
        async with admission.admit(block_tokens, timeout_s=0):
            pytest.fail("there is no room")
    return caught.value


def test_who_is_refused_is_told_when_there_will_be_room() -> None:
    async def scenario() -> None:
        clock = SimpleNamespace(now=0.0)
        admission = Admission(KVBudget(100), clock=lambda: clock.now)
        async with admission.admit(80, timeout_s=0) as admitted:
            cache = SimpleNamespace(length=10, max_length=40)
            admitted.kv = cache  # type: ignore[assignment]
            unknown = await refusal(admission, 30)
            assert unknown.free_in_s is None
            assert "not known" in str(unknown)
            for _ in range(3):  # five tokens a second
                clock.now += 1.0
                admission.tick()
                cache.length += 5
            cache.length -= 5
            known = await refusal(admission, 30)
            assert known.free_in_s == pytest.approx(4.0)
            assert "full for about 4 s more" in str(known)
            assert (await refusal(admission, 101)).free_in_s is None
            assert admission.describe() == {"total": 100, "free": 20, "running": 1, "waiting": 0}
        assert admission.describe() == {"total": 100, "free": 100, "running": 0, "waiting": 0}

    play(scenario)


def test_those_who_wait_come_first_and_are_counted() -> None:
    async def scenario() -> None:
        admission = Admission(KVBudget(100))
        async with admission.admit(80, timeout_s=0):

            async def wait() -> None:
                async with admission.admit(50, timeout_s=10):
                    pass

            task = asyncio.create_task(wait())
            while not admission.waiting:  # noqa: ASYNC110 - nobody announces it
                await asyncio.sleep(0)
            assert (await refusal(admission, 10)).free_in_s is None  # fits, but not before the one who waits
        await task
        assert admission.describe() == {"total": 100, "free": 100, "running": 0, "waiting": 0}

    play(scenario)
