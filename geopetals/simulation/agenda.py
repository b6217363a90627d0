"""What is going to happen, in the order of time."""

import heapq
from dataclasses import dataclass
from enum import IntEnum

from geopetals.simulation.running import Running


class Kind(IntEnum):
    """In the order in which they happen at the same instant."""

    DOWN = 0
    UP = 1
    OVERDUE = 2
    START = 3
    RETRY = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Outage:
    """A server that goes (`down`) or comes."""

    at_s: float
    server: int
    down: bool


class Agenda:
    """Events of sessions are void once the session has another version."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, int, Running | Outage, int]] = []
        self._sequence = 0

    def next_s(self) -> float:
        """inf if nothing is left."""
        return self._heap[0][0] if self._heap else float("inf")

    def add(self, at_s: float, kind: Kind, running: Running) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, (at_s, kind, self._sequence, running, running.version))

    def add_outage(self, outage: Outage) -> None:
        self._sequence += 1
        kind = Kind.DOWN if outage.down else Kind.UP
        heapq.heappush(self._heap, (outage.at_s, kind, self._sequence, outage, 0))

    def pop(self) -> tuple[int, Running | Outage] | None:
        """The next event; None if it is void."""
        _, kind, _, what, version = heapq.heappop(self._heap)
        return (kind, what) if isinstance(what, Outage) or what.version == version else None
