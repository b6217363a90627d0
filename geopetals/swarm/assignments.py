"""What a server is told to hold, and how it gets there: one span after the other, the newest word counts.

joining ─► loading ─► ready ─► draining ─► loading ─► ready ...
              └─► failed ─► ready with the blocks it had before, or joining without any
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any

from geopetals.coordinator.messages import Assign, Assigned, Registered, ServerState, Span
from geopetals.errors import GeoPetalsError
from geopetals.progress import Reporter
from geopetals.swarm.holding import Holding

log = logging.getLogger(__name__)

_DRAIN_S = 30.0
"""If the coordinator does not say."""
_MOST_UNTOLD = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What the coordinator is told. `loaded`: how long the last loading took and how many bytes it brought."""

    state: ServerState
    span: Span | None
    epoch: int
    error: str = ""
    loaded: tuple[float, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """How the server does it. `load` and `serve` raise GeoPetalsError for what the coordinator should hear of.

    `resume` takes back a `drain` that was cancelled.
    """

    load: Callable[[int, int], Awaitable[Holding]]
    serve: Callable[[Holding], Awaitable[None]]
    drain: Callable[[str, float], Coroutine[Any, Any, None]]
    resume: Callable[[], Awaitable[None]]
    stop: Callable[[str], Awaitable[None]]


class Assignments:
    """Lives on the event loop; `run()` does the work. `on_change` is called after each change of `standing`."""

    def __init__(self, work: Work, reporter: Reporter, on_change: Callable[[], None]) -> None:
        self._work, self._reporter, self._on_change = work, reporter, on_change
        self._order: Assign | None = None
        self._ordered = asyncio.Event()
        self._held: Span | None = None
        self._target: Span | None = None
        self.newest = 0
        """The epoch of the last word that was accepted."""
        self.standing = Standing(state="joining", span=None, epoch=0)
        self._untold: deque[Standing] = deque(maxlen=_MOST_UNTOLD)

    def accept(self, order: Assign) -> Assigned:
        """Take an order that is newer than all before."""
        if order.epoch <= self.newest:
            return Assigned(accepted=False, why=f"assignment {order.epoch} is older than {self.newest}")
        self._take(order)
        return Assigned(accepted=True)

    def adopt(self, answer: Registered) -> None:
        """The coordinator's word at registration counts whatever number it has: it may have begun anew."""
        if answer.span is None or (answer.epoch, answer.span) == (self.newest, self._target):
            self.newest = answer.epoch
            self.standing = replace(self.standing, epoch=answer.epoch)
            return
        self._take(Assign(epoch=answer.epoch, span=answer.span, reason=answer.reason, drain_s=_DRAIN_S))

    def next_to_tell(self) -> tuple[Standing, bool]:
        """What to report, and whether more has happened since: a failure must not be passed over."""
        standing = self._untold.popleft() if self._untold else self.standing
        return standing, bool(self._untold)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._ordered.wait()
            self._ordered.clear()
            order, self._order = self._order, None
            if order is not None:
                await self._carry_out(order)

    def _take(self, order: Assign) -> None:
        log.info("assigned epoch=%d span=%s reason=%.200s", order.epoch, order.span, order.reason)
        self.newest, self._target, self._order = order.epoch, order.span, order
        self._ordered.set()

    async def _carry_out(self, order: Assign) -> None:
        before = self._held
        if order.span == before:
            self._stand("ready" if before is not None else "joining", before, order.epoch)
            return
        if before is not None and not await self._leave(before, order):
            return
        if order.span is None:
            self._stand("joining", None, order.epoch)
        elif self._order is None:
            await self._try(order.span, before, order)

    async def _try(self, span: Span, before: Span | None, order: Assign) -> None:
        """Move in, or go back to the blocks from before."""
        error = await self._move_in(span, order)
        if error is None:
            return
        self._reporter.line(f"blocks {span.start}:{span.end} were not loaded: {error}")
        self._stand("failed", before, order.epoch, error=error)
        if before is not None and self._order is None and (again := await self._move_in(before, order)) is not None:
            self._stand("failed", None, order.epoch, error=again)

    async def _leave(self, held: Span, order: Assign) -> bool:
        """False if a newer word says that the server is to stay, in time for that."""
        self._reporter.line(f"leaving blocks {held.start}:{held.end}: {order.reason}")
        self._stand("draining", held, order.epoch)
        if not await self._drain(held, order.drain_s):
            self._reporter.line(f"staying with blocks {held.start}:{held.end}")
            return False
        self._held = None
        await self._work.stop("the server moves")
        return True

    async def _drain(self, held: Span, drain_s: float) -> bool:
        draining = asyncio.create_task(self._work.drain("the server moves", drain_s))
        try:
            while not draining.done():
                ordered = asyncio.create_task(self._ordered.wait())
                await asyncio.wait({draining, ordered}, return_when=asyncio.FIRST_COMPLETED)
                ordered.cancel()
                if draining.done() or self._order is None:
                    continue
                if self._order.span == held:
                    return False
                await draining  # whichever other blocks come next: these are left
            await draining
            return True
        finally:
            if not draining.done():
                draining.cancel()
                await asyncio.gather(draining, return_exceptions=True)
                await self._work.resume()

    async def _move_in(self, span: Span, order: Assign) -> str | None:
        """None, or why the blocks are not there."""
        self._stand("loading", span, order.epoch)
        try:
            holding = await self._work.load(*span)
            await self._work.serve(holding)
        except GeoPetalsError as error:
            log.warning("load.failed span=%d:%d reason=%s", *span, error)
            await self._work.stop("loading failed")
            return str(error)
        except Exception as error:
            log.exception("load.failed span=%d:%d", *span)
            await self._work.stop("loading failed")
            return f"internal error: {type(error).__name__}: {error}"
        self._held = span
        self._stand("ready", span, order.epoch, loaded=(holding.load_s, holding.stage.memory_bytes))
        return None

    def _stand(
        self,
        state: ServerState,
        span: Span | None,
        epoch: int,
        *,
        error: str = "",
        loaded: tuple[float, int] | None = None,
    ) -> None:
        log.info("standing state=%s span=%s epoch=%d", state, span, epoch)
        self.standing = Standing(state=state, span=span, epoch=epoch, error=error[:500], loaded=loaded)
        self._untold.append(self.standing)
        self._on_change()
