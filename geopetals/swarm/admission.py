"""Who gets attention cache: a session names its tokens, and has them reserved before it begins or is refused at once.

Who is refused is told when enough is expected to come free, as far as that can be known: running sessions have said
how many tokens they will have at most, and how fast they get there is seen.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, NamedTuple

from geopetals.errors import ServerFull, ServerMoving
from geopetals.swarm.kv_budget import KVBudget, Reservation
from geopetals.swarm.kv_cache import SessionKV

UNUSED_S = 60.0
"""A reservation that no step has used after this time ends."""
STALLED_S = 600.0
"""So does one whose session has not got on for this long; its client can fill another cache."""
_LOOK_EVERY_S = 1.0
_STILL_S = 10.0
_NEWEST = 0.5


class Expected(NamedTuple):
    """A reservation of so many block-tokens, and in how many seconds it ends at the latest, if that is known."""

    block_tokens: int
    ends_in_s: float | None


def free_in_s(needed: int, left: int, running: Iterable[Expected]) -> float | None:
    """Seconds until `needed` block-tokens are free if `left` are now; None if it is not known."""
    if needed <= left:
        return 0.0
    known = sorted((held.ends_in_s, held.block_tokens) for held in running if held.ends_in_s is not None)
    for ends_in_s, block_tokens in known:
        left += block_tokens
        if needed <= left:
            return ends_in_s
    return None


class Pace:
    """Tokens per second of one session, from looking at its cache now and then. The first tokens say nothing: they are
    a prompt.
    """

    def __init__(self) -> None:
        self._length: int | None = None
        self._at = self._moved_at = 0.0
        self._tokens_per_s = 0.0

    def look(self, length: int, now: float) -> None:
        if length == 0:
            return
        if self._length is None or length < self._length:
            self._length, self._at, self._moved_at, self._tokens_per_s = length, now, now, 0.0
            return
        if length == self._length or now - self._at < _LOOK_EVERY_S:
            return
        seen = (length - self._length) / (now - self._at)
        self._tokens_per_s += (seen - self._tokens_per_s) * (_NEWEST if self._tokens_per_s else 1.0)
        self._length, self._at, self._moved_at = length, now, now

    def ends_in_s(self, length: int, max_length: int, now: float) -> float | None:
        """None before it has been seen to move, and once it has stood still for some time."""
        if self._tokens_per_s <= 0 or now - self._moved_at > _STILL_S:
            return None
        return max(0.0, (max_length - length) / self._tokens_per_s - (now - self._at))


class Admitted:
    """One session's place: its reservation, and its cache once there is one."""

    def __init__(self, reservation: Reservation, session_id: str) -> None:
        self.reservation, self.session_id = reservation, session_id
        self.kv: SessionKV | None = None
        self._pace = Pace()

    def look(self, now: float) -> None:
        if self.kv is not None:
            self._pace.look(self.kv.length, now)

    def expected(self, now: float) -> Expected:
        ends = None if self.kv is None else self._pace.ends_in_s(self.kv.length, self.kv.max_length, now)
        return Expected(self.reservation.amount, ends)


class Held(NamedTuple):
    """What a session holds: block-tokens that are reserved, and tokens in the cache, of one sequence in one block."""

    session_id: str
    block_tokens: int
    tokens: int


class Admission:
    """The sessions of one server that hold attention cache or wait for it."""

    def __init__(self, budget: KVBudget, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.budget = budget
        self._clock = clock
        self._running: set[Admitted] = set()
        self._emptied = asyncio.Event()
        self._looked_at = clock()
        self.waiting = 0

    @property
    def running(self) -> int:
        return len(self._running)

    @contextlib.asynccontextmanager
    async def admit(
        self, block_tokens: int, *, timeout_s: float, session_id: str = "", recovers: bool = False
    ) -> AsyncIterator[Admitted]:
        """Hold cache inside the block. Raises ServerFull if it does not come free in `timeout_s`.

        `session_id` is what the session is called in the swarm, by its ticket if it has one. `recovers`: see KVBudget.
        """
        async with contextlib.AsyncExitStack() as held:
            reservation = await self._reserve(block_tokens, timeout_s, recovers, held)
            admitted = Admitted(reservation, session_id)
            self._running.add(admitted)
            held.callback(self._forget, admitted)
            yield admitted

    async def until_empty(self) -> None:
        """Until no session holds cache."""
        while self._running:
            self._emptied.clear()
            await self._emptied.wait()

    def held(self) -> list[Held]:
        """The sessions that have a name, an entry for each cache."""
        return [
            Held(admitted.session_id, admitted.reservation.amount, 0 if admitted.kv is None else admitted.kv.length)
            for admitted in self._running
            if admitted.session_id
        ]

    def free_in_s(self, block_tokens: int) -> float | None:
        now = self._clock()
        needed = block_tokens + self.budget.awaited
        return free_in_s(needed, self.budget.left, [admitted.expected(now) for admitted in self._running])

    def tick(self) -> None:
        """Look, not more often than makes sense, how fast the sessions get on."""
        now = self._clock()
        if now - self._looked_at >= _LOOK_EVERY_S:
            self._looked_at = now
            for admitted in self._running:
                admitted.look(now)

    def describe(self) -> dict[str, Any]:
        """For whoever considers coming here. Sizes in block-tokens."""
        return {
            "total": self.budget.total,
            "free": self.budget.left,
            "running": self.running,
            "waiting": self.waiting,
        }

    def _forget(self, admitted: Admitted) -> None:
        self._running.discard(admitted)
        if not self._running:
            self._emptied.set()

    async def _reserve(
        self, block_tokens: int, timeout_s: float, recovers: bool, held: contextlib.AsyncExitStack
    ) -> Reservation:
        self.waiting += 1
        try:
            reserving = self.budget.reserve(block_tokens, timeout_s=timeout_s, recovers=recovers)
            return await held.enter_async_context(reserving)
        except ServerFull as error:
            if block_tokens > self.budget.total or isinstance(error, ServerMoving):
                raise
            raise self._full(str(error), block_tokens) from error
        finally:
            self.waiting -= 1

    def _full(self, text: str, block_tokens: int) -> ServerFull:
        seconds = self.free_in_s(block_tokens)
        when = "it is not known when enough will be" if seconds is None else f"full for about {seconds:.0f} s more"
        return ServerFull(f"{text.removesuffix('.')}; {when}.", free_in_s=seconds)
