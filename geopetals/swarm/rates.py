"""How fast peers' large messages come in: a view of bandwidth that costs nothing, since they are sent in any case.

Prompts go from the client to the first server and on from server to server in frames of up to a megabyte. The time from
a frame's header to its end is what the way takes for the bytes in between. Frames that were waited for count alone: of
others some part may have been here already. What the sockets on this machine hold is left out, and of the last frames
the median counts: one that was held up says too little, one that was read late too much.
"""

import time
from collections import deque
from collections.abc import Callable
from statistics import median

from geopetals.coordinator.messages import RateSample

LARGE_BYTES = 2**18
_BUFFERED_BYTES = 2**17
"""As much may have come together with the header."""
_LEAST_WAIT_S = 0.0005
_KEPT, _KEPT_S = 9, 600.0
_MOST_PEERS = 256


class Rates:
    """By the peer that sends. Only of the last minutes, and of so many peers."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._frames: dict[str, deque[tuple[float, float]]] = {}

    def note(self, peer: str, size: int, *, waited_s: float, took_s: float) -> None:
        """A frame of so many bytes has come: its header after `waited_s`, all of it `took_s` later."""
        if size < LARGE_BYTES or waited_s < _LEAST_WAIT_S or took_s <= 0:
            return
        frames = self._frames.pop(peer, None) or deque(maxlen=_KEPT)
        frames.append((self._clock(), (size - _BUFFERED_BYTES) / took_s))
        self._frames[peer] = frames
        while len(self._frames) > _MOST_PEERS:
            del self._frames[next(iter(self._frames))]

    def samples(self) -> tuple[RateSample, ...]:
        now = self._clock()
        found = {peer: [rate for at, rate in frames if now - at < _KEPT_S] for peer, frames in self._frames.items()}
        return tuple(RateSample(peer, median(rates)) for peer, rates in found.items() if rates)
