"""How much attention cache a server has left, and who waits for it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import IntEnum

from geopetals.errors import ServerFull


class Turn(IntEnum):
    """Who goes first when several wait: whoever has tokens already must not wait for those who have none yet."""

    GROWTH = 0
    RECOVERY = 1
    NEW = 2


@dataclass(slots=True, eq=False)
class _Waiter:
    turn: Turn
    amount: int
    granted: asyncio.Future[None]


class KVBudget:
    """Counts block-tokens: one token of one sequence in one block.

    Of those who wait, each is served in their turn, and within it in order of arrival; of growing sessions the last one
    that asked goes first. What is reserved never exceeds `total`: this is asserted at every change.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = 0
        self._waiters: list[_Waiter] = []
        self._closed: ServerFull | None = None

    @property
    def left(self) -> int:
        return self.total - self.used

    @property
    def awaited(self) -> int:
        """What those who wait want, all together."""
        return sum(waiter.amount for waiter in self._waiters)

    def close(self, reason: ServerFull) -> None:
        """Refuse all that wait and all that come, but for the growth of sessions that are there."""
        self._closed = reason
        for waiter in self._waiters:
            if waiter.turn is not Turn.GROWTH and not waiter.granted.done():
                waiter.granted.set_exception(reason)

    def reopen(self) -> None:
        self._closed = None

    @contextlib.asynccontextmanager
    async def reserve(self, amount: int, *, timeout_s: float, recovers: bool = False) -> AsyncIterator["Reservation"]:
        """Hold `amount` block-tokens inside the block; raises ServerFull if they do not come free in `timeout_s`.

        `recovers`: for a session that has lost another server, and goes ahead of new ones.
        """
        if self._closed is not None:
            raise self._closed
        await self._take(amount, timeout_s, turn=Turn.RECOVERY if recovers else Turn.NEW)
        reservation = Reservation(self, amount)
        try:
            yield reservation
        finally:
            self._give_back(reservation.amount)

    async def _take(self, amount: int, timeout_s: float, *, turn: Turn, held: int = 0) -> None:
        if amount + held > self.total:
            raise ServerFull(
                f"the session needs {amount + held} block-tokens of attention cache, this server has {self.total}."
            )
        if amount <= self.left and (turn is Turn.GROWTH or all(waiter.turn > turn for waiter in self._waiters)):
            self._book(amount)
            return
        if timeout_s <= 0:
            raise ServerFull(f"the session needs {amount} block-tokens of attention cache, {self.left} are free.")
        waiter = _Waiter(turn, amount, asyncio.get_running_loop().create_future())
        self._enqueue(waiter)
        try:
            async with asyncio.timeout(timeout_s):
                await waiter.granted
        except TimeoutError:
            self._give_up(waiter)
            raise ServerFull(f"no attention cache came free within {timeout_s:.0f} s.") from None
        except (asyncio.CancelledError, ServerFull):
            self._give_up(waiter)
            raise

    def _enqueue(self, waiter: _Waiter) -> None:
        ahead = (other.turn < waiter.turn or other.turn == waiter.turn != Turn.GROWTH for other in self._waiters)
        self._waiters.insert(sum(ahead), waiter)

    def _book(self, amount: int) -> None:
        self.used += amount
        assert 0 <= self.used <= self.total, f"{self.used} of {self.total} block-tokens are reserved"

    def _give_back(self, amount: int) -> None:
        self._book(-amount)
        self._wake()

    def _give_up(self, waiter: _Waiter) -> None:
        if waiter in self._waiters:
            self._waiters.remove(waiter)
        elif not waiter.granted.cancelled() and waiter.granted.exception() is None:
            self._book(-waiter.amount)
        self._wake()

    def _wake(self) -> None:
        while self._waiters and self._waiters[0].amount <= self.left:
            waiter = self._waiters.pop(0)
            if not waiter.granted.done():
                self._book(waiter.amount)
                waiter.granted.set_result(None)


class Reservation:
    """What one session holds of a budget: `amount` block-tokens."""

    def __init__(self, budget: KVBudget, amount: int) -> None:
        self._budget = budget
        self.amount = amount

    async def grow(self, more: int, *, timeout_s: float = 0.0) -> None:
        """Hold `more` block-tokens as well. Raises ServerFull if they do not come free in `timeout_s`."""
        await self._budget._take(more, timeout_s, turn=Turn.GROWTH, held=self.amount)
        self.amount += more

    def shrink(self, less: int) -> None:
        self.amount -= less
        self._budget._give_back(less)
