"""Whether a decode batch that could start now waits a little for sessions that are about to send their next step.

Two groups of sessions that take turns pay the fixed cost of a forward pass twice per token; as one batch they pay it
once, but while they think the device is idle. With c(n) seconds for a batch of n sessions, m of them now and the r that
would have to wait for its end afterwards, and t the longest that sessions of either think, a token takes

    m sessions     max(c(m) + t_m, c(m) + c(r))    if there are two batches, in turns
    r sessions     max(c(r) + t_r, c(m) + c(r))
    all            c(m + r) + t                    if there is one

The window is used where that makes more tokens per second. It is at most 20 ms, or half of what the larger batch takes
if that is longer, and no longer than what one batch instead of two saves. A session that is alone, or whose neighbours
think longer than a batch takes, never waits.
"""

from collections.abc import Hashable, Iterable, Sequence
from itertools import accumulate
from weakref import WeakKeyDictionary

from geopetals.swarm.batch_cost import BatchCost

LONGEST_S = 0.020
_SHARE_OF_BATCH = 0.5
_MEMORY = 0.3  # weight of the newest observation
_LEAST_PATIENCE_S = 0.001
_LATE = 4.0  # deviations after which a session is no longer waited for
_LEAST_S = 1e-9
_WORTH = 1.05  # what is known is not known better


class _Pace:
    """How long a session thinks between an answer and its next step: mean and mean deviation, in seconds."""

    def __init__(self) -> None:
        self.group: Hashable = None
        self._answered_at: float | None = None
        self._mean_s: float | None = None
        self._deviation_s = 0.0

    def answered(self, group: Hashable, now: float) -> None:
        self.group, self._answered_at = group, now

    def came(self, now: float) -> None:
        if self._answered_at is None:
            return
        thought_s, self._answered_at = now - self._answered_at, None
        mean_s = thought_s if self._mean_s is None else self._mean_s
        self._deviation_s += _MEMORY * (abs(thought_s - mean_s) - self._deviation_s)
        self._mean_s = mean_s + _MEMORY * (thought_s - mean_s)

    @property
    def thinks_s(self) -> float:
        return self._mean_s or 0.0

    def expected_at(self, now: float) -> float | None:
        """When it is back, most likely; None if it is not away, if nothing is known of it, or if it is very late."""
        if self._answered_at is None or self._mean_s is None:
            return None
        patience_s = max(_LATE * self._deviation_s, _LEAST_PATIENCE_S)
        latest = self._answered_at + self._mean_s + patience_s
        if now >= latest:
            return None
        at = self._answered_at + self._mean_s + self._deviation_s
        return at if at > now else latest


class WaitingWindow:
    """Times are in seconds of one clock, which the caller reads. Sessions are forgotten when nobody holds them."""

    def __init__(self) -> None:
        self.cost = BatchCost()
        self._paces: WeakKeyDictionary[object, _Pace] = WeakKeyDictionary()

    def arrived(self, session: object, now: float) -> None:
        pace = self._paces.get(session)
        if pace is not None:
            pace.came(now)

    def answered(self, sessions: Iterable[object], group: Hashable, now: float) -> None:
        """These sessions were one batch."""
        for session in sessions:
            self._paces.setdefault(session, _Pace()).answered(group, now)

    def wait_s(self, group: Hashable, waiting: Sequence[object], since: float, now: float) -> float:
        """How long these sessions of a group, the first of which could have begun at `since`, should wait yet."""
        batch_s = self.cost.seconds(len(waiting))
        away = [
            (at - now, pace.thinks_s)
            for pace in self._paces.values()
            if pace.group == group and (at := pace.expected_at(now)) is not None and at < now + batch_s
        ]
        if not away:
            return 0.0
        thinking = max((pace.thinks_s for session in waiting if (pace := self._paces.get(session))), default=0.0)
        return worth_waiting_s(self.cost, len(waiting), thinking, away, waited_s=now - since)


def worth_waiting_s(
    cost: BatchCost,
    waiting: int,
    thinks_s: float,
    away: Iterable[tuple[float, float]],
    *,
    waited_s: float = 0.0,
) -> float:
    """The wait, in seconds, that makes the most tokens per second; 0 if none makes more, or not within the window.

    Those `away` are back in so many seconds, the first of the pair, and think so long, the second.
    """
    coming = sorted(away)
    # The longest that those from the n-th on think.
    later_think_s = [*accumulate((thought_s for _, thought_s in reversed(coming)), max)][::-1]
    later_think_s.append(0.0)
    best_s, best_rate = 0.0, _WORTH * _rate(cost, waiting, thinks_s, len(coming), later_think_s[0])
    for number, (moment, thought_s) in enumerate(coming, start=1):
        thinks_s = max(thinks_s, thought_s)
        size = waiting + number
        saves_s = cost.seconds(waiting) + cost.seconds(number) - cost.seconds(size)
        if waited_s + moment > min(saves_s, max(LONGEST_S, _SHARE_OF_BATCH * cost.seconds(size))):
            continue
        rate = _rate(cost, size, thinks_s, len(coming) - number, later_think_s[number])
        if rate > best_rate:
            best_s, best_rate = moment, rate
    return best_s


def _rate(cost: BatchCost, size: int, thinks_s: float, others: int, others_think_s: float) -> float:
    """Tokens per second if so many sessions are one batch, and the `others` one between such batches."""
    batch_s, others_s = cost.seconds(size), cost.seconds(others)
    if not others:
        return size / max(batch_s + thinks_s, _LEAST_S)
    turn_s = max(batch_s + others_s, _LEAST_S)
    return size / max(turn_s, batch_s + thinks_s) + others / max(turn_s, others_s + others_think_s)
