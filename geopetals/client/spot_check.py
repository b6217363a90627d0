"""Spot checks: now and then a step is computed once more with one server of the chain replaced by others.

The inputs of the whole session go through the chain as passes without a cache, those of one hop, chosen at random,
through replicas of its blocks. If the last position then differs from what the session was told, somebody is wrong; the
server in question is asked for the same pass to see whether it is the one. Nobody waits for a check.
"""

import asyncio
import logging
import random
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from geopetals.client.routing import Hop
from geopetals.errors import SwarmFailure
from geopetals.swarm.wire import short_peer

log = logging.getLogger(__name__)

TOLERANCE = 0.1
"""Of the norm: replicas may hold their weights in other formats, down to 8 bits."""
_MOST_AT_ONCE = 1


class Servers(Protocol):
    """What a check needs of the swarm; SwarmClient has it."""

    async def forward_on(self, hop: Hop, hidden: Tensor, prompts: Tensor | None) -> Tensor: ...

    def replicas_of(self, hop: Hop) -> tuple[Hop, ...]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """`span`: the blocks [start, end) that were computed twice. `error`: relative to the norm of the replicas' result.

    `is_its_own`: the server disagreed with the replicas about the very same pass; otherwise it may be any of the chain,
    or one that answers sessions and passes differently.
    """

    server: str
    replicas: tuple[str, ...]
    span: tuple[int, int]
    error: float
    is_its_own: bool


class SpotChecks:
    """Of one client, on its event loop. `found` are the mismatches so far, `done` counts checks that were made."""

    def __init__(self, servers: Servers, *, rate: float, rng: random.Random | None = None) -> None:
        """`rate`: the share of steps that is checked."""
        self.found: list[Mismatch] = []
        self.done = 0
        self._servers, self._rate, self._rng = servers, rate, rng or random.Random()
        self._running: set[asyncio.Task[None]] = set()

    def consider(self, route: tuple[Hop, ...], inputs: Tensor, output: Tensor, prompts: Tensor | None) -> None:
        """After a step: `inputs` [batch, tokens, hidden] of all tokens so far, `output` [batch, any, hidden] of the
        last ones. Both may change once this returns.
        """
        if len(self._running) >= _MOST_AT_ONCE or self._rng.random() >= self._rate:
            return
        task = asyncio.create_task(self._check(route, inputs.clone(), output[:, -1:].clone(), prompts))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def close(self) -> None:
        for task in list(self._running):
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _check(self, route: tuple[Hop, ...], inputs: Tensor, output: Tensor, prompts: Tensor | None) -> None:
        suspect = self._rng.choice(route)
        replicas = self._servers.replicas_of(suspect)
        if not replicas:
            log.debug("spot_check.no_replica span=%d:%d", suspect.start, suspect.end)
            return
        try:
            mismatch = await self._compare(route, suspect, replicas, inputs, output, prompts)
        except SwarmFailure as error:
            log.info("spot_check.failed server=%s reason=%s", short_peer(suspect.peer_id), error)
            return
        self.done += 1
        if mismatch is not None:
            self._report(mismatch)

    async def _compare(
        self,
        route: tuple[Hop, ...],
        suspect: Hop,
        replicas: tuple[Hop, ...],
        inputs: Tensor,
        output: Tensor,
        prompts: Tensor | None,
    ) -> Mismatch | None:
        place = route.index(suspect)
        before = await self._through(route[:place], inputs, prompts)
        right = await self._through(replicas, before, prompts)
        error = _difference(output, (await self._through(route[place + 1 :], right, prompts))[:, -1:])
        if error <= TOLERANCE:
            return None
        own = _difference(await self._through((suspect,), before, prompts), right)
        return Mismatch(
            server=suspect.peer_id,
            replicas=tuple(hop.peer_id for hop in replicas),
            span=(suspect.start, suspect.end),
            error=error,
            is_its_own=own > TOLERANCE,
        )

    async def _through(self, hops: tuple[Hop, ...], hidden: Tensor, prompts: Tensor | None) -> Tensor:
        for hop in hops:
            within = None if prompts is None else prompts[hop.start : hop.end]
            hidden = await self._servers.forward_on(hop, hidden, within)
        return hidden

    def _report(self, mismatch: Mismatch) -> None:
        self.found.append(mismatch)
        log.warning(
            "spot_check.mismatch server=%s replicas=%s span=%d:%d error=%.2f own=%s",
            mismatch.server,
            ",".join(mismatch.replicas),
            *mismatch.span,
            mismatch.error,
            mismatch.is_its_own,
        )


def _difference(found: Tensor, right: Tensor) -> float:
    """Infinite for what is no number."""
    norm = float(torch.linalg.vector_norm(right.double()))
    difference = float(torch.linalg.vector_norm(found.double() - right.double()))
    return difference / max(norm, 1e-30) if difference == difference else float("inf")
