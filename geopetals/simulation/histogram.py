"""Percentiles of many durations without keeping them: counts in classes of equal ratio."""

import math

import numpy as np

from geopetals.problem import Floats

_PER_FACTOR = 100
"""Classes per factor e: percentiles are right to half a percent."""
_SMALLEST_S = 1e-7
_CLASSES = 33 * _PER_FACTOR
_AT_ONCE = 1 << 13


class Histogram:
    """From 0.1 us to a year; shorter and longer ones count in the outermost classes."""

    def __init__(self) -> None:
        self._counts = np.zeros(_CLASSES)
        self._waiting = np.empty((2, _AT_ONCE))
        """Durations and weights that are not counted yet: many at once are sooner put into their classes."""
        self._waits = 0

    @property
    def counts(self) -> Floats:
        """(classes,)"""
        self._count()
        return self._counts

    def add(self, duration_s: float, weight: float = 1.0) -> None:
        place = int(math.log(max(duration_s, _SMALLEST_S) / _SMALLEST_S) * _PER_FACTOR)
        self._counts[min(place, _CLASSES - 1)] += weight

    def add_many(self, durations_s: Floats, weights: Floats) -> None:
        """(N,) each."""
        for low in range(0, durations_s.size, _AT_ONCE):
            part = durations_s[low : low + _AT_ONCE]
            if self._waits + part.size > _AT_ONCE:
                self._count()
            here = slice(self._waits, self._waits + part.size)
            self._waiting[0, here], self._waiting[1, here] = part, weights[low : low + _AT_ONCE]
            self._waits = here.stop

    def values_s(self) -> Floats:
        """(classes,): the middle of each."""
        return np.asarray(_SMALLEST_S * np.exp((np.arange(_CLASSES) + 0.5) / _PER_FACTOR))

    def _count(self) -> None:
        durations_s, weights = self._waiting[:, : self._waits]
        places = np.log(np.maximum(durations_s, _SMALLEST_S) / _SMALLEST_S) * _PER_FACTOR
        self._counts += np.bincount(np.minimum(places.astype(np.int64), _CLASSES - 1), weights, minlength=_CLASSES)
        self._waits = 0
