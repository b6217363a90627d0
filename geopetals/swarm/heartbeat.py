"""Who is still there: keep-alive messages from the event loop, and the silence of those who should send them.

Computing has its own thread, so that a step of any length delays no message. Silence is counted in ticks of the
listener's own clock: time in which the listener itself did not run (a pause of the process, a laptop asleep) is
nobody's silence, since what was sent meanwhile is still to be read.
"""

import asyncio
import time
from collections.abc import Callable

TICK_S = 0.1
HEARTBEAT_S = 0.5
SERVER_SILENCE_S = 1.75
"""A client calls a server gone after this: noticed within 2 s, and 1.2 s late is not too late for a message."""
LINK_SILENCE_S = 1.75
"""The same between two servers."""
CLIENT_BEAT_S = 2.0
CLIENT_SILENCE_S = 8.0
"""A server calls a client gone after this, and frees its cache."""


class Silence:
    """How long nothing was heard."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self.seconds = 0.0

    def heard(self) -> None:
        self.seconds = 0.0

    def lasts(self, seconds: float) -> bool:
        """Another tick in silence; True when that makes it too long."""
        self.seconds += seconds
        return self.seconds >= self.limit_s


class Every:
    """Due once in `period_s` of ticks, and at the first one."""

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._left_s = 0.0

    def is_due(self, seconds: float) -> bool:
        self._left_s -= seconds
        if self._left_s > 0:
            return False
        self._left_s = self._period_s
        return True


async def tick(on_tick: Callable[[float], object]) -> None:
    """Call `on_tick` every TICK_S with the seconds since the last time, at most two ticks. Runs until cancelled."""
    last = time.monotonic()
    while True:
        await asyncio.sleep(TICK_S)
        now = time.monotonic()
        on_tick(min(now - last, 2 * TICK_S))
        last = now
