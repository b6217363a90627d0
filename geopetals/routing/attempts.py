"""Searches that are fast when they find something, and otherwise lost time before the one that always does."""

from collections.abc import Callable

Found = tuple[float, list[int]]
"""The least cost, and its arcs."""

_LONGEST_PAUSE = 16
"""Decisions that do without a search which found nothing again and again."""


class Attempts:
    """After one that finds nothing, the search is left out the next time, after another twice, then four times, .."""

    def __init__(self) -> None:
        self._left, self._pause = 0, 1

    def search(self, attempt: Callable[[], Found | None]) -> Found | None:
        if self._left:
            self._left -= 1
            return None
        found = attempt()
        self._left = 0 if found else self._pause
        self._pause = 1 if found else min(2 * self._pause, _LONGEST_PAUSE)
        return found
