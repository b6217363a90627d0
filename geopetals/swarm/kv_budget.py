"""How much attention cache a server has left, and who waits for it."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator

from geopetals.errors import ServerFull


class KVBudget:
    """Counts block-tokens: one token of one sequence in one block. Waiters are served in order of arrival."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = 0
        self._waiters: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def left(self) -> int:
        return self.total - self.used

    @property
    def awaited(self) -> int:
        """What those who wait want, all together."""
        return sum(amount for amount, _ in self._waiters)

    @contextlib.asynccontextmanager
    async def reserve(self, amount: int, *, timeout_s: float) -> AsyncIterator["Reservation"]:
        """Hold `amount` block-tokens inside the block; raises ServerFull if they do not come free in `timeout_s`."""
        await self._take(amount, timeout_s)
        reservation = Reservation(self, amount)
        try:
            yield reservation
        finally:
            self._give_back(reservation.amount)

    async def _take(self, amount: int, timeout_s: float, *, held: int = 0) -> None:
        """`held` is what the session has already: its growth does not queue behind sessions that have nothing yet."""
        if amount + held > self.total:
            raise ServerFull(
                f"the session needs {amount + held} block-tokens of attention cache, this server has {self.total}."
            )
        if (held or not self._waiters) and amount <= self.left:
            self.used += amount
            return
        if timeout_s <= 0:
            raise ServerFull(f"the session needs {amount} block-tokens of attention cache, {self.left} are free.")
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if held:
            self._waiters.appendleft((amount, granted))
        else:
            self._waiters.append((amount, granted))
        try:
            async with asyncio.timeout(timeout_s):
                await granted
        except TimeoutError:
            self._give_up(amount, granted)
            raise ServerFull(f"no attention cache came free within {timeout_s:.0f} s.") from None
        except asyncio.CancelledError:
            self._give_up(amount, granted)
            raise

    def _give_back(self, amount: int) -> None:
        self.used -= amount
        self._wake()

    def _give_up(self, amount: int, granted: asyncio.Future[None]) -> None:
        if granted.done() and not granted.cancelled():
            self.used -= amount
        elif (amount, granted) in self._waiters:
            self._waiters.remove((amount, granted))
        self._wake()

    def _wake(self) -> None:
        while self._waiters and self._waiters[0][0] <= self.left:
            amount, granted = self._waiters.popleft()
            if not granted.done():
                self.used += amount
                granted.set_result(None)


class Reservation:
    """What one session holds of a budget: `amount` block-tokens."""

    def __init__(self, budget: KVBudget, amount: int) -> None:
        self._budget = budget
        self.amount = amount

    async def grow(self, more: int, *, timeout_s: float = 0.0) -> None:
        """Hold `more` block-tokens as well. Raises ServerFull if they do not come free in `timeout_s`."""
        await self._budget._take(more, timeout_s, held=self.amount)
        self.amount += more

    def shrink(self, less: int) -> None:
        self.amount -= less
        self._budget._give_back(less)
