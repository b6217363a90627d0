"""How much later than planned packets were handed on: what decides whether a run can be trusted."""

from collections.abc import Iterator
from typing import Any

_BIN_S = 10e-6
_BINS = 2000
_SHOWN_S = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02)


class Lateness:
    """A histogram of 10 us per bin up to 20 ms."""

    __slots__ = ("_counts", "count", "most_s", "total_s")

    def __init__(self) -> None:
        self._counts = [0] * (_BINS + 1)
        self.count = 0
        self.total_s = 0.0
        self.most_s = 0.0

    def add(self, late_s: float) -> None:
        late_s = max(late_s, 0.0)
        self._counts[min(int(late_s / _BIN_S), _BINS)] += 1
        self.count += 1
        self.total_s += late_s
        self.most_s = max(self.most_s, late_s)

    def quantile_s(self, share: float) -> float:
        """An upper bound, to 10 us, of what this share of the packets did not exceed; the most for those over 20 ms."""
        wanted, seen = share * self.count, 0
        for index, count in enumerate(self._counts[:_BINS]):
            seen += count
            if seen >= wanted and seen:
                return min(round((index + 1) * _BIN_S, 6), self.most_s)
        return self.most_s

    def to_value(self) -> dict[str, Any]:
        return {
            "packets": self.count,
            "mean_s": self.total_s / self.count if self.count else 0.0,
            **{f"p{round(share * 100)}_s": self.quantile_s(share) for share in (0.5, 0.9, 0.99)},
            "max_s": self.most_s,
            "histogram": dict(self._histogram()),
        }

    def _histogram(self) -> Iterator[tuple[str, int]]:
        """Packets by upper bound in ms."""
        below = 0
        for bound_s in _SHOWN_S:
            upto = round(bound_s / _BIN_S)
            yield f"{bound_s * 1000:g}", sum(self._counts[below:upto])
            below = upto
        yield "more", self._counts[_BINS]
