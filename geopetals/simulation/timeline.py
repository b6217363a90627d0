"""Simulated time: what is due first happens, and then it is as late as that."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Source:
    """Where things that happen come from."""

    next_s: Callable[[], float]
    """When the next one is due; inf: there is none."""
    happen: Callable[[], None]
    """Let it happen."""


class Timeline:
    """Sources stand in the order in which they come at equal times. Time does not run backwards."""

    def __init__(self, *sources: Source) -> None:
        self._sources = sources
        self.now = 0.0

    def advance(self, until_s: float = float("inf")) -> bool:
        """To the next thing, and let it happen. False: there is none before `until_s`, and it is that late."""
        first, first_s = None, float("inf")
        for source in self._sources:
            next_s = source.next_s()
            if next_s < first_s:
                first, first_s = source, next_s
        if first is None or first_s > until_s:
            self.now = min(until_s, first_s)
            return False
        self.now = max(self.now, first_s)
        first.happen()
        return True
