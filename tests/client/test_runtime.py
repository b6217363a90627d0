"""The client's event loop: what waits for it hears the end, whoever causes it."""

import asyncio
import threading

import pytest

from geopetals.client.runtime import Interruption, LoopThread
from geopetals.errors import SwarmFailure

WAIT_S = 20.0


async def forever(begun: threading.Event, ended: threading.Event | None = None) -> None:
    begun.set()
    try:
        await asyncio.Event().wait()
    finally:
        if ended is not None:
            ended.set()


class Caller:
    """A thread that runs a coroutine on a loop, and how that ended."""

    def __init__(self, loop: LoopThread, *, interruption: Interruption | None = None) -> None:
        self.begun, self.ended, self.error = threading.Event(), threading.Event(), ""
        self._loop, self._interruption = loop, interruption
        self._thread = threading.Thread(target=self._call, daemon=True)
        self._thread.start()
        assert self.begun.wait(WAIT_S)

    def has_ended(self) -> bool:
        self._thread.join(WAIT_S)
        return not self._thread.is_alive()

    def _call(self) -> None:
        try:
            if self._interruption is None:
                self._loop.run(forever(self.begun, self.ended))
            else:
                with self._interruption.active():
                    self._loop.run(forever(self.begun, self.ended))
        except SwarmFailure as error:
            self.error = str(error)


def test_a_stop_ends_all_calls_and_refuses_new_ones() -> None:
    loop = LoopThread()
    callers = [Caller(loop) for _ in range(4)]
    loop.stop()
    assert all(caller.has_ended() and caller.ended.is_set() for caller in callers)
    assert all("closed" in caller.error for caller in callers)
    with pytest.raises(SwarmFailure, match="closed"):
        loop.run(asyncio.sleep(0))


def test_what_begins_while_others_end_is_ended_too() -> None:
    loop = LoopThread()
    ended = threading.Event()
    begun = threading.Event()

    async def begins_another() -> None:
        try:
            await forever(begun)
        finally:
            asyncio.create_task(forever(threading.Event(), ended))  # noqa: RUF006 - nobody keeps it
            await asyncio.sleep(0)

    def call() -> None:
        with pytest.raises(SwarmFailure):
            loop.run(begins_another())

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    assert begun.wait(WAIT_S)
    loop.stop()
    assert ended.wait(WAIT_S)
    thread.join(WAIT_S)
    assert not thread.is_alive()


def test_calls_and_stops_at_the_same_time_all_end() -> None:
    for _ in range(20):
        loop = LoopThread()

        def call(loop: LoopThread = loop) -> None:
            try:
                while True:
                    loop.run(asyncio.sleep(0))
            except SwarmFailure:
                return

        threads = [threading.Thread(target=call, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        loop.stop()
        for thread in threads:
            thread.join(WAIT_S)
        assert not any(thread.is_alive() for thread in threads)


def test_an_interruption_ends_what_a_thread_waits_for_and_what_it_calls_next() -> None:
    loop, interruption = LoopThread(), Interruption()
    try:
        caller = Caller(loop, interruption=interruption)
        interruption.interrupt()
        assert caller.has_ended()
        assert caller.ended.is_set()
        assert caller.error
        with interruption.active(), pytest.raises(SwarmFailure):
            loop.run(asyncio.sleep(WAIT_S))
        assert loop.run(asyncio.sleep(0, "outside of the block")) == "outside of the block"
    finally:
        loop.stop()
