"""The caches that sessions really hold, whatever was promised; and how well they were used."""

from collections.abc import Iterable

import numpy as np

from geopetals.plan import Chain
from geopetals.problem import Floats, Ints


class Memory:
    """Cache slots of the servers. Times are the simulation's; `since_s` is from when use is measured."""

    def __init__(self, slots: Iterable[int]) -> None:
        self.slots = [int(count) for count in slots]
        self.used = [0] * len(self.slots)
        self._slot_s = np.zeros(len(self.slots))
        self._window = (0.0, float("inf"))

    def measure(self, start_s: float, end_s: float) -> None:
        """Use counts between these instants."""
        self._window = (start_s, end_s)

    def fits(self, chain: Chain, slots_per_block: int) -> bool:
        return all(self.used[hop.server] + hop.blocks * slots_per_block <= self.slots[hop.server] for hop in chain)

    def take(self, chain: Chain, slots_per_block: int) -> None:
        """Raises ValueError if they do not fit: the simulator never lets that happen."""
        if not self.fits(chain, slots_per_block):
            raise ValueError(f"{chain} does not fit")
        for hop in chain:
            self.used[hop.server] += hop.blocks * slots_per_block

    def release(self, chain: Chain, slots_per_block: int, *, since_s: float, now: float) -> None:
        low, high = self._window
        held_s = max(min(now, high) - max(since_s, low), 0.0)
        for hop in chain:
            self.used[hop.server] -= hop.blocks * slots_per_block
            self._slot_s[hop.server] += hop.blocks * slots_per_block * held_s

    def use(self) -> Floats:
        """(J,): share of the caches that was held in the measured time, by sessions that are over."""
        low, high = self._window
        capacity: Ints = np.array(self.slots)
        return np.asarray(self._slot_s / np.maximum(capacity * max(high - low, 1e-12), 1e-12))
