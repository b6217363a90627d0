"""HTTP connections that ask nothing, or do not read what they asked for, end: they must not keep others out."""

import asyncio
import time

from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_S = 10.0
"""A request's headers are there so long after the connection began, or after the answer before."""
STALLED_S = 30.0
"""Whoever reads nothing of an answer for so long is gone."""
MAX_CONNECTIONS = 256
_LOOK_S = 1.0


class GuardedProtocol(H11Protocol):
    """One connection. If there are too many, the one that has been idle for longest makes room for a new one."""

    idle_since = 0.0
    """When it began to ask for nothing; meaningless while a request is answered."""
    _stalled_s = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.idle_since = time.monotonic()
        if len(self.connections) > MAX_CONNECTIONS:
            self._make_room()
        self.loop.call_later(_LOOK_S, self._look)

    @property
    def is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def on_response_complete(self) -> None:
        self.idle_since = time.monotonic()
        super().on_response_complete()

    def _make_room(self) -> None:
        idle = [each for each in self.connections if isinstance(each, GuardedProtocol) and each.is_idle]
        longest = min(idle, key=lambda each: each.idle_since, default=self)
        longest.transport.abort()

    def _look(self) -> None:
        if self.transport.is_closing():
            return
        self._stalled_s = self._stalled_s + _LOOK_S if self.flow.write_paused else 0.0
        waited_s = time.monotonic() - self.idle_since if self.is_idle else 0.0
        if waited_s > REQUEST_S or self._stalled_s > STALLED_S:
            self.transport.abort()
            return
        self.loop.call_later(_LOOK_S, self._look)
