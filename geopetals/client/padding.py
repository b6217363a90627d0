"""Prompts of unequal length in one batch: as many sessions side by side as there are lengths.

PETALS' protocol has no attention mask, and needs none: rows with the same padding form a session of their own, which
never sees the padding. Positions then start at 0 with each row's first real token, as in Transformers' own generate().
"""

import asyncio
import time
import weakref

import torch

from geopetals.client.hollow import RemoteCache
from geopetals.client.lease import Waiting
from geopetals.client.routing import Hop
from geopetals.client.session import InferenceSession, text_position
from geopetals.client.swarm import SwarmClient
from geopetals.errors import UnsupportedInput


def left_padding(attention_mask: torch.Tensor) -> torch.Tensor:
    """Padded positions [batch] in front of each row. Raises UnsupportedInput for any other kind of mask."""
    mask = attention_mask.bool().cpu()
    if (
        mask.ndim != 2
        or mask.shape[1] == 0
        or not bool(mask[:, -1:].all())
        or bool((mask[:, :-1] & ~mask[:, 1:]).any())
    ):
        raise UnsupportedInput(
            "generate() takes prompts that are padded on the left: set tokenizer.padding_side = 'left'."
        )
    return (~mask).sum(dim=1)


class PaddedSession:
    """Behaves as one InferenceSession for a left-padded batch; `position` and `max_length` count the padding.

    `padding` [batch] is the padding of each prompt, which generate() may repeat in several rows for beams.
    """

    prefix_tokens = 0

    def __init__(
        self, swarm: SwarmClient, max_length: int, padding: torch.Tensor, *, output_tokens: int | None = None
    ) -> None:
        self._swarm = swarm
        self._lease = swarm.lease(output_tokens=output_tokens)
        self.max_length = max_length
        self.output_ids: torch.Tensor | None = None
        self.cache = RemoteCache(text_position(weakref.ref(self)), swarm.num_blocks)
        self._prompt_padding = padding
        self._rows: list[torch.Tensor] = []
        self._padding: list[int] = sorted(set(padding.tolist()))
        self._sessions = [InferenceSession(swarm, max_length - length, lease=self._lease) for length in self._padding]
        self._position = 0

    @property
    def position(self) -> int:
        return self._position

    @property
    def route(self) -> tuple[Hop, ...]:
        """The chain of the first of the sessions; empty before the first step."""
        return self._sessions[0].route

    @property
    def waiting(self) -> Waiting | None:
        """What the sessions wait for while they have no cache yet, for other threads to see."""
        return self._lease.waiting

    def step(
        self,
        hidden: torch.Tensor,
        hypo_ids: torch.Tensor | None = None,
        prompts: torch.Tensor | None = None,
        *,
        last_only: bool = False,
    ) -> torch.Tensor:
        """As InferenceSession.step(); hidden states of padding come back as zeros."""
        if prompts is not None:
            raise UnsupportedInput("tuned prompts go with texts of equal length: generate them one by one.")
        if not self._rows:
            self._assign_rows(hidden.shape[0])
        inputs = hidden.detach().cpu()
        ids = None if hypo_ids is None else hypo_ids.cpu()
        output = self._swarm.run(self._step_async(inputs, ids, last_only))
        self._position += hidden.shape[1]
        return output.to(device=hidden.device, dtype=hidden.dtype)

    def close(self) -> None:
        """Free the caches on the servers. Never raises."""
        for session in self._sessions:
            session.close()
        self._swarm.call_soon(self._lease.close)

    def __enter__(self) -> "PaddedSession":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _assign_rows(self, batch: int) -> None:
        """generate() repeats each prompt's row for beams and return sequences before the first step."""
        expansion, odd = divmod(batch, len(self._prompt_padding))
        if odd:
            raise UnsupportedInput(f"the attention mask has {len(self._prompt_padding)} rows, the batch {batch}.")
        padding = self._prompt_padding.repeat_interleave(expansion)
        self._rows = [(padding == length).nonzero().flatten() for length in self._padding]

    async def _step_async(self, inputs: torch.Tensor, hypo_ids: torch.Tensor | None, last_only: bool) -> torch.Tensor:
        # One place for all rows: sessions that have one each would wait for each other.
        await self._lease.decide(batch=inputs.shape[0], max_length=self.max_length, prompt_tokens=inputs.shape[1])
        began_s = time.perf_counter()
        output = torch.zeros_like(inputs[:, -1:] if last_only else inputs)
        works = []
        for session, rows, length in zip(self._sessions, self._rows, self._padding, strict=True):
            skipped = min(max(length - self._position, 0), inputs.shape[1])
            ids = None if hypo_ids is None else _within(rows, hypo_ids)
            works.append((rows, skipped, session.step_async(inputs[rows, skipped:], ids, last_only=last_only)))
        tasks = [asyncio.create_task(work) for _, _, work in works]
        try:
            results = await asyncio.gather(*tasks)
        finally:  # where one fails the others must not go on opening chains
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for (rows, skipped, _), result in zip(works, results, strict=True):
            output[rows, 0 if last_only else skipped :] = result
        self._lease.clock.step(time.perf_counter() - began_s)
        return output


def _within(rows: torch.Tensor, hypo_ids: torch.Tensor) -> torch.Tensor:
    """The reordering of one group of rows: beams stay with their prompt, and so within its group."""
    place = torch.full((len(hypo_ids),), -1)
    place[rows] = torch.arange(len(rows))
    ids = place[hypo_ids[rows]]
    if bool((ids < 0).any()):
        raise UnsupportedInput("a reordering that mixes prompts of unequal length is not supported.")
    return ids


AnySession = InferenceSession | PaddedSession
