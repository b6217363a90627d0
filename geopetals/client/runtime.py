"""One event loop in a thread of its own: people call the library from ordinary code, the network is asynchronous."""

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from geopetals.errors import SwarmFailure

Result = TypeVar("Result")
_JOIN_TIMEOUT_S = 10.0
_CANCEL_TIMEOUT_S = 10.0
_CLOSING_TURNS = 10
_SIGNAL_CHECK_S = 0.5


def new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop where it is installed: half the cost per message."""
    try:
        import uvloop
    except ModuleNotFoundError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


class _Call(Generic[Result]):
    """A coroutine on the loop's thread, and its outcome for the thread that waits."""

    def __init__(self, loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Result]) -> None:
        self.outcome: concurrent.futures.Future[Result] = concurrent.futures.Future()
        self._loop, self._work = loop, work
        self._task: asyncio.Task[Result] | None = None
        self._ended = threading.Event()
        loop.call_soon_threadsafe(self._start)

    def cancel(self) -> None:
        """Cancel the coroutine and wait until it has ended; nothing where it has."""
        if not self._ended.is_set() and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._cancel_task)
            self._ended.wait(_CANCEL_TIMEOUT_S)

    def _start(self) -> None:
        self._task = self._loop.create_task(self._work)
        self._task.add_done_callback(self._finish)

    def _cancel_task(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _finish(self, task: "asyncio.Task[Result]") -> None:
        self._ended.set()
        if task.cancelled():
            self.outcome.cancel()
        elif (error := task.exception()) is not None:
            self.outcome.set_exception(error)
        else:
            self.outcome.set_result(task.result())


def _await_outcome(outcome: "concurrent.futures.Future[Result]") -> Result:
    """In slices: a Ctrl-C just before the thread goes to sleep does not wake it, only its next turn sees it."""
    while True:
        try:
            return outcome.result(_SIGNAL_CHECK_S)
        except TimeoutError:
            if outcome.done():  # the work's own, or done in the meantime
                return outcome.result()


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
        call = _Call(self._loop, work)
        try:
            return _await_outcome(call.outcome)
        except BaseException:
            call.cancel()  # and wait: what it holds must be in order before the caller goes on
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
