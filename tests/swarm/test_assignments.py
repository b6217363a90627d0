"""What becomes of a coordinator's words, in every order in which they and the work can come."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from geopetals.coordinator.messages import Assign, Registered, Span
from geopetals.errors import CheckpointError
from geopetals.progress import Silent
from geopetals.swarm.assignments import Assignments, Standing, Work

FIRST, SECOND, THIRD = Span(0, 3), Span(2, 5), Span(4, 6)


class FakeStage:
    memory_bytes = 1000


class FakeHolding:
    load_s, stage = 0.5, FakeStage()

    def __init__(self, span: Span) -> None:
        self.span = span


class FakeServer:
    """Does at once what it is told, unless `broken` or held up by `gate`; asserts that it is told things in order."""

    def __init__(self) -> None:
        self.serving: Span | None = None
        self.is_draining = False
        self.broken: set[Span] = set()
        self.loaded: list[Span] = []
        self.drains: list[float] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.standings: list[Standing] = []
        self.sessions_end = asyncio.Event()
        self.sessions_end.set()
        work = Work(
            load=self._load,  # type: ignore[arg-type]
            serve=self._serve,  # type: ignore[arg-type]
            drain=self._drain,
            resume=self._resume,
            stop=self._stop,
        )
        self.assignments = Assignments(work, Silent(), lambda: self.standings.append(self.assignments.standing))
        self._task = asyncio.create_task(self.assignments.run())

    async def _load(self, start: int, end: int) -> FakeHolding:
        assert self.serving is None, "memory for two spans at once is not there"
        await self.gate.wait()
        if Span(start, end) in self.broken:
            raise CheckpointError("the shard is damaged.")
        self.loaded.append(Span(start, end))
        return FakeHolding(Span(start, end))

    async def _serve(self, holding: FakeHolding) -> None:
        self.serving, self.is_draining = holding.span, False

    async def _drain(self, reason: str, timeout_s: float) -> None:
        self.is_draining = True
        self.drains.append(timeout_s)
        await self.sessions_end.wait()

    async def _resume(self) -> None:
        assert self.is_draining
        self.is_draining = False

    async def _stop(self, reason: str) -> None:
        assert self.is_draining or self.serving is None, "sessions were not warned"
        self.serving = None

    def states(self) -> list[str]:
        return [standing.state for standing in self.standings]

    async def settle(self) -> None:
        for _ in range(30):
            await asyncio.sleep(0)

    async def end(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


def assign(epoch: int, span: Span | None, *, drain_s: float = 7.0) -> Assign:
    return Assign(epoch=epoch, span=span, reason="a test", drain_s=drain_s)


def play(scenario: Callable[[FakeServer], Awaitable[Any]]) -> None:
    async def main() -> None:
        server = FakeServer()
        try:
            await scenario(server)
        finally:
            await server.end()

    asyncio.run(main())


def test_a_server_loads_what_it_is_told_and_says_how_far_it_is() -> None:
    async def scenario(server: FakeServer) -> None:
        assert server.assignments.accept(assign(1, FIRST)).accepted
        await server.settle()
        assert server.states() == ["loading", "ready"]
        standing = server.assignments.standing
        assert (standing.span, standing.epoch, standing.loaded) == (FIRST, 1, (0.5, 1000))

    play(scenario)


def test_a_move_drains_first_and_holds_one_span_at_a_time() -> None:
    async def scenario(server: FakeServer) -> None:
        server.assignments.accept(assign(1, FIRST))
        await server.settle()
        server.assignments.accept(assign(2, SECOND, drain_s=3.0))
        await server.settle()
        assert server.states() == ["loading", "ready", "draining", "loading", "ready"]
        assert (server.serving, server.drains) == (SECOND, [3.0])

    play(scenario)


def test_older_words_are_refused() -> None:
    async def scenario(server: FakeServer) -> None:
        server.assignments.accept(assign(5, FIRST))
        await server.settle()
        for epoch in (5, 4, 0):
            answer = server.assignments.accept(assign(epoch, SECOND))
            assert not answer.accepted
            assert "older than 5" in answer.why
        await server.settle()
        assert server.serving == FIRST

    play(scenario)


def test_what_cannot_be_loaded_is_told_and_the_blocks_from_before_come_back() -> None:
    async def scenario(server: FakeServer) -> None:
        server.broken = {SECOND}
        server.assignments.accept(assign(1, FIRST))
        await server.settle()
        server.assignments.accept(assign(2, SECOND))
        await server.settle()
        assert server.states() == ["loading", "ready", "draining", "loading", "failed", "loading", "ready"]
        failed = server.standings[4]
        assert (failed.span, failed.epoch, failed.error) == (FIRST, 2, "the shard is damaged.")
        assert (server.serving, server.assignments.standing.epoch) == (FIRST, 2)

    play(scenario)


def test_a_first_load_that_fails_leaves_the_server_without_blocks_and_ready_for_others() -> None:
    async def scenario(server: FakeServer) -> None:
        server.broken = {FIRST}
        server.assignments.accept(assign(1, FIRST))
        await server.settle()
        assert server.states() == ["loading", "failed"]
        server.assignments.accept(assign(2, SECOND))
        await server.settle()
        assert server.serving == SECOND

    play(scenario)


def test_of_several_words_during_a_load_the_last_one_counts() -> None:
    async def scenario(server: FakeServer) -> None:
        server.gate.clear()
        server.assignments.accept(assign(1, FIRST))
        await server.settle()
        server.assignments.accept(assign(2, SECOND))
        server.assignments.accept(assign(3, THIRD))
        server.gate.set()
        await server.settle()
        assert server.loaded == [FIRST, THIRD]
        assert server.serving == THIRD

    play(scenario)


def test_a_server_may_be_told_to_hold_nothing() -> None:
    async def scenario(server: FakeServer) -> None:
        server.assignments.accept(assign(1, FIRST))
        await server.settle()
        server.assignments.accept(assign(2, None))
        await server.settle()
        assert (server.serving, server.assignments.standing.state) == (None, "joining")

    play(scenario)


def test_a_coordinator_that_comes_back_and_says_the_same_moves_nothing() -> None:
    async def scenario(server: FakeServer) -> None:
        server.assignments.adopt(Registered(epoch=3, span=FIRST, reason="first"))
        await server.settle()
        for epoch in (3, 9, 1):  # as it was, a later plan, and a coordinator that has lost its state
            server.assignments.adopt(Registered(epoch=epoch, span=FIRST, reason="as it is"))
            await server.settle()
            assert server.assignments.standing.epoch == epoch
        server.assignments.adopt(Registered(epoch=0, span=None, reason="nothing for now"))
        await server.settle()
        assert server.loaded == [FIRST]
        assert server.serving == FIRST
        assert server.assignments.accept(assign(1, SECOND)).accepted

    play(scenario)


def test_a_server_that_is_to_stay_after_all_stays_if_it_has_not_left_yet() -> None:
    """As when a coordinator comes back that has forgotten the move."""

    async def scenario(server: FakeServer) -> None:
        server.assignments.accept(assign(1, FIRST))
        await server.settle()
        server.sessions_end.clear()
        server.assignments.accept(assign(2, SECOND))
        await server.settle()
        assert server.is_draining
        server.assignments.adopt(Registered(epoch=2, span=FIRST, reason="as it is"))
        await server.settle()
        assert (server.serving, server.is_draining, server.loaded) == (FIRST, False, [FIRST])
        assert (server.assignments.standing.state, server.assignments.standing.epoch) == ("ready", 2)

    play(scenario)


def test_blocks_that_are_not_wanted_any_more_are_not_loaded_first() -> None:
    async def scenario(server: FakeServer) -> None:
        server.assignments.accept(assign(1, FIRST))
        await server.settle()
        server.sessions_end.clear()
        server.assignments.accept(assign(2, SECOND))
        await server.settle()
        server.assignments.accept(assign(3, THIRD))
        await server.settle()
        server.sessions_end.set()
        await server.settle()
        assert (server.serving, server.loaded) == (THIRD, [FIRST, THIRD])

    play(scenario)


def test_a_failure_is_told_even_if_the_server_has_recovered_meanwhile() -> None:
    async def scenario(server: FakeServer) -> None:
        server.broken = {SECOND}
        server.assignments.accept(assign(1, FIRST))
        server.assignments.accept(assign(2, SECOND))
        await server.settle()
        told, is_more = [], True
        while is_more:
            standing, is_more = server.assignments.next_to_tell()
            told.append(standing.state)
        assert "failed" in told
        assert server.assignments.next_to_tell() == (server.assignments.standing, False)

    play(scenario)


def test_a_first_word_counts_whatever_its_number() -> None:
    async def scenario(server: FakeServer) -> None:
        server.assignments.adopt(Registered(epoch=0, span=FIRST, reason="first"))
        await server.settle()
        assert server.serving == FIRST

    play(scenario)


SPANS = st.sampled_from([None, FIRST, SECOND, THIRD])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(SPANS, st.booleans(), st.integers(0, 3)), max_size=12))
def test_in_the_end_it_holds_what_it_was_told_last(orders: list[tuple[Span | None, bool, int]]) -> None:
    """Unless that is broken; whatever it serves was loaded whole, and it never holds two spans."""

    async def scenario(server: FakeServer) -> None:
        server.broken = {THIRD}
        for epoch, (span, is_slow, pauses) in enumerate(orders, start=1):
            for event in (server.gate, server.sessions_end):
                if is_slow:
                    event.clear()
                else:
                    event.set()
            server.assignments.accept(assign(epoch, span))
            for _ in range(pauses):
                await asyncio.sleep(0)
        server.gate.set()
        server.sessions_end.set()
        await server.settle()
        if orders and orders[-1][0] != THIRD:
            assert server.serving == orders[-1][0]
            assert server.assignments.standing.epoch == len(orders)
        assert server.serving != THIRD
        standing = server.assignments.standing
        assert (standing.state == "ready") == (server.serving is not None)

    play(scenario)
