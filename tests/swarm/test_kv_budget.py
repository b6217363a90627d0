import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geopetals.errors import ServerFull, ServerMoving
from geopetals.swarm.kv_budget import KVBudget

FOREVER_S = 60.0


class Holder:
    """A session that takes its cache and holds it until `leave()`."""

    def __init__(self, budget: KVBudget, amount: int, *, timeout_s: float = FOREVER_S, recovers: bool = False) -> None:
        self.amount, self.recovers = amount, recovers
        self.holds = False
        self._leave = asyncio.Event()
        self.task = asyncio.create_task(self._live(budget, timeout_s))

    async def _live(self, budget: KVBudget, timeout_s: float) -> None:
        async with budget.reserve(self.amount, timeout_s=timeout_s, recovers=self.recovers):
            self.holds = True
            try:
                await self._leave.wait()
            finally:
                self.holds = False

    @property
    def waits(self) -> bool:
        return not self.holds and not self.task.done()

    def leave(self) -> None:
        self._leave.set()


async def settle() -> None:
    """Let everything run that can run without time passing."""
    for _ in range(8):
        await asyncio.sleep(0)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def test_an_amount_over_the_total_is_refused_at_once() -> None:
    async def scenario() -> None:
        budget = KVBudget(10)
        with pytest.raises(ServerFull, match="needs 11 block-tokens"):
            async with asyncio.timeout(1), budget.reserve(11, timeout_s=FOREVER_S):
                pass
        assert budget.left == 10

    run(scenario())


def test_a_full_budget_refuses_who_will_not_wait() -> None:
    async def scenario() -> None:
        budget = KVBudget(10)
        async with budget.reserve(8, timeout_s=0):
            with pytest.raises(ServerFull, match="2 are free"):
                async with budget.reserve(3, timeout_s=0):
                    pass
            async with budget.reserve(2, timeout_s=0):
                assert budget.left == 0
        assert budget.left == 10

    run(scenario())


def test_who_waits_too_long_is_told_so() -> None:
    async def scenario() -> None:
        budget = KVBudget(10)
        async with budget.reserve(10, timeout_s=0):
            with pytest.raises(ServerFull, match="no attention cache came free"):
                async with budget.reserve(1, timeout_s=0.01):
                    pass
        assert budget.left == 10

    run(scenario())


def test_a_small_request_does_not_overtake_a_large_one() -> None:
    async def scenario() -> None:
        budget = KVBudget(10)
        first, large, small = Holder(budget, 6), Holder(budget, 8), Holder(budget, 1)
        await settle()
        assert (first.holds, large.waits, small.waits) == (True, True, True)
        with pytest.raises(ServerFull):
            async with budget.reserve(1, timeout_s=0):
                pass
        first.leave()
        await settle()
        assert (large.holds, small.holds) == (True, True)
        for holder in (large, small):
            holder.leave()
        await settle()
        assert budget.left == 10

    run(scenario())


def test_those_behind_a_waiter_that_gives_up_move_on() -> None:
    async def scenario() -> None:
        budget = KVBudget(10)
        first, large, small = Holder(budget, 6), Holder(budget, 8), Holder(budget, 3)
        await settle()
        large.task.cancel()
        await settle()
        assert (first.holds, small.holds, budget.left) == (True, True, 1)
        impatient, modest = Holder(budget, 5, timeout_s=0.01), Holder(budget, 1)
        with contextlib.suppress(ServerFull):
            await impatient.task
        await settle()
        assert modest.holds
        for holder in (first, small, modest):
            holder.leave()
        await settle()
        assert budget.left == 10

    run(scenario())


def test_a_grant_and_a_cancellation_at_the_same_moment_lose_nothing() -> None:
    async def scenario() -> None:
        budget = KVBudget(4)
        first, second, third = Holder(budget, 4), Holder(budget, 4), Holder(budget, 4)
        await settle()
        first.leave()
        await asyncio.sleep(0)
        second.task.cancel()
        await settle()
        assert third.holds or second.holds
        second.leave()
        third.leave()
        await settle()
        assert budget.left == 4

    run(scenario())


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("open"), st.integers(1, 12)),
        st.tuples(st.just("recover"), st.integers(1, 12)),
        st.tuples(st.just("hurry"), st.integers(1, 12)),
        st.tuples(st.just("leave"), st.integers(0, 20)),
        st.tuples(st.just("cancel"), st.integers(0, 20)),
        st.tuples(st.just("leave and cancel"), st.integers(0, 20)),
        st.tuples(st.just("settle"), st.just(0)),
    ),
    max_size=30,
)


@settings(max_examples=150, deadline=None)
@given(ACTIONS)
def test_whatever_happens_it_is_never_overdrawn_and_serves_in_order(actions: list[tuple[str, int]]) -> None:
    async def scenario() -> None:
        budget = KVBudget(10)
        holders: list[Holder] = []
        for action, number in actions:
            act(action, number, budget, holders)
            if action == "settle":
                await settle()
            assert 0 <= budget.used <= budget.total
            assert sum(holder.amount for holder in holders if holder.holds) <= budget.used
        await settle()
        holding = sum(holder.amount for holder in holders if holder.holds)
        assert budget.used == holding
        waiting = [holder for holder in holders if holder.waits]
        in_turn = [holder for holder in waiting if holder.recovers] or waiting
        if in_turn:
            assert in_turn[0].amount > budget.left
        for holder in holders:
            holder.leave()
        for holder in holders:
            holder.leave()
            await settle()
        assert all(holder.task.done() for holder in holders)
        assert budget.used == 0
        for holder in holders:
            if not holder.task.cancelled():
                assert isinstance(holder.task.exception(), ServerFull | None)

    run(scenario())


def act(action: str, number: int, budget: KVBudget, holders: list[Holder]) -> None:
    chosen = holders[number % len(holders)] if holders else None
    if action == "open":
        holders.append(Holder(budget, number))
    elif action == "recover":
        holders.append(Holder(budget, number, recovers=True))
    elif action == "hurry":
        holders.append(Holder(budget, number, timeout_s=0))
    elif chosen is not None:
        if "leave" in action:
            chosen.leave()
        if "cancel" in action:
            chosen.task.cancel()


def test_a_session_grows_while_there_is_room() -> None:
    async def scenario() -> None:
        budget = KVBudget(12)
        async with budget.reserve(2, timeout_s=0.0), budget.reserve(4, timeout_s=0.0) as mine:
            await mine.grow(5)
            assert (mine.amount, budget.left) == (9, 1)
            with pytest.raises(ServerFull, match="needs 2 block-tokens of attention cache, 1 are free"):
                await mine.grow(2)
            with pytest.raises(ServerFull, match="needs 13 block-tokens"):
                await mine.grow(4, timeout_s=FOREVER_S)
            mine.shrink(3)
            assert (mine.amount, budget.left) == (6, 4)
        assert budget.left == 12

    run(scenario())


def test_growth_goes_before_sessions_that_have_nothing_yet() -> None:
    async def scenario() -> None:
        budget = KVBudget(10)
        other = Holder(budget, 4)
        async with budget.reserve(4, timeout_s=0.0) as mine:
            await settle()
            newcomer = Holder(budget, 6)
            await settle()
            await mine.grow(1)
            growth = asyncio.create_task(mine.grow(3, timeout_s=FOREVER_S))
            await settle()
            assert not growth.done()
            other.leave()
            await settle()
            assert growth.done()
            assert newcomer.waits
        await settle()
        assert newcomer.holds
        newcomer.leave()
        await asyncio.gather(other.task, newcomer.task)
        assert budget.left == 10

    run(scenario())


def test_growth_that_is_given_up_leaves_nothing_behind() -> None:
    async def scenario() -> None:
        budget = KVBudget(10)
        other = Holder(budget, 6)
        await settle()
        async with budget.reserve(2, timeout_s=0.0) as mine:
            with pytest.raises(ServerFull, match="no attention cache came free"):
                await mine.grow(4, timeout_s=0.01)
            assert mine.amount == 2
        other.leave()
        await other.task
        assert budget.left == 10

    run(scenario())


def test_a_recovery_goes_before_sessions_that_have_not_begun_but_after_earlier_recoveries() -> None:
    async def scenario() -> None:
        budget = KVBudget(10)
        running, newcomer = Holder(budget, 8), Holder(budget, 6)
        await settle()
        first, second = Holder(budget, 5, recovers=True), Holder(budget, 5, recovers=True)
        small = Holder(budget, 2, recovers=True)
        await settle()
        assert (first.waits, second.waits, small.waits) == (True, True, True)
        running.leave()
        await settle()
        assert (first.holds, second.holds, small.waits, newcomer.waits) == (True, True, True, True)
        for holder in (first, second, small, newcomer):
            holder.leave()
            await settle()
        assert budget.left == 10

    run(scenario())


def test_a_recovery_that_fits_does_not_wait_behind_those_who_have_not_begun() -> None:
    async def scenario() -> None:
        budget = KVBudget(10)
        running, newcomer = Holder(budget, 8), Holder(budget, 6)
        await settle()
        async with budget.reserve(2, timeout_s=0, recovers=True):
            assert newcomer.waits
        for holder in (running, newcomer):
            holder.leave()
            await settle()
        assert budget.left == 10

    run(scenario())


def test_a_closed_budget_refuses_newcomers_and_lets_running_sessions_grow() -> None:
    async def scenario() -> None:
        budget = KVBudget(10)
        async with budget.reserve(6, timeout_s=0) as mine:
            waiting = Holder(budget, 8)
            await settle()
            budget.close(ServerMoving("it moves."))
            await settle()
            assert isinstance(waiting.task.exception(), ServerMoving)
            with pytest.raises(ServerMoving):
                async with budget.reserve(1, timeout_s=0):
                    pass
            await mine.grow(4)
            assert budget.left == 0
        assert budget.left == 10

    run(scenario())
