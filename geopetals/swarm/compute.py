"""The one thread that computes: the event loop stays free, the device sees one piece of work at a time."""

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Callable
from enum import IntEnum
from typing import TypeVar

Result = TypeVar("Result")
Job = Callable[[], None]


class Priority(IntEnum):
    """Who goes first when several wait. Decode steps are short and people wait for them.

    BRIEF is for what takes next to no time, as getting memory for a new session.
    """

    BRIEF = 0
    INFERENCE = 1
    PREFILL = 2
    BATCH = 3


# So many jobs of other kinds, but for brief ones, may go before one that waits: nobody starves. A decode batch runs
# between two pieces of a prefill, and a piece of a prefill between two decode batches.
_PATIENCE = {Priority.PREFILL: 1, Priority.BATCH: 8}


class ComputeThread:
    """Runs functions one after another, in order of priority and arrival.

    A job whose waiter is cancelled before it starts is dropped; one that runs is finished and its result discarded.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._inbox: queue.SimpleQueue[tuple[Priority, Job] | None] = queue.SimpleQueue()
        self._waiting: dict[Priority, deque[Job]] = {priority: deque() for priority in Priority}
        self._passed_over = dict.fromkeys(Priority, 0)
        self._thread = threading.Thread(target=self._work, name="geopetals-compute", daemon=True)
        self._thread.start()

    async def run(self, function: Callable[[], Result], priority: Priority = Priority.BRIEF) -> Result:
        """The function's result; its exception is raised here."""
        future: asyncio.Future[Result] = self._loop.create_future()

        def job() -> None:
            if future.cancelled():
                return
            outcome = attempt(function)
            self.tell_loop(lambda: settle(future, outcome))

        self.submit(job, priority)
        return await future

    def submit(self, job: Job, priority: Priority) -> None:
        """Run `job`, which must not raise, when its turn comes."""
        self._inbox.put((priority, job))

    def others_wait(self, priority: Priority) -> bool:
        """Whether jobs of other kinds were waiting when the one that runs began; for that one to ask."""
        return any(jobs for other, jobs in self._waiting.items() if other is not priority)

    def tell_loop(self, function: Callable[[], object]) -> None:
        """Call `function` on the event loop; nothing if that is gone."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function)

    def stop(self) -> None:
        """End the thread after the job that runs now; waiting jobs are dropped."""
        self._inbox.put(None)

    def join(self, timeout_s: float) -> bool:
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while self._collect():
            priority = self._whose_turn()
            if priority is not Priority.BRIEF:
                for other in self._passed_over:
                    self._passed_over[other] += 1
            self._passed_over[priority] = 0
            self._waiting[priority].popleft()()

    def _collect(self) -> bool:
        """Put what has come in line, waiting if the line is empty; False when the thread is to end."""
        while not any(self._waiting.values()) or not self._inbox.empty():
            arrived = self._inbox.get()
            if arrived is None:
                return False
            priority, job = arrived
            if not self._waiting[priority]:
                self._passed_over[priority] = 0
            self._waiting[priority].append(job)
        return True

    def _whose_turn(self) -> Priority:
        if self._waiting[Priority.BRIEF]:
            return Priority.BRIEF
        for priority, patience in _PATIENCE.items():
            if self._waiting[priority] and self._passed_over[priority] >= patience:
                return priority
        return next(priority for priority in Priority if self._waiting[priority])


def attempt(function: Callable[[], Result]) -> Result | BaseException:
    """Its result or its exception, which belongs to whoever waits and never to the compute thread."""
    try:
        return function()
    except BaseException as error:  # noqa: BLE001
        return error


def settle(future: asyncio.Future[Result], outcome: Result | BaseException) -> None:
    """On the event loop."""
    if future.cancelled():
        return
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
