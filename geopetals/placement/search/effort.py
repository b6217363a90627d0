"""How long a search may go on: a number of steps, or seconds of a clock that is passed in."""

from collections.abc import Callable

from geopetals.errors import UnsupportedInput

DEFAULT_STEPS = 4_000


class Effort:
    """With a number of steps the result follows from the seed; with a clock it depends on the machine too."""

    def __init__(self, *, steps: int | None, budget_s: float | None, clock: Callable[[], float] | None) -> None:
        if budget_s is not None and clock is None:
            raise UnsupportedInput("A budget in seconds needs a clock: pass one, or give a number of steps.")
        if (steps is not None and steps < 0) or (budget_s is not None and budget_s < 0):
            raise UnsupportedInput("A search cannot take less than no time: give a budget of 0 or more.")
        self.steps = 0
        self._most = DEFAULT_STEPS if steps is None and budget_s is None else steps
        self._budget_s, self._clock = budget_s, clock
        self._start_s = 0.0 if clock is None else clock()

    @property
    def late(self) -> bool:
        """Whether the seconds are over; never with a number of steps alone."""
        return (
            self._budget_s is not None and self._clock is not None and self._clock() >= self._start_s + self._budget_s
        )

    def count(self, steps: int) -> None:
        self.steps += steps

    def spent(self) -> float:
        """The share that is used up, 1 and more when it is time to stop."""
        shares = [0.0]
        if self._most is not None:
            shares.append(self.steps / self._most if self._most else 1.0)
        if self._budget_s is not None and self._clock is not None:
            shares.append((self._clock() - self._start_s) / self._budget_s if self._budget_s else 1.0)
        return max(shares)
