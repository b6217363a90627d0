"""When a server has how many cache slots free, from the sessions booked on it. One slot: one session in one block.

A session that waits for its start is a promise: its slots count from its start on, and nobody who comes later may delay
it. So a newcomer starts when its slots are free and stay free, however long it runs; it is not squeezed in before a
promise, because when a session ends is a prediction.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence


class Timeline:
    """Changes in ascending order of their instants: parallel lists, which Python sums and searches fastest."""

    __slots__ = ("instants", "slots")

    def __init__(self) -> None:
        self.instants: list[float] = []
        self.slots: list[int] = []

    def __iter__(self) -> Iterator[tuple[float, int]]:
        return zip(self.instants, self.slots, strict=True)

    def add(self, instant: float, slots: int) -> None:
        """Among equal instants ordered by slots, so that the same changes always give the same timeline."""
        place = bisect_left(self.instants, instant)
        while place < len(self.instants) and self.instants[place] == instant and self.slots[place] < slots:
            place += 1
        self.instants.insert(place, instant)
        self.slots.insert(place, slots)

    def remove(self, instant: float, slots: int) -> None:
        place = bisect_left(self.instants, instant)
        while place < len(self.instants) and self.instants[place] == instant:
            if self.slots[place] == slots:
                del self.instants[place], self.slots[place]
                return
            place += 1
        raise ValueError(f"{slots} slots at {instant} are not booked")

    def forget(self, until: float) -> None:
        if self.instants and self.instants[0] <= until:
            count = bisect_right(self.instants, until)
            del self.instants[:count], self.slots[:count]


class Ledger:
    """The bookings of one server."""

    __slots__ = ("booked", "ends", "slots", "starts")

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.booked = 0
        """Slots of all sessions in the ledger, running or promised."""
        self.ends = Timeline()
        self.starts = Timeline()
        """Of promises; the sessions without one have their slots already."""

    def book(self, slots: int, *, from_s: float | None, end_s: float) -> None:
        """from_s None: taken already now."""
        self.booked += slots
        self.ends.add(end_s, slots)
        if from_s is not None:
            self.starts.add(from_s, slots)

    def release(self, slots: int, *, from_s: float | None, end_s: float) -> None:
        """The opposite of book with the same arguments, also when the promised start is past."""
        self.booked -= slots
        self.ends.remove(end_s, slots)
        # What is left after forgetting starts later than what was forgotten.
        if from_s is not None and self.starts.instants and self.starts.instants[0] <= from_s:
            self.starts.remove(from_s, slots)

    def forget_starts(self, now: float) -> None:
        """Promises that have begun are like all other sessions from now on."""
        self.starts.forget(now)

    def free_from(self, blocks: int) -> list[float]:
        """For 1, 2, .., `blocks` slots: the instant from which they are free for good. -inf: always; inf: never.

        After the last promise has begun, use only falls, so those instants are found forwards from there. Before it,
        use may rise again, so they are found backwards.
        """
        if self.booked + blocks <= self.slots:
            return [-float("inf")] * blocks
        possible, last, taken = min(blocks, self.slots), 0, self.booked
        if self.starts.instants:
            last = bisect_right(self.ends.instants, self.starts.instants[-1])
            taken -= sum(self.ends.slots[:last])
        instants = self._backwards(max(min(self.slots - taken, possible), 0), last, taken)
        while len(instants) < possible:
            taken -= self.ends.slots[last]
            instants += [self.ends.instants[last]] * (min(self.slots - taken, possible) - len(instants))
            last += 1
        return instants + [float("inf")] * (blocks - possible)

    def _backwards(self, count: int, last: int, taken: int) -> list[float]:
        """free_from for 1 .. count, which are free once the last promise has begun and `taken` slots are in use."""
        found = [-float("inf")] * count
        starts, start_slots = self.starts.instants, self.starts.slots
        start, end = len(starts) - 1, last - 1
        if start < 0:
            return found
        while count and end >= 0:
            instant = self.ends.instants[end]
            # At the same instant a start is undone first: what counts is the use just before both.
            while start >= 0 and starts[start] >= instant:
                taken -= start_slots[start]
                start -= 1
            taken += self.ends.slots[end]
            end -= 1
            while count and count > self.slots - taken:
                count -= 1
                found[count] = instant
        return found

    def peak(self, start_s: float, end_s: float) -> int:
        """The most slots taken at any instant of [start_s, end_s)."""
        taken = self.booked - sum(slots for instant, slots in self.ends if instant <= start_s)
        taken -= sum(slots for instant, slots in self.starts if instant > start_s)
        changes = [(instant, -slots) for instant, slots in self.ends if start_s < instant < end_s]
        changes += [(instant, slots) for instant, slots in self.starts if start_s < instant < end_s]
        highest = taken
        for _, change in sorted(changes):
            taken += change
            highest = max(highest, taken)
        return highest


def earliest_fit(
    ledgers: Sequence[Ledger], slots: Sequence[int], *, not_before_s: float, duration_s: float, latest_s: float
) -> float:
    """The first instant from which every ledger has its slots free for the duration; latest_s is known to be one."""
    releases = {instant for ledger in ledgers for instant in ledger.ends.instants if not_before_s < instant < latest_s}
    for start_s in sorted({not_before_s} | releases):
        if all(
            ledger.peak(start_s, start_s + duration_s) + need <= ledger.slots
            for ledger, need in zip(ledgers, slots, strict=True)
        ):
            return start_s
    return latest_s
