"""One event loop in a thread of its own: people call the library from ordinary code, the network is asynchronous."""

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Generic, TypeVar

from geopetals.errors import SwarmFailure

Result = TypeVar("Result")
_JOIN_TIMEOUT_S = 10.0
_CANCEL_TIMEOUT_S = 10.0
_CLOSING_TURNS = 10
_SIGNAL_CHECK_S = 0.5
_CLOSED = "the connection to the swarm is closed: open the model again with from_pretrained()."


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
        if self.ask_to_end():
            self._ended.wait(_CANCEL_TIMEOUT_S)

    def ask_to_end(self) -> bool:
        """Cancel the coroutine without waiting; False where it has ended."""
        if self._ended.is_set() or self._loop.is_closed():
            return False
        self._loop.call_soon_threadsafe(self._cancel_task)
        return True

    def give_up(self) -> None:
        """The loop has stopped: whoever waits hears so. Nothing where the coroutine has ended."""
        if not self._ended.is_set():
            if self._task is None:
                self._work.close()
            self._ended.set()
            self.outcome.set_exception(SwarmFailure(_CLOSED))

    def _start(self) -> None:
        self._task = self._loop.create_task(self._work)
        self._task.add_done_callback(self._finish)

    def _cancel_task(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _finish(self, task: "asyncio.Task[Result]") -> None:
        self._ended.set()
        if task.cancelled():
            self.outcome.set_exception(SwarmFailure(_CLOSED))  # or cancelled by who waits, and hears nothing of it
        elif (error := task.exception()) is not None:
            self.outcome.set_exception(error)
        else:
            self.outcome.set_result(task.result())


class Interruption:
    """Ends what one thread waits for from another: `with interruption.active(): ...` here, `interrupt()` there.

    What is called inside the block after that, or is under way, raises SwarmFailure.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # the garbage collector may close a connection in the middle of take()
        self._call: _Call[Any] | None = None
        self._is_interrupted = False

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        _interruptions.current = self
        try:
            yield
        finally:
            _interruptions.current = None

    def interrupt(self) -> None:
        """Never waits."""
        with self._lock:
            self._is_interrupted = True
            if self._call is not None:
                self._call.ask_to_end()

    def take(self, call: _Call[Any] | None) -> None:
        """The thread waits for `call` from now on."""
        with self._lock:
            self._call = call
            if call is not None and self._is_interrupted:
                call.ask_to_end()


class _Interruptions(threading.local):
    current: Interruption | None = None


_interruptions = _Interruptions()


class LoopThread:
    """Runs coroutines for other threads. `stop()` may be called from anywhere and more than once."""

    def __init__(self) -> None:
        self._loop = new_event_loop()
        self._lock = threading.RLock()  # the garbage collector may call stop() in the middle of run()
        self._calls: set[_Call[Any]] = set()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run_forever, name="geopetals-client", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The coroutine's result; Ctrl-C here, or an Interruption, cancels it there."""
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("the client's event loop cannot wait for itself")
        with self._lock:
            if self._is_stopping or self._loop.is_closed() or not self._thread.is_alive():
                work.close()
                raise SwarmFailure(_CLOSED)
            call = _Call(self._loop, work)
            self._calls.add(call)
        interruption = _interruptions.current
        if interruption is not None:
            interruption.take(call)
        try:
            return self._await(call)
        except BaseException:
            call.cancel()  # and wait: what it holds must be in order before the caller goes on
            raise
        finally:
            if interruption is not None:
                interruption.take(None)
            self._calls.discard(call)

    def call_soon(self, function: Callable[[], object]) -> None:
        """Never blocks: safe in `__del__`, whichever thread the garbage collector runs in."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function)

    def stop(self) -> None:
        with self._lock:
            if self._loop.is_closed():
                return
            if not self._is_stopping:
                self._is_stopping = True
                self._loop.call_soon_threadsafe(lambda: self._loop.create_task(self._wind_up()))
        if threading.current_thread() is not self._thread:
            self._thread.join(_JOIN_TIMEOUT_S)
            if not self._thread.is_alive():
                with contextlib.suppress(OSError):  # uvloop: a handle is still closing; it ends with the process
                    self._loop.close()

    def _await(self, call: _Call[Result]) -> Result:
        """In slices: a Ctrl-C just before the thread goes to sleep does not wake it, only its next turn sees it."""
        while True:
            try:
                return call.outcome.result(_SIGNAL_CHECK_S)
            except TimeoutError:
                if call.outcome.done():  # the work's own, or done in the meantime
                    return call.outcome.result()
                if not self._thread.is_alive():
                    call.give_up()

    def _run_forever(self) -> None:
        self._loop.run_forever()
        for call in list(self._calls):
            call.give_up()

    async def _wind_up(self) -> None:
        """Cancel what still runs, and what that begins while it ends; let it finish, stop."""
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
        for _ in range(_CLOSING_TURNS):  # transports close in later turns of the loop
            await asyncio.sleep(0)
        self._loop.stop()
