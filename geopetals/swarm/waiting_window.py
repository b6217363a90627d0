"""Whether a decode batch that could start now waits a little for sessions that are about to send their next step.

Two groups of sessions that take turns pay the fixed cost of a forward pass twice per token; as one batch they pay it
once. The window is at most 20 ms, or a quarter of what the batch takes if that is longer. It is used only where the
sessions expected within it win more by being in this batch than those that wait lose. A session that is alone, or whose
neighbours think longer than that, never waits.
"""

from collections.abc import Hashable, Iterable
from weakref import WeakKeyDictionary

LONGEST_S = 0.020
_SHARE_OF_BATCH = 0.25
_FIRST_GUESS_S = 0.005  # from the first to the last answer of a batch that comes back
_MEMORY = 0.3  # weight of the newest observation
_FORGET = 0.98  # of older batches, for their cost


class BatchCost:
    """Seconds of a batch of `size` sessions: a fixed part and a part for each, fitted to what was seen lately.

    Before batches of different sizes were seen half of the cost is taken to be fixed.
    """

    def __init__(self) -> None:
        self._n = self._x = self._xx = self._y = self._xy = 0.0

    def note(self, size: int, seconds: float) -> None:
        for name, value in (("_n", 1.0), ("_x", size), ("_xx", size * size), ("_y", seconds), ("_xy", size * seconds)):
            setattr(self, name, getattr(self, name) * _FORGET + value)

    def estimate(self, size: int) -> tuple[float, float]:
        """Seconds of a batch of `size`, and of each session more. Zeros if no batch was seen yet."""
        if self._n == 0:
            return 0.0, 0.0
        mean_x, mean_y = self._x / self._n, self._y / self._n
        spread = self._xx / self._n - mean_x * mean_x
        slope = 0.5 * mean_y / mean_x
        if spread > 0.01 * mean_x * mean_x:
            slope = (self._xy / self._n - mean_x * mean_y) / spread
        slope = min(max(slope, 0.0), mean_y / mean_x)
        return max(mean_y + slope * (size - mean_x), 0.0), slope


class _Delay:
    """A duration that is seen again and again: mean and mean deviation in seconds."""

    def __init__(self, guess_s: float | None = None) -> None:
        self._mean_s = guess_s
        self._deviation_s = 0.0

    def note(self, seconds: float) -> None:
        mean_s = seconds if self._mean_s is None else self._mean_s
        self._deviation_s += _MEMORY * (abs(seconds - mean_s) - self._deviation_s)
        self._mean_s = mean_s + _MEMORY * (seconds - mean_s)

    @property
    def by_then_s(self) -> float | None:
        return None if self._mean_s is None else self._mean_s + self._deviation_s


class _Cohort:
    """Sessions that were answered together. What delays one of them on its way delays all."""

    def __init__(self, group: Hashable, answered_at: float) -> None:
        self.group, self.answered_at = group, answered_at
        self.first_back_at: float | None = None


class _Pace:
    """When a session comes back: so long after its answer, and so long after the first of its cohort."""

    def __init__(self) -> None:
        self.cohort: _Cohort | None = None
        self._after_answer, self._after_first = _Delay(), _Delay(_FIRST_GUESS_S)

    def came(self, now: float) -> None:
        cohort, self.cohort = self.cohort, None
        if cohort is None:
            return
        if cohort.first_back_at is None:
            cohort.first_back_at = now
        self._after_answer.note(now - cohort.answered_at)
        self._after_first.note(now - cohort.first_back_at)

    def expected_at(self, group: Hashable) -> float | None:
        """None if it is not away, or for other blocks, or if nothing is known of it."""
        if self.cohort is None or self.cohort.group != group:
            return None
        began, delay = self.cohort.first_back_at, self._after_first
        if began is None:
            began, delay = self.cohort.answered_at, self._after_answer
        return None if delay.by_then_s is None else began + delay.by_then_s


class WaitingWindow:
    """Times are in seconds of one clock, which the caller reads. Sessions are forgotten when nobody holds them."""

    def __init__(self) -> None:
        self.cost = BatchCost()
        self._paces: WeakKeyDictionary[object, _Pace] = WeakKeyDictionary()

    def arrived(self, session: object, now: float) -> None:
        """Steps must be told in the order of their arrival."""
        pace = self._paces.get(session)
        if pace is not None:
            pace.came(now)

    def answered(self, sessions: Iterable[object], group: Hashable, now: float) -> None:
        """These sessions were one batch."""
        cohort = _Cohort(group, now)
        for session in sessions:
            self._paces.setdefault(session, _Pace()).cohort = cohort

    def wait_s(self, group: Hashable, waiting: int, since: float, now: float) -> float:
        """How long `waiting` sessions of a group, the first of which could have begun at `since`, should wait."""
        latest = since + max(LONGEST_S, _SHARE_OF_BATCH * self.cost.estimate(waiting)[0])
        moments = (pace.expected_at(group) for pace in self._paces.values())
        return worth_waiting_s(
            self.cost, waiting, (at - now for at in moments if at is not None and now < at <= latest)
        )


def worth_waiting_s(cost: BatchCost, waiting: int, expected: Iterable[float]) -> float:
    """The wait, in seconds, that saves the most time summed over sessions; 0 if none saves any.

    Those `expected` in so many seconds would have to wait for the end of this batch, which takes longer with them.
    """
    batch_s, each_s = cost.estimate(waiting)
    best_gain, best_s = 0.0, 0.0
    for number, moment in enumerate(sorted(expected), start=1):
        gain = number * (batch_s - moment) - waiting * (moment + number * each_s)
        if gain > best_gain:
            best_gain, best_s = gain, moment
    return best_s
