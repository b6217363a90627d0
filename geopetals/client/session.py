"""An inference session: attention caches on a chain of servers, extended step by step.

The session keeps the hidden states it has sent into block 0, batch x max_length x hidden values (once it has outgrown
max_length, room for a quarter or 256 tokens more than it needs), and deep prompts if there are any. When a server
fails, a new chain is opened, fed that history, and goes on with the step that failed.
"""

import asyncio
import contextlib
import logging
import time
import weakref
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import torch

from geopetals import metrics
from geopetals.client.chain import Chain
from geopetals.client.chain_opening import open_chain
from geopetals.client.hollow import RemoteCache
from geopetals.client.lease import Lease, Waiting
from geopetals.client.retry import Retry, failure_reason
from geopetals.client.routing import Hop
from geopetals.client.swarm import SwarmClient
from geopetals.errors import ServerFull, SwarmFailure, UnsupportedInput
from geopetals.swarm.ring_messages import Want

log = logging.getLogger(__name__)

Result = TypeVar("Result")

_LEAST_MORE_TOKENS = 256


class InferenceSession:
    """One batch of sequences; servers reserve `max_length` tokens for it. A context manager, for one thread at a time.

    A session that has begun may outgrow that where all its servers are GeoPETALS' and have memory left.
    The first `prefix_tokens` of them are trained prompts in front of the text: `cache` counts the text alone.
    """

    def __init__(
        self,
        swarm: SwarmClient,
        max_length: int,
        *,
        prefix_tokens: int = 0,
        output_tokens: int | None = None,
        lease: Lease | None = None,
    ) -> None:
        """`output_tokens`: how many it will generate, if that is known. `lease`: one that it shares with others."""
        self._closed = True
        if max_length < 1:
            raise UnsupportedInput(f"a session needs max_length of at least 1 token, got {max_length}.")
        self._swarm = swarm
        self.max_length = max_length
        self.prefix_tokens = prefix_tokens
        self.output_ids: torch.Tensor | None = None
        self.cache = RemoteCache(text_position(weakref.ref(self)), swarm.num_blocks)
        self._owns_lease = lease is None
        self._lease = lease or swarm.lease(output_tokens=output_tokens)
        self._chain: Chain | None = None
        self._was_open = self._can_grow = False
        self._planned_for = ""
        self._prompts: torch.Tensor | None = None
        self._store: torch.Tensor | None = None
        self._position = 0
        self._closed = False

    @property
    def position(self) -> int:
        """Tokens that the servers have processed."""
        return self._position

    @property
    def can_grow(self) -> bool:
        """Whether it may outgrow `max_length`; known once it has begun."""
        return self._can_grow

    @property
    def route(self) -> tuple[Hop, ...]:
        """The chain in use, with the mode of each hop; empty before the first step."""
        return () if self._chain is None else self._chain.route

    @property
    def waiting(self) -> Waiting | None:
        """What the session waits for while it has no cache yet, for other threads to see."""
        return self._lease.waiting

    @property
    def trace(self) -> tuple[tuple[float, ...], ...]:
        """Of the last step, if the client is configured so: seconds in the queue, computing, packing at each hop."""
        return () if self._chain is None else self._chain.trace

    def step(
        self,
        hidden: torch.Tensor,
        hypo_ids: torch.Tensor | None = None,
        prompts: torch.Tensor | None = None,
        *,
        last_only: bool = False,
    ) -> torch.Tensor:
        """Hidden states [batch, tokens, hidden] of new tokens through all blocks, on the device and in the format
        given.

        With `last_only` those of the last of the tokens, [batch, 1, hidden]: the others never leave the last server.
        `hypo_ids` [batch]: row i continues what row hypo_ids[i] was. `prompts` [blocks, batch or 1, prefix, hidden],
        in the first step only, are added to the first positions of each block's input. Raises UnsupportedInput for a
        step that does not fit the session, SwarmFailure when no chain can do it.
        """
        if self._closed:
            raise UnsupportedInput("the session is closed: open a new one.")
        if self._store is not None and self._store.shape[0] != hidden.shape[0]:
            raise UnsupportedInput(f"the session has a batch of {self._store.shape[0]}, got {hidden.shape[0]}.")
        if prompts is not None:
            if self._position > 0:
                raise UnsupportedInput(
                    "prompts belong to the first step of a session: open a new one for other prompts."
                )
            self._prompts = prompts.detach().cpu()
        inputs = hidden.detach().cpu()
        order = None if hypo_ids is None else hypo_ids.cpu()
        output = self._swarm.run(self.step_async(inputs, order, last_only=last_only))
        return output.to(device=hidden.device, dtype=hidden.dtype)

    def open(self, batch: int) -> None:
        """Reserve the caches for `batch` sequences now; the first step does it otherwise."""
        if self._closed:
            raise UnsupportedInput("the session is closed: open a new one.")
        if self._chain is None:
            self._swarm.run(self._open(batch))

    def close(self) -> None:
        """Free the caches on the servers. Never raises."""
        if not self._closed:
            self._closed = True
            with contextlib.suppress(SwarmFailure):  # the connection is closed already, and the caches with it
                self._swarm.run(self._end())

    def __enter__(self) -> "InferenceSession":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Blocking here could be blocking the event loop itself: only drop the connections.
        if not self._closed and self._chain is not None:
            self._swarm.call_soon(self._chain.abort)
        if not self._closed and self._owns_lease:
            self._swarm.call_soon(self._lease.close)

    # -- on the event loop ---------------------------------------------------------------------------------------------

    async def step_async(
        self, inputs: torch.Tensor, hypo_ids: torch.Tensor | None, *, last_only: bool = False
    ) -> torch.Tensor:
        async def run(chain: Chain) -> torch.Tensor | None:
            want = Want.LAST if last_only else Want.ALL
            return await chain.run(inputs, position=self._position, want=want, hypo_ids=hypo_ids, prompts=self._prompts)

        began_s, reserved = time.perf_counter(), self.max_length
        await self._lease.decide(batch=inputs.shape[0], max_length=reserved, prompt_tokens=inputs.shape[1])
        self._make_room(inputs.shape[1])
        try:
            await self._extend_lease()
            output = await self._on_chain(inputs.shape[0], run)
        except BaseException:
            self.max_length = reserved
            raise
        assert output is not None
        self._observe(inputs.shape[1], time.perf_counter() - began_s)
        self._remember(inputs, hypo_ids)
        if self._swarm.config.spot_check_rate > 0 and self._store is not None:
            self._swarm.spot_checks.consider(self.route, self._store[:, : self._position], output, self._prompts)
        return output

    async def _open(self, batch: int) -> None:
        await self._lease.decide(batch=batch, max_length=self.max_length, prompt_tokens=0)
        await self._on_chain(batch, _nothing)

    def _make_room(self, tokens: int) -> None:
        needed = self._position + tokens
        if needed <= self.max_length:
            return
        if not self._can_grow:
            raise UnsupportedInput(
                f"{self._position} tokens and {tokens} more exceed the session's max_length "
                f"of {self.max_length}: open a longer one."
            )
        self.max_length = needed

    async def _extend_lease(self) -> None:
        """A pushed step must not overtake the ticket that covers it, which goes straight to each server."""
        if await self._lease.extend(self.max_length) and self._chain is not None:
            self._chain.show(self._lease.credential)
            await asyncio.sleep(self._swarm.longest_rtt_s(self._chain.route))

    async def _on_chain(self, batch: int, work: Callable[[Chain], Awaitable[Result]]) -> Result:
        """Do `work` on a chain whose caches hold the session's past; on a new one when the present one fails."""
        retry = Retry(self._swarm.config)
        while True:
            try:
                chain = self._chain or await self._open_chain(batch, retry)
                return await work(chain)
            except SwarmFailure as error:
                self._abandon()
                if self._was_open:
                    metrics.FAILOVERS.labels(failure_reason(error)).inc()
                    self._lease.clock.failovers += 1
                await self._lease.renew_for(error)
                if self._was_open and retry.attempts and isinstance(error, ServerFull):
                    self._lease.wait(Waiting(start_in_s=error.free_in_s))
                is_promised = self._was_open or self._lease.is_coordinated
                await retry.after(error, in_session=is_promised)
            except BaseException:  # cancelled in the middle: what the servers hold is not known any more
                self._abandon()
                raise

    async def _open_chain(self, batch: int, retry: Retry) -> Chain:
        config, lease = self._swarm.config, self._lease
        if lease.is_lost:
            lease.forget()
            await lease.decide(batch=batch, max_length=self.max_length, prompt_tokens=max(self._position, 1))
        is_new, self._planned_for = self._planned_for != lease.session_id, lease.session_id
        planned = self._swarm.hops_of(lease.advice) if is_new else ()
        route = planned or await self._swarm.chain_async(refresh=retry.attempts > 1)
        self._chain = chain = await open_chain(
            self._swarm,
            route,
            batch=batch,
            max_length=self.max_length,
            wait_s=config.connect_timeout if planned or retry.attempts else 0.0,
            credential=lease.credential,
            recovery=(self._was_open or lease.is_coordinated) and not planned,
        )
        lease.route, lease.waiting = chain.route, None
        self._was_open, self._can_grow = True, chain.can_grow
        if self._store is not None and self._position > 0:
            log.warning("session.recovery tokens=%d", self._position)
            past = self._store[:, : self._position]
            await chain.run(past, position=0, want=Want.NOTHING, prompts=self._prompts)
        return chain

    def _observe(self, tokens: int, took_s: float) -> None:
        if self._position == 0:
            metrics.TIME_TO_FIRST_TOKEN.observe(took_s)
        elif tokens == 1:
            metrics.INTER_TOKEN_LATENCY.observe(took_s)
        if self._owns_lease:
            self._lease.clock.step(took_s)

    def _remember(self, inputs: torch.Tensor, hypo_ids: torch.Tensor | None) -> None:
        if self._store is None:
            self._store = inputs.new_empty((inputs.shape[0], self.max_length, inputs.shape[2]))
        elif hypo_ids is not None:
            past = self._store[:, : self._position]
            past.copy_(past[hypo_ids])
        end = self._position + inputs.shape[1]
        if end > self._store.shape[1]:
            more = max(_LEAST_MORE_TOKENS, end // 4)
            self._store = torch.nn.functional.pad(self._store, (0, 0, 0, end - self._store.shape[1] + more))
        self._store[:, self._position : end] = inputs
        self._position = self._lease.tokens_used = end

    def _abandon(self) -> None:
        chain, self._chain = self._chain, None
        if chain is not None:
            chain.abort()

    async def _end(self) -> None:
        chain, self._chain = self._chain, None
        try:
            if chain is not None:
                await chain.close()
        finally:
            if self._owns_lease:
                self._lease.close()


def text_position(session: "weakref.ref[Any]") -> Callable[[], int]:
    """What the session's cache counts. A cycle here would keep a dropped session, and its caches, alive for a while."""

    def position() -> int:
        alive = session()
        return 0 if alive is None else max(0, alive.position - alive.prefix_tokens)

    return position


async def _nothing(chain: Chain) -> None:
    return None
