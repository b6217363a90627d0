import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geopetals.swarm.batch_cost import BatchCost
from geopetals.swarm.waiting_window import LONGEST_S, WaitingWindow, worth_waiting_s

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


@given(
    seconds,
    st.floats(0, 0.1),
    st.integers(1, 8),
    st.floats(0, 1.0),
    st.lists(st.tuples(st.floats(0, 1.0), st.floats(0, 1.0)), max_size=6),
)
def test_it_waits_for_somebody_who_is_expected_and_no_longer_than_that_saves(
    fixed_s: float,
    each_s: float,
    waiting: int,
    thinks_s: float,
    away: list[tuple[float, float]],
) -> None:
    cost = costs(fixed_s, each_s)
    wait_s = worth_waiting_s(cost, waiting, thinks_s, away)
    assert wait_s in {0.0, *(moment for moment, _ in away)}
    joining = sum(moment <= wait_s for moment, _ in away)
    assert wait_s <= max(LONGEST_S, cost.seconds(waiting + joining) / 2)
    saves_s = cost.seconds(waiting) + cost.seconds(joining) - cost.seconds(waiting + joining)
    assert wait_s <= saves_s + 1e-9


def test_a_session_alone_never_waits() -> None:
    window, alone = WaitingWindow(), Session()
    window.cost = costs(0.1, 0.001)
    played(window, alone, thinks_s=0.005, now=10.0)
    window.arrived(alone, 10.004)
    assert window.wait_s(GROUP, [alone], 10.004, 10.004) == 0.0


def test_two_groups_that_take_turns_become_one() -> None:
    window, sessions, waiting = WaitingWindow(), [Session() for _ in range(4)], [Session() for _ in range(4)]
    window.cost = costs(0.1, 0.001)
    for session in sessions:
        played(window, session, thinks_s=0.005, now=10.0)
    wait_s = window.wait_s(GROUP, waiting, 10.001, 10.001)
    assert wait_s == pytest.approx(0.004, abs=1e-6)
    for session in sessions:
        window.arrived(session, 10.005)
    assert window.wait_s(GROUP, [*waiting, *sessions], 10.001, 10.005) == 0.0


@pytest.mark.parametrize("thinks_s", [0.08, 0.2, 5.0])
def test_who_thinks_longer_than_the_window_is_not_waited_for(thinks_s: float) -> None:
    window, slow = WaitingWindow(), Session()
    window.cost = costs(0.1, 0.001)
    played(window, slow, thinks_s=thinks_s, now=10.0)
    assert window.wait_s(GROUP, [Session()], 10.001, 10.001) == 0.0


def test_who_is_a_little_late_is_waited_for_but_not_for_long() -> None:
    """An answer on its way takes 5 ms, give or take: missing it by half a millisecond costs another whole batch."""
    window, late = WaitingWindow(), Session()
    window.cost = costs(0.1, 0.001)
    played(window, late, thinks_s=0.005, now=10.0)
    assert 0 < window.wait_s(GROUP, [Session()], 10.0, 10.0) <= LONGEST_S
    assert 0 < window.wait_s(GROUP, [Session()], 10.0, 10.0055) < 0.001
    assert window.wait_s(GROUP, [Session()], 10.0, 10.0 + LONGEST_S) == 0.0
    assert window.wait_s(GROUP, [Session()], 20.0, 20.0) == 0.0


def test_other_groups_and_closed_sessions_do_not_count() -> None:
    window, session, here = WaitingWindow(), Session(), Session()
    window.cost = costs(0.1, 0.001)
    played(window, session, thinks_s=0.005, now=10.0)
    assert window.wait_s("other blocks", [here], 10.0, 10.0) == 0.0
    assert window.wait_s(GROUP, [here], 10.0, 10.0) > 0
    del session
    assert window.wait_s(GROUP, [here], 10.0, 10.0) == 0.0


class Simulated:
    """Sessions in a closed loop with one server, in simulated time, with the window and (`waits` False) without.

    Each comes back so long after its answer, and late by some of `jitter_s` on average; batches take up to 6 % longer
    or 3 % shorter than they should.
    """

    def __init__(
        self, thinks_s: list[float], *, jitter_s: float, fixed_s: float, each_s: float, waits: bool = True
    ) -> None:
        self.window, self.sessions = WaitingWindow(), [Session() for _ in thinks_s]
        self._thinks_s, self._jitter_s, self._fixed_s, self._each_s = thinks_s, jitter_s, fixed_s, each_s
        self._waits, self._random = waits, random.Random(0)
        self._coming = sorted((self._random.uniform(0, 0.05), number) for number in range(len(thinks_s)))
        self._waiting: list[int] = []
        self.now, self.sizes = 0.0, list[int]()

    def tokens_per_s(self, rounds: int = 150) -> float:
        """After a third of so many rounds of all sessions."""
        ends_at = rounds * (self._fixed_s + self._each_s * len(self.sessions) + max(self._thinks_s))
        while self.now < ends_at / 3:
            self.batch()
        began, self.sizes = self.now, []
        while self.now < ends_at:
            self.batch()
        return sum(self.sizes) / (self.now - began)

    def batch(self) -> None:
        if not self._waiting:
            self.now = max(self.now, self._coming[0][0])
        since = self.now
        self._collect()
        while self._waits and (wait_s := self._wait_s(since)) > 0:
            until = self.now + wait_s
            comes_at = self._coming[0][0] if self._coming else until
            self.now = max(self.now, min(comes_at, until)) + 1e-9
            self._collect()
        batch, self._waiting = self._waiting, []
        self.sizes.append(len(batch))
        took_s = (self._fixed_s + self._each_s * len(batch)) * self._random.uniform(0.97, 1.06)
        self.now += took_s
        self.window.cost.note(len(batch), took_s)
        self.window.answered([self.sessions[number] for number in batch], GROUP, self.now)
        for number in batch:
            late_s = self._random.expovariate(1.0) * self._jitter_s
            self._coming.append((self.now + self._thinks_s[number] + late_s, number))
        self._coming.sort()

    def _wait_s(self, since: float) -> float:
        return self.window.wait_s(GROUP, [self.sessions[number] for number in self._waiting], since, self.now)

    def _collect(self) -> None:
        while self._coming and self._coming[0][0] <= self.now:
            at, number = self._coming.pop(0)
            self.window.arrived(self.sessions[number], at)
            self._waiting.append(number)


@pytest.mark.parametrize("sessions", [2, 4, 8, 16])
@pytest.mark.parametrize("jitter_s", [0.0, 0.0005, 0.001])
def test_sessions_that_come_back_soon_become_one_batch_and_stay_it(sessions: int, jitter_s: float) -> None:
    """Answers on loopback and back again, by 0.4 ms one after another: without the window they would take turns."""
    thinks_s = [0.003 + 0.0004 * number for number in range(sessions)]
    simulated = Simulated(thinks_s, jitter_s=jitter_s, fixed_s=0.024, each_s=0.006)
    simulated.tokens_per_s(rounds=60)
    assert sum(simulated.sizes) / len(simulated.sizes) > 0.93 * sessions


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([1, 2, 3, 4, 8, 16]),
    st.floats(0.004, 0.2),
    st.floats(0.003, 1.0),
    st.floats(0.0, 0.25),
    st.floats(0.01, 0.3),
    st.floats(0.0, 0.5),
)
def test_where_one_batch_is_best_it_comes_near_that(
    sessions: int, fixed_s: float, each: float, thinks: float, jitter: float, spread: float
) -> None:
    """For sessions that think up to a quarter of the fixed cost of a batch, against what one batch a round gives."""
    each_s, most_s = each * fixed_s / 4, max(thinks * fixed_s, 0.0005)
    chance = random.Random(sessions)
    thinks_s = [most_s * chance.uniform(1 - spread, 1.0) for _ in range(sessions)]
    jitter_s = jitter * most_s / 3
    found = Simulated(thinks_s, jitter_s=jitter_s, fixed_s=fixed_s, each_s=each_s).tokens_per_s()
    last_s = jitter_s * sum(1 / number for number in range(1, sessions + 1))
    assert found > 0.93 * sessions / (1.015 * (fixed_s + each_s * sessions) + max(thinks_s) + last_s)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([1, 2, 3, 4, 8, 16]),
    st.floats(0.001, 0.2),
    st.floats(0.003, 2.0),
    st.floats(-3.0, 0.3),
    st.floats(0.02, 0.3),
    st.sampled_from([(1.0,), (0.5, 0.8, 1.1, 1.5), (1.0, 1.0, 10.0)]),
)
def test_it_is_never_much_worse_than_no_window(
    sessions: int, fixed_s: float, each: float, log_thinks: float, jitter: float, kinds: tuple[float, ...]
) -> None:
    """Whatever sessions think, alike or not, from 1 ms to seconds; by more than 6 % in none of thousands of cases."""
    think_s = 10**log_thinks
    thinks_s = [think_s * kinds[number % len(kinds)] for number in range(sessions)]

    def tokens_per_s(waits: bool) -> float:
        simulated = Simulated(thinks_s, jitter_s=jitter * think_s, fixed_s=fixed_s, each_s=each * fixed_s, waits=waits)
        return simulated.tokens_per_s(rounds=90)

    assert tokens_per_s(True) > 0.94 * tokens_per_s(False)


def test_sessions_far_from_each_other_are_served_at_once() -> None:
    thinks_s = [0.1 * number + 0.1 for number in range(6)]
    simulated = Simulated(thinks_s, jitter_s=0.001, fixed_s=0.005, each_s=0.001)
    simulated.tokens_per_s(rounds=60)
    assert sum(simulated.sizes) / len(simulated.sizes) < 1.2
