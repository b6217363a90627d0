import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geopetals.swarm.waiting_window import LONGEST_S, BatchCost, WaitingWindow, worth_waiting_s

GROUP = "blocks"
seconds = st.floats(0.001, 1.0)


class Session:
    """Something that can be forgotten."""


def costs(fixed_s: float, each_s: float) -> BatchCost:
    cost = BatchCost()
    for size in (1, 4, 8, 2) * 5:
        cost.note(size, fixed_s + each_s * size)
    return cost


def played(window: WaitingWindow, session: object, *, thinks_s: float, now: float, rounds: int = 10) -> None:
    """The session has thought so long between its answers, and got the last one at `now`."""
    for number in range(rounds, 0, -1):
        window.answered([session], GROUP, now - number * thinks_s)
        window.arrived(session, now - (number - 1) * thinks_s)
    window.answered([session], GROUP, now)


@given(seconds, seconds, st.integers(1, 40))
def test_the_cost_of_a_batch_is_learnt(fixed_s: float, each_s: float, size: int) -> None:
    batch_s, more_s = costs(fixed_s, each_s).estimate(size)
    assert batch_s == pytest.approx(fixed_s + each_s * size, rel=1e-3)
    assert more_s == pytest.approx(each_s, rel=1e-3)


@given(st.lists(st.tuples(st.integers(1, 64), seconds), max_size=20), st.integers(1, 64))
def test_an_estimate_is_never_negative(seen: list[tuple[int, float]], size: int) -> None:
    cost = BatchCost()
    for one in seen:
        cost.note(*one)
    assert min(cost.estimate(size)) >= 0


@given(seconds, st.floats(0, 0.1), st.integers(1, 8), st.lists(st.floats(0, 2.0), max_size=6))
def test_a_wait_costs_those_who_wait_less_than_it_saves(
    fixed_s: float, each_s: float, waiting: int, expected: list[float]
) -> None:
    """Against the definition: time until each has its answer, summed, if this batch waits and if it does not."""
    cost = costs(fixed_s, each_s)
    wait_s = worth_waiting_s(cost, waiting, expected)
    batch_s, more_s = cost.estimate(waiting)

    def saved(moment: float) -> float:
        joining = sum(other <= moment for other in expected)
        return joining * (batch_s - moment) - waiting * (moment + joining * more_s)

    assert wait_s in {0.0, *expected}
    assert saved(wait_s) >= max(0.0, *(saved(moment) for moment in expected), 0.0) - 1e-9


def test_a_session_alone_never_waits() -> None:
    window, alone = WaitingWindow(), Session()
    window.cost = costs(0.1, 0.001)
    played(window, alone, thinks_s=0.005, now=10.0)
    window.arrived(alone, 10.004)
    assert window.wait_s(GROUP, 1, 10.004, 10.004) == 0.0


def test_two_groups_that_take_turns_become_one() -> None:
    window, sessions = WaitingWindow(), [Session() for _ in range(4)]
    window.cost = costs(0.1, 0.001)
    for session in sessions:
        played(window, session, thinks_s=0.005, now=10.0)
    wait_s = window.wait_s(GROUP, 4, 10.001, 10.001)
    assert wait_s == pytest.approx(0.004, abs=1e-6)
    for session in sessions:
        window.arrived(session, 10.005)
    assert window.wait_s(GROUP, 8, 10.001, 10.005) == 0.0


@pytest.mark.parametrize("thinks_s", [0.03, 0.1, 5.0])
def test_who_thinks_longer_than_the_window_is_not_waited_for(thinks_s: float) -> None:
    window, slow = WaitingWindow(), Session()
    window.cost = costs(0.1, 0.001)
    played(window, slow, thinks_s=thinks_s, now=10.0)
    assert window.wait_s(GROUP, 1, 10.001, 10.001) == 0.0


def test_who_does_not_come_is_waited_for_once_at_most() -> None:
    window, gone = WaitingWindow(), Session()
    window.cost = costs(0.1, 0.001)
    played(window, gone, thinks_s=0.005, now=10.0)
    assert 0 < window.wait_s(GROUP, 1, 10.0, 10.0) <= LONGEST_S
    assert window.wait_s(GROUP, 1, 10.0, 10.0 + LONGEST_S) == 0.0
    assert window.wait_s(GROUP, 1, 20.0, 20.0) == 0.0


def test_other_groups_and_closed_sessions_do_not_count() -> None:
    window, session = WaitingWindow(), Session()
    window.cost = costs(0.1, 0.001)
    played(window, session, thinks_s=0.005, now=10.0)
    assert window.wait_s("other blocks", 1, 10.0, 10.0) == 0.0
    assert window.wait_s(GROUP, 1, 10.0, 10.0) > 0
    del session
    assert window.wait_s(GROUP, 1, 10.0, 10.0) == 0.0


class Simulated:
    """Sessions in a closed loop with one server, in simulated time; each comes back so long after its answer.

    With jitter the whole cohort is late together, as when it goes round by way of other servers.
    """

    def __init__(
        self, thinks_s: list[float], *, jitter_s: float, fixed_s: float, each_s: float, apart_s: float = 0.0
    ) -> None:
        self.window, self.sessions = WaitingWindow(), [Session() for _ in thinks_s]
        self._thinks_s, self._jitter_s, self._fixed_s, self._each_s = thinks_s, jitter_s, fixed_s, each_s
        self._random = random.Random(0)
        self._coming = [(apart_s * number, number) for number in range(len(thinks_s))]
        self._waiting: list[int] = []
        self.now, self.sizes = 0.0, list[int]()

    def batch(self) -> None:
        since = self.now = max(self.now, self._coming[0][0]) if not self._waiting else self.now
        self._collect()
        while (wait_s := self.window.wait_s(GROUP, len(self._waiting), since, self.now)) > 0:
            until = self.now + wait_s
            self.now = min(until, self._coming[0][0] if self._coming else until)
            if self.now == until and (not self._coming or self._coming[0][0] > until):
                break
            self._collect()
        batch, self._waiting = self._waiting, []
        self.sizes.append(len(batch))
        took_s = self._fixed_s + self._each_s * len(batch)
        self.now += took_s
        self.window.cost.note(len(batch), took_s)
        self.window.answered([self.sessions[number] for number in batch], GROUP, self.now)
        late_s = self._random.uniform(0, self._jitter_s)
        self._coming += [(self.now + late_s + self._thinks_s[number], number) for number in batch]
        self._coming.sort()

    def _collect(self) -> None:
        while self._coming and self._coming[0][0] <= self.now:
            at, number = self._coming.pop(0)
            self.window.arrived(self.sessions[number], at)
            self._waiting.append(number)


@pytest.mark.parametrize("jitter_s", [0.0, 0.2])
@pytest.mark.parametrize("round_trip_s", [0.003, 0.300])
def test_sessions_whose_answers_leave_together_are_batched_together(round_trip_s: float, jitter_s: float) -> None:
    """They come back one after another, by 0.4 ms; without the window the first of them would go alone each time."""
    thinks_s = [round_trip_s + 0.0004 * number for number in range(8)]
    simulated = Simulated(thinks_s, jitter_s=jitter_s, fixed_s=0.05, each_s=0.005)
    for _ in range(60):
        simulated.batch()
    assert sum(simulated.sizes[-20:]) / 20 > 7


def test_sessions_that_began_apart_become_one_batch_where_they_come_back_soon() -> None:
    thinks_s = [0.003 + 0.0004 * number for number in range(8)]
    simulated = Simulated(thinks_s, jitter_s=0.0, fixed_s=0.05, each_s=0.005, apart_s=0.0011)
    for _ in range(60):
        simulated.batch()
    assert simulated.sizes[0] < 8
    assert simulated.sizes[-20:] == [8] * 20


def test_sessions_far_from_each_other_are_served_at_once() -> None:
    simulated = Simulated([0.1 * number + 0.1 for number in range(6)], jitter_s=0.0, fixed_s=0.005, each_s=0.001)
    for _ in range(60):
        simulated.batch()
    assert max(simulated.sizes[-20:]) <= 3
