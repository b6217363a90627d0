"""Forward and backward passes through a chain of servers, nothing cached: what training is made of.

A server that fails is avoided, and the blocks that are still to do go through another chain: in a forward pass from the
block that was reached, in a backward pass within the blocks of the failed server, whose inputs are known.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from geopetals.client.config import ClientConfig
from geopetals.client.routing import Hop
from geopetals.errors import NoChain, ServerFull, ServerGone, SwarmFailure

log = logging.getLogger(__name__)

Result = TypeVar("Result")
MAX_TOKENS_PER_REQUEST = 1024
"""PETALS' limit; a single sequence that is longer goes as one request."""
_REQUESTS_AT_ONCE = 4


class Servers(Protocol):
    """What a pass needs of the swarm; SwarmClient has it. `*_on` make chains avoid a server that fails."""

    config: ClientConfig
    num_blocks: int

    async def chain_async(
        self, *, refresh: bool = False, start: int = 0, end: int | None = None
    ) -> tuple[Hop, ...]: ...

    async def forward_on(self, hop: Hop, hidden: Tensor, prompts: Tensor | None) -> Tensor: ...

    async def backward_on(
        self, hop: Hop, hidden: Tensor, grad_output: Tensor, prompts: Tensor | None
    ) -> tuple[Tensor, Tensor | None]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """A server that computed some blocks, and the hidden states [batch, tokens, hidden] that it was given."""

    hop: Hop
    inputs: Tensor


async def forward_batches(
    servers: Servers, hidden: Tensor, prompts: Tensor | None, *, keep_inputs: bool = False
) -> tuple[Tensor, list[list[Visit]]]:
    """Hidden states [batch, tokens, hidden] after all blocks, and with `keep_inputs` the visits of each request.

    The batch is split into requests of at most MAX_TOKENS_PER_REQUEST tokens. `prompts` [blocks, batch or 1, prefix,
    hidden] are added to the first positions of each block's input. Raises SwarmFailure.
    """
    rows = _rows_per_request(hidden)

    def forward(piece: Tensor, prompts: Tensor | None) -> Coroutine[Any, Any, tuple[Tensor, list[Visit]]]:
        return _forward_span(servers, piece, prompts, 0, servers.num_blocks, Retry(servers.config))

    results = await _gather([partial(forward, *piece) for piece in _pieces(hidden, prompts, rows)])
    visits = [piece_visits for _, piece_visits in results] if keep_inputs else []
    return torch.cat([output for output, _ in results]), visits


async def backward_batches(
    servers: Servers, visits: Sequence[Sequence[Visit]], grad_output: Tensor, prompts: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients with respect to the inputs and the prompts of `forward_batches`, whose visits these are."""
    rows = _rows_per_request(grad_output)
    pieces = _pieces(grad_output, prompts, rows)
    results = await _gather(
        [
            partial(_backward_span, servers, piece_visits, piece, piece_prompts)
            for piece_visits, (piece, piece_prompts) in zip(visits, pieces, strict=True)
        ]
    )
    grad_prompts = [grad for _, grad in results if grad is not None]
    grad_input = torch.cat([grad for grad, _ in results])
    if prompts is None:
        return grad_input, None
    if prompts.shape[1] == 1:
        return grad_input, torch.stack(grad_prompts).sum(dim=0)
    return grad_input, torch.cat(grad_prompts, dim=1)


class Retry:
    """Counts the failures of one pass and says when they are too many."""

    def __init__(self, config: ClientConfig) -> None:
        self._config = config
        self.attempts = 0

    async def after(self, error: SwarmFailure) -> None:
        """Returns when another chain may be tried, raises `error` when none is left to try."""
        nothing_has_failed_yet = isinstance(error, NoChain) and self.attempts == 0
        self.attempts += 1
        if nothing_has_failed_yet or self.attempts > self._config.max_retries:
            raise error
        log.warning("pass.retry attempt=%d reason=%s", self.attempts, error)
        if self.attempts > 1:
            backoff_s = self._config.min_backoff * 2 ** (self.attempts - 2)
            await asyncio.sleep(min(backoff_s, self._config.max_backoff))


async def _forward_span(
    servers: Servers, hidden: Tensor, prompts: Tensor | None, start: int, end: int, retry: Retry, *, answer: bool = True
) -> tuple[Tensor, list[Visit]]:
    """Through the blocks [start, end). Without `answer` the last server is chosen and not asked."""
    visits: list[Visit] = []
    chain: tuple[Hop, ...] = ()
    while start < end:
        try:
            if not chain:
                chain = await servers.chain_async(refresh=retry.attempts > 0, start=start, end=end)
            hop, *rest = chain
            output = hidden
            if answer or rest:
                output = await servers.forward_on(hop, hidden, _within(prompts, hop))
        except (ServerGone, ServerFull, NoChain) as error:
            await retry.after(error)
            chain = ()
            continue
        visits.append(Visit(hop=hop, inputs=hidden))
        hidden, start, chain = output, hop.end, tuple(rest)
    return hidden, visits


async def _backward_span(
    servers: Servers, visits: Sequence[Visit], grad: Tensor, prompts: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    retry = Retry(servers.config)
    left, grads_of_prompts = list(visits), []
    while left:
        hop, inputs = left[-1].hop, left[-1].inputs
        try:
            grad_input, grad_prompts = await servers.backward_on(hop, inputs, grad, _within(prompts, hop))
        except (ServerGone, ServerFull) as error:
            await retry.after(error)
            _, others = await _forward_span(servers, inputs, prompts, hop.start, hop.end, retry, answer=False)
            left[-1:] = others
            continue
        left.pop()
        grad = grad_input
        if grad_prompts is not None:
            grads_of_prompts.append(grad_prompts)
    return grad, torch.cat(grads_of_prompts[::-1]) if grads_of_prompts else None


def _within(prompts: Tensor | None, hop: Hop) -> Tensor | None:
    return None if prompts is None else prompts[hop.start : hop.end]


def _rows_per_request(hidden: Tensor) -> int:
    return max(1, MAX_TOKENS_PER_REQUEST // max(1, hidden.shape[1]))


def _pieces(tensor: Tensor, prompts: Tensor | None, rows: int) -> list[tuple[Tensor, Tensor | None]]:
    """Requests of at most `rows` sequences, each with its prompts."""
    pieces = tensor.split(rows)
    if prompts is None or prompts.shape[1] == 1:
        return [(piece, prompts) for piece in pieces]
    return list(zip(pieces, prompts.split(rows, dim=1), strict=True))


async def _gather(works: Sequence[Callable[[], Coroutine[Any, Any, Result]]]) -> list[Result]:
    """All results. Few at a time: many requests at once slow a server's computing down. The first failure ends all."""
    free = asyncio.Semaphore(_REQUESTS_AT_ONCE)

    async def limited(work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        async with free:
            return await work()

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(limited(work)) for work in works]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]
