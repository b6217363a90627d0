"""One event loop in a thread of its own: people call the library from ordinary code, the network is asynchronous."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from geopetals.errors import SwarmFailure

Result = TypeVar("Result")
_JOIN_TIMEOUT_S = 10.0
_CLOSING_TURNS = 10


def new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop where it is installed: half the cost per message."""
    try:
        import uvloop
    except ModuleNotFoundError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


class LoopThread:
    """Runs coroutines for other threads. `stop()` may be called from anywhere and more than once."""

    def __init__(self) -> None:
        self._loop = new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="geopetals-client", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The coroutine's result; Ctrl-C here cancels it there."""
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("the client's event loop cannot wait for itself")
        if self._loop.is_closed() or not self._thread.is_alive():
            work.close()
            raise SwarmFailure("the connection to the swarm is closed: open the model again with from_pretrained().")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def call_soon(self, function: Callable[[], object]) -> None:
        """Never blocks: safe in `__del__`, whichever thread the garbage collector runs in."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function)

    def stop(self) -> None:
        if self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(lambda: self._loop.create_task(self._wind_up()))
        if threading.current_thread() is not self._thread:
            self._thread.join(_JOIN_TIMEOUT_S)
            if not self._thread.is_alive():
                with contextlib.suppress(OSError):  # uvloop: a handle is still closing; it ends with the process
                    self._loop.close()

    async def _wind_up(self) -> None:
        """Cancel what still runs, let it finish, stop."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for _ in range(_CLOSING_TURNS):  # transports close in later turns of the loop
            await asyncio.sleep(0)
        self._loop.stop()
