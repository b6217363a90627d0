"""The HTTP server as a gateway needs it: it waits for nobody for ever, and ends in time with a word to all readers."""

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

_REQUEST_TIMEOUT_S = 30.0
"""For the head of a request; the body has a limit of its own."""
_READER_TIMEOUT_S = 60.0
"""A reader who takes nothing for so long is given up: its session holds cache that others wait for."""
_GRACE_S = 4.0
_SHUTDOWN_S = 10.0


class PatientProtocol(H11Protocol):
    """Closes connections on which no whole head of a request comes in time, and those whose reader stands still."""

    request_timeout_s = _REQUEST_TIMEOUT_S
    reader_timeout_s = _READER_TIMEOUT_S
    _patience: asyncio.TimerHandle | None = None
    _full: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_request()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait_for_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._stop_insisting()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Buffers are full. What waits in them would keep a connection that is only closed."""
        super().pause_writing()
        self._full = self.loop.call_later(self.reader_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_insisting()

    def _stop_insisting(self) -> None:
        if self._full is not None:
            self._full.cancel()
            self._full = None

    def _wait_for_request(self) -> None:
        if self.conn.their_state.__name__ != "IDLE":  # in the middle of a request, or of an answer
            self._stop_waiting()
        elif self._patience is None:
            self._patience = self.loop.call_later(self.request_timeout_s, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None


class Server(uvicorn.Server):
    """`give_up` is called when answers that are under way at the end have had their time."""

    def __init__(self, app: Any, give_up: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=PatientProtocol,
                log_config=None,
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=int(_SHUTDOWN_S),
            )
        )
        self._give_up = give_up

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        later = asyncio.get_running_loop().call_later(_GRACE_S, self._give_up)
        try:
            await super().shutdown(sockets)
        finally:
            later.cancel()
