import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from geopetals.swarm.compute import ComputeThread, Priority

DEADLINE_S = 10.0


@asynccontextmanager
async def compute_thread() -> AsyncIterator[ComputeThread]:
    thread = ComputeThread(asyncio.get_running_loop())
    try:
        yield thread
    finally:
        thread.stop()
        assert await asyncio.to_thread(thread.join, DEADLINE_S)


class Plug:
    """A job that keeps the thread busy until it is pulled."""

    def __init__(self) -> None:
        self._pulled = threading.Event()
        self.started = threading.Event()

    def __call__(self) -> str:
        self.started.set()
        assert self._pulled.wait(DEADLINE_S)
        return "plug"

    def pull(self) -> None:
        self._pulled.set()


def in_thread(scenario: Callable[[ComputeThread], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(DEADLINE_S), compute_thread() as thread:
            await scenario(thread)

    asyncio.run(main())


async def plugged(thread: ComputeThread) -> tuple[Plug, asyncio.Task[str]]:
    plug = Plug()
    task = asyncio.create_task(thread.run(plug))
    assert await asyncio.to_thread(plug.started.wait, DEADLINE_S)
    return plug, task


def test_results_come_back_to_who_asked() -> None:
    async def scenario(thread: ComputeThread) -> None:
        assert await asyncio.gather(*(thread.run(lambda n=n: n * n) for n in range(20))) == [n * n for n in range(20)]

    in_thread(scenario)


def test_everything_runs_in_one_thread_that_is_not_the_loops() -> None:
    async def scenario(thread: ComputeThread) -> None:
        idents = set(await asyncio.gather(*(thread.run(threading.get_ident) for _ in range(5))))
        assert len(idents) == 1
        assert threading.get_ident() not in idents

    in_thread(scenario)


def test_decode_steps_overtake_batches_and_equals_keep_their_order() -> None:
    async def scenario(thread: ComputeThread) -> None:
        plug, busy = await plugged(thread)
        order: list[str] = []
        jobs = [("batch 1", Priority.BATCH), ("step 1", Priority.INFERENCE), ("batch 2", Priority.BATCH)]
        jobs += [("step 2", Priority.INFERENCE)]
        tasks = []
        for name, priority in jobs:
            tasks.append(asyncio.create_task(thread.run(lambda name=name: order.append(name), priority)))
            await asyncio.sleep(0)
        plug.pull()
        await asyncio.gather(busy, *tasks)
        assert order == ["step 1", "step 2", "batch 1", "batch 2"]

    in_thread(scenario)


def test_a_job_nobody_waits_for_any_more_is_dropped() -> None:
    async def scenario(thread: ComputeThread) -> None:
        plug, busy = await plugged(thread)
        ran: list[int] = []
        dropped = asyncio.create_task(thread.run(lambda: ran.append(1)))
        kept = asyncio.create_task(thread.run(lambda: ran.append(2)))
        await asyncio.sleep(0)
        dropped.cancel()
        await asyncio.gather(dropped, return_exceptions=True)
        plug.pull()
        await asyncio.gather(busy, kept)
        assert ran == [2]

    in_thread(scenario)


def test_a_job_cancelled_while_it_runs_is_finished_and_forgotten() -> None:
    async def scenario(thread: ComputeThread) -> None:
        plug, busy = await plugged(thread)
        busy.cancel()
        with pytest.raises(asyncio.CancelledError):
            await busy
        plug.pull()
        assert await thread.run(lambda: "next") == "next"

    in_thread(scenario)


@pytest.mark.parametrize("error", [ValueError("wrong"), MemoryError()])
def test_an_error_reaches_its_waiter_and_the_thread_goes_on(error: BaseException) -> None:
    async def scenario(thread: ComputeThread) -> None:
        def fail() -> None:
            raise error

        with pytest.raises(type(error)) as caught:
            await thread.run(fail)
        assert caught.value is error
        assert await thread.run(lambda: "next") == "next"

    in_thread(scenario)


def test_stopping_drops_what_waits() -> None:
    async def main() -> None:
        thread = ComputeThread(asyncio.get_running_loop())
        plug, busy = await plugged(thread)
        ran: list[int] = []
        waiting = asyncio.create_task(thread.run(lambda: ran.append(1)))
        await asyncio.sleep(0)
        thread.stop()
        plug.pull()
        assert await busy == "plug"
        assert await asyncio.to_thread(thread.join, DEADLINE_S)
        assert ran == []
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    asyncio.run(main())


def test_the_loop_may_be_gone_before_the_job_is_done() -> None:
    plug = Plug()

    async def main() -> ComputeThread:
        thread = ComputeThread(asyncio.get_running_loop())
        task = asyncio.create_task(thread.run(plug))
        assert await asyncio.to_thread(plug.started.wait, DEADLINE_S)
        task.cancel()
        return thread

    thread = asyncio.run(main())
    plug.pull()
    thread.stop()
    assert thread.join(DEADLINE_S)


def test_a_job_can_ask_whether_others_wait() -> None:
    async def scenario(thread: ComputeThread) -> None:
        plug, plugged_task = await plugged(thread)
        asking = asyncio.create_task(thread.run(lambda: thread.others_wait(Priority.INFERENCE), Priority.INFERENCE))
        other = asyncio.create_task(thread.run(lambda: None, Priority.PREFILL))
        await asyncio.sleep(0)
        plug.pull()
        assert await asking
        await asyncio.gather(other, plugged_task)
        assert not await thread.run(lambda: thread.others_wait(Priority.INFERENCE), Priority.INFERENCE)

    in_thread(scenario)
