"""What a decode batch of so many sessions takes, from what batches took lately."""

from collections import deque

_KEPT = 5
_VALID_BATCHES = 256
_FORGET = 0.98  # of older batches, for the slope


class BatchCost:
    """Seconds of a batch by its number of sessions.

    Batches of a size take the median of the last five, so that a hiccup does not count: kernels make it anything but a
    straight line. Sizes that were not seen lately are guessed from the nearest one that was, by a line through all;
    before different sizes were seen, all but a tenth of the cost is taken to be fixed, so that larger batches are
    tried. What is old is forgotten, and tried again.
    """

    def __init__(self) -> None:
        self._n = self._x = self._xx = self._y = self._xy = 0.0
        self._batches = 0
        self._seen: dict[int, deque[float]] = {}
        self._last: dict[int, int] = {}
        self._known: dict[int, float] = {}

    def note(self, size: int, seconds: float) -> None:
        self._batches += 1
        self._last[size] = self._batches
        self._seen.setdefault(size, deque(maxlen=_KEPT)).append(seconds)
        for old in [other for other, last in self._last.items() if self._batches - last > _VALID_BATCHES]:
            del self._last[old], self._seen[old]
        typical = self._typical(size)
        for name, value in (("_n", 1.0), ("_x", size), ("_xx", size * size), ("_y", typical), ("_xy", size * typical)):
            setattr(self, name, getattr(self, name) * _FORGET + value)
        self._known = {}

    def seconds(self, size: int) -> float:
        """Of a batch of that size; 0 for none at all, and before any batch was seen."""
        if size not in self._known:
            self._known[size] = self._estimate(size)
        return self._known[size]

    def _estimate(self, size: int) -> float:
        if size <= 0 or not self._seen:
            return 0.0
        if size in self._seen:
            return self._typical(size)
        nearest = min(self._seen, key=lambda other: (abs(other - size), other))
        known_s = self._typical(nearest)
        return max(known_s + self._slope() * (size - nearest), known_s * min(size / nearest, 1.0))

    def _typical(self, size: int) -> float:
        seen = sorted(self._seen[size])
        return seen[(len(seen) - 1) // 2]

    def _slope(self) -> float:
        mean_x, mean_y = self._x / self._n, self._y / self._n
        spread = self._xx / self._n - mean_x * mean_x
        slope = 0.1 * mean_y / mean_x
        if spread > 0.01 * mean_x * mean_x:
            slope = (self._xy / self._n - mean_x * mean_y) / spread
        return min(max(slope, 0.0), mean_y / mean_x)
