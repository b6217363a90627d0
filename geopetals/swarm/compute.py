"""The one thread that computes: the event loop stays free, the device sees one piece of work at a time."""

import asyncio
import itertools
import queue
import threading
from collections.abc import Callable
from enum import IntEnum
from typing import Any, TypeVar

Result = TypeVar("Result")


class Priority(IntEnum):
    """Who goes first when several wait. Decode steps are short and people wait for them."""

    STOP = -1
    INFERENCE = 0
    BATCH = 1


class ComputeThread:
    """Runs functions one after another, in order of priority and arrival.

    A job whose waiter is cancelled before it starts is dropped; one that runs is finished and its result discarded.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._jobs: queue.PriorityQueue[tuple[int, int, Callable[[], Any] | None, asyncio.Future[Any] | None]]
        self._jobs = queue.PriorityQueue()
        self._order = itertools.count()
        self._thread = threading.Thread(target=self._work, name="geopetals-compute", daemon=True)
        self._thread.start()

    async def run(self, function: Callable[[], Result], priority: Priority = Priority.INFERENCE) -> Result:
        """The function's result; its exception is raised here."""
        future: asyncio.Future[Result] = self._loop.create_future()
        self._jobs.put((priority, next(self._order), function, future))
        return await future

    def stop(self) -> None:
        """End the thread after the job that runs now; waiting jobs are dropped."""
        self._jobs.put((Priority.STOP, next(self._order), None, None))

    def join(self, timeout_s: float) -> bool:
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while True:
            _, _, function, future = self._jobs.get()
            if function is None or future is None:
                return
            if future.cancelled():
                continue
            try:
                result = function()
            except BaseException as error:  # noqa: BLE001 - it belongs to the waiter, never to this thread
                self._answer(future, None, error)
            else:
                self._answer(future, result, None)

    def _answer(self, future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
        def settle() -> None:
            if future.cancelled():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(settle)
