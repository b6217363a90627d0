"""An inference session: attention caches on a chain of servers, extended step by step.

The session keeps the hidden states it has sent into block 0 (batch x tokens x hidden values). When a server fails, a
new chain is opened, fed that history, and goes on with the step that failed.
"""

import asyncio
import contextlib
import logging
import time
import weakref
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import torch

from geopetals.client.hollow import RemoteCache
from geopetals.client.hop import HopSession
from geopetals.client.routing import Hop
from geopetals.client.swarm import SwarmClient
from geopetals.errors import NoChain, ServerFull, ServerGone, ServerRefused, SwarmFailure, UnsupportedInput

log = logging.getLogger(__name__)

Result = TypeVar("Result")
_CHUNK_BYTES = 16 * 2**20


class InferenceSession:
    """One batch of sequences of at most `max_length` tokens. A context manager, for one thread at a time.

    The first `prefix_tokens` of them are trained prompts in front of the text: `cache` counts the text alone.
    """

    def __init__(self, swarm: SwarmClient, max_length: int, *, prefix_tokens: int = 0) -> None:
        self._closed = True
        if max_length < 1:
            raise UnsupportedInput(f"a session needs max_length of at least 1 token, got {max_length}.")
        self._swarm = swarm
        self.max_length = max_length
        self.prefix_tokens = prefix_tokens
        self.output_ids: torch.Tensor | None = None
        self.cache = RemoteCache(text_position(weakref.ref(self)), swarm.num_blocks)
        self._hops: list[HopSession] = []
        self._prompts: torch.Tensor | None = None
        self._store: torch.Tensor | None = None
        self._position = 0
        self._closed = False

    @property
    def position(self) -> int:
        """Tokens that the servers have processed."""
        return self._position

    @property
    def route(self) -> tuple[Hop, ...]:
        """The chain in use; empty before the first step."""
        return tuple(session.hop for session in self._hops)

    def step(
        self, hidden: torch.Tensor, hypo_ids: torch.Tensor | None = None, prompts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Hidden states [batch, tokens, hidden] of new tokens through all blocks, on the device and in the format
        given.

        `hypo_ids` [batch]: row i continues what row hypo_ids[i] was. `prompts` [blocks, batch or 1, prefix, hidden],
        in the first step only, are added to the first positions of each block's input. Raises UnsupportedInput for a
        step that does not fit the session, SwarmFailure when no chain can do it.
        """
        if self._closed:
            raise UnsupportedInput("the session is closed: open a new one.")
        if self._position + hidden.shape[1] > self.max_length:
            raise UnsupportedInput(
                f"{self._position} tokens and {hidden.shape[1]} more exceed the session's max_length "
                f"of {self.max_length}: open a longer one."
            )
        if self._store is not None and self._store.shape[0] != hidden.shape[0]:
            raise UnsupportedInput(f"the session has a batch of {self._store.shape[0]}, got {hidden.shape[0]}.")
        if prompts is not None:
            if self._position > 0:
                raise UnsupportedInput(
                    "prompts belong to the first step of a session: open a new one for other prompts."
                )
            self._prompts = prompts.detach().cpu()
        inputs = hidden.detach().cpu()
        output = self._swarm.run(self.step_async(inputs, None if hypo_ids is None else hypo_ids.cpu()))
        return output.to(device=hidden.device, dtype=hidden.dtype)

    def open(self, batch: int) -> None:
        """Reserve the caches for `batch` sequences now; the first step does it otherwise."""
        if self._closed:
            raise UnsupportedInput("the session is closed: open a new one.")
        if not self._hops:
            self._swarm.run(self._on_chain(batch, _nothing))

    def close(self) -> None:
        """Free the caches on the servers. Never raises."""
        if not self._closed:
            self._closed = True
            with contextlib.suppress(SwarmFailure):  # the connection is closed already, and the caches with it
                self._swarm.run(self._close_hops())

    def __enter__(self) -> "InferenceSession":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Blocking here could be blocking the event loop itself: only drop the connections.
        if not self._closed:
            for session in self._hops:
                self._swarm.call_soon(session.abort)

    # -- on the event loop ---------------------------------------------------------------------------------------------

    async def step_async(self, inputs: torch.Tensor, hypo_ids: torch.Tensor | None) -> torch.Tensor:
        output = await self._on_chain(inputs.shape[0], lambda: self._run(inputs, hypo_ids))
        self._remember(inputs, hypo_ids)
        return output

    async def _on_chain(self, batch: int, work: Callable[[], Awaitable[Result]]) -> Result:
        """Do `work` on a chain whose caches hold the session's past; on a new one when the present one fails."""
        full_deadline = time.monotonic() + self._swarm.config.full_timeout
        attempt = 0
        while True:
            try:
                if not self._hops:
                    await self._open_chain(batch, retry=attempt > 0)
                    if self._store is not None and self._position > 0:
                        await self._replay(self._store[:, : self._position])
                return await work()
            except SwarmFailure as error:
                self._abandon()
                attempt += 1
                await self._wait_before_retry(error, attempt, full_deadline)
            except BaseException:  # cancelled in the middle: what the servers hold is not known any more
                self._abandon()
                raise

    async def _wait_before_retry(self, error: SwarmFailure, attempt: int, full_deadline: float) -> None:
        """Returns when another try makes sense, raises `error` when none does."""
        config = self._swarm.config
        if isinstance(error, ServerFull):
            if time.monotonic() >= full_deadline:
                raise error
        elif (
            isinstance(error, ServerRefused)
            or attempt > config.max_retries
            or (isinstance(error, NoChain) and self._position == 0 and attempt == 1)
        ):
            raise error
        log.warning("session.retry attempt=%d reason=%s", attempt, error)
        if attempt > 1:
            await asyncio.sleep(min(config.min_backoff * 2 ** (attempt - 2), config.max_backoff))

    async def _open_chain(self, batch: int, *, retry: bool) -> None:
        """Reserve cache on every server of the best chain, at the same time on all."""
        chain = await self._swarm.chain_async(refresh=retry)
        config = self._swarm.config
        openings = [
            asyncio.create_task(
                HopSession.open(
                    self._swarm.network.p2p,
                    hop,
                    self._swarm.swarm,
                    batch=batch,
                    hidden_size=self._swarm.hidden_size,
                    max_length=self.max_length,
                    connect_timeout_s=config.connect_timeout,
                    request_timeout_s=config.request_timeout,
                    alloc_timeout_s=config.connect_timeout if retry else 0.0,
                )
            )
            for hop in chain
        ]
        try:
            results = await asyncio.gather(*openings, return_exceptions=True)
        except asyncio.CancelledError:  # some are open already: their servers hold cache for us
            for opening in openings:
                opening.add_done_callback(_abort_if_open)
            raise
        self._hops = [result for result in results if isinstance(result, HopSession)]
        for opened in self._hops:
            self._swarm.track(opened)
        for hop, result in zip(chain, results, strict=True):
            if isinstance(result, ServerGone | ServerFull):
                self._swarm.avoid(hop.peer_id, result)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        log.debug("session.open route=%s", ",".join(f"{hop.start}:{hop.end}" for hop in chain))

    async def _run(self, inputs: torch.Tensor, hypo_ids: torch.Tensor | None) -> torch.Tensor:
        """All blocks for new tokens, long prompts in pieces; `hypo_ids` go with the first piece."""
        outputs, position = [], self._position
        for piece in inputs.split(self._chunk_tokens(inputs), dim=1):
            outputs.append(await self._run_piece(piece, hypo_ids, position))
            hypo_ids = None
            position += piece.shape[1]
        return torch.cat(outputs, dim=1)

    async def _run_piece(self, hidden: torch.Tensor, hypo_ids: torch.Tensor | None, position: int) -> torch.Tensor:
        for session in self._hops:
            prompts = self._prompts_for(session.hop, position, hidden.shape[1])
            try:
                hidden = await session.step(hidden, hypo_ids, prompts)
            except ServerGone as error:
                self._swarm.avoid(session.hop.peer_id, error)
                raise
        return hidden

    async def _replay(self, history: torch.Tensor) -> None:
        log.warning("session.recovery tokens=%d", history.shape[1])
        position = 0
        for piece in history.split(self._chunk_tokens(history), dim=1):
            await self._run_piece(piece, None, position)
            position += piece.shape[1]

    def _prompts_for(self, hop: Hop, position: int, tokens: int) -> torch.Tensor | None:
        """What is added to the tokens from `position` on in the blocks of one hop."""
        if self._prompts is None or position >= self._prompts.shape[2]:
            return None
        return self._prompts[hop.start : hop.end, :, position : position + tokens]

    def _chunk_tokens(self, hidden: torch.Tensor) -> int:
        return max(1, _CHUNK_BYTES // (hidden.shape[0] * hidden.shape[2] * hidden.element_size()))

    def _remember(self, inputs: torch.Tensor, hypo_ids: torch.Tensor | None) -> None:
        if self._store is None:
            self._store = inputs.new_empty((inputs.shape[0], self.max_length, inputs.shape[2]))
        elif hypo_ids is not None:
            past = self._store[:, : self._position]
            past.copy_(past[hypo_ids])
        end = self._position + inputs.shape[1]
        self._store[:, self._position : end] = inputs
        self._position = end

    def _abandon(self) -> None:
        hops, self._hops = self._hops, []
        for session in hops:
            session.abort()

    async def _close_hops(self) -> None:
        hops, self._hops = self._hops, []
        await asyncio.gather(*(session.close() for session in hops), return_exceptions=True)


def text_position(session: "weakref.ref[Any]") -> Callable[[], int]:
    """What the session's cache counts. A cycle here would keep a dropped session, and its caches, alive for a while."""

    def position() -> int:
        alive = session()
        return 0 if alive is None else max(0, alive.position - alive.prefix_tokens)

    return position


def _abort_if_open(opening: "asyncio.Task[HopSession]") -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().abort()


async def _nothing() -> None:
    return None
