"""Who computes when: decode steps of different sessions that wait are one forward pass, long prefills go in pieces."""

import asyncio
import logging
import queue
import time
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from geopetals import metrics
from geopetals.swarm import block_ops
from geopetals.swarm.block_ops import StepInput
from geopetals.swarm.compute import ComputeThread, Priority, attempt, settle
from geopetals.swarm.kv_cache import SessionKV
from geopetals.swarm.stage import Stage
from geopetals.swarm.waiting_window import WaitingWindow

log = logging.getLogger(__name__)

# Decode steps wait for at most one piece of somebody's prefill. Fewer tokens would use the device badly.
PIECE_TOKENS = 256
MOST_ROWS = 128
FREE_PADDED_TOKENS = 8192
"""Copies side by side, over all rows, that are small whatever part of them is padding. Others are half padding at most.
"""
_MOST_PADDED = 2


@dataclass(frozen=True, slots=True, eq=False)
class Decode:
    """A step of one token that waits. Only steps of the same `group` can be one batch."""

    kv: SessionKV
    span: range
    step: StepInput
    answer: asyncio.Future[Tensor]
    group: Hashable
    arrived_at: float


class Scheduler:
    """Steps come in on the event loop and are computed in the compute thread.

    Decode steps are batched continuously: a batch is whatever waits when the thread is free, but for the waiting
    window. `batch_sizes` counts batches by how many sessions were in them.
    """

    def __init__(self, stage: Stage, compute: ComputeThread) -> None:
        self._stage, self._compute = stage, compute
        self._arrived: queue.SimpleQueue[Decode] = queue.SimpleQueue()
        self._is_due = False
        self._waiting: list[Decode] = []
        self._window = WaitingWindow()
        self.batch_sizes: Counter[int] = Counter()

    async def infer(self, kv: SessionKV, span: range, step: StepInput) -> Tensor:
        """Hidden states [batch, tokens, hidden] after the blocks of `span`; `kv` then holds these tokens.

        The steps of one session must come one after another. Raises WireError and what the stage raises.
        """
        block_ops.check_room(kv, step)
        kv.compute_s = 0.0
        if step.hidden.shape[1] == 1 and step.prompts is None:
            return await self._decode(kv, span, step)
        pieces = _pieces(step, self._stage.piece_tokens(kv, step.hidden.shape[1], PIECE_TOKENS))
        outputs = [await self._compute.run(self._timed(kv, span, piece), Priority.PREFILL) for piece in pieces]
        metrics.count_step(step.hidden.shape[0] * step.hidden.shape[1], decode=False)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _job(self, kv: SessionKV, span: range, step: StepInput) -> Callable[[], Tensor]:
        return lambda: block_ops.infer(self._stage, span, kv, step)

    def _timed(self, kv: SessionKV, span: range, step: StepInput) -> Callable[[], Tensor]:
        job, arrived_at = self._job(kv, span, step), time.monotonic()

        def timed() -> Tensor:
            began = time.monotonic()
            output = job()
            took_s = time.monotonic() - began
            kv.compute_s += took_s
            metrics.HOP_QUEUE.observe(began - arrived_at)
            metrics.HOP_COMPUTE.observe(took_s)
            return output

        return timed

    async def _decode(self, kv: SessionKV, span: range, step: StepInput) -> Tensor:
        answer: asyncio.Future[Tensor] = asyncio.get_running_loop().create_future()
        reorders = step.hypo_ids is not None  # not to be done twice if a batch fails: such a step goes alone
        # The window remembers groups for as long as their sessions live: a group must not hold its session.
        group: Hashable = object() if reorders else (span.start, span.stop, self._stage.past_rope_limit(kv))
        self._arrived.put(Decode(kv, span, step, answer, group, time.monotonic()))
        self._call_for_a_turn()
        output = await answer
        metrics.count_step(output.shape[0], decode=True)
        return output

    def _call_for_a_turn(self) -> None:
        if not self._is_due:
            self._is_due = True
            self._compute.submit(self._take_turn, Priority.INFERENCE)

    # -- in the compute thread -----------------------------------------------------------------------------------------

    def _take_turn(self) -> None:
        self._is_due = False  # before looking: what comes after it calls for another turn
        batch = self._next_batch()
        if batch:
            self._execute(batch)
        if self._waiting:
            self._call_for_a_turn()

    def _next_batch(self) -> list[Decode]:
        """The group whose first step has waited longest, after the waiting window."""
        since = time.monotonic()
        # While others are computed for, the sessions that are away come back anyway.
        may_wait = self._stage.batches and not self._compute.others_wait(Priority.INFERENCE)
        self._collect(0.0)
        while self._waiting:
            group = self._waiting[0].group
            batch = self._fitting([decode for decode in self._waiting if decode.group == group])
            if may_wait and sum(decode.kv.batch for decode in batch) < MOST_ROWS:
                wait_s = self._window.wait_s(group, [decode.kv for decode in batch], since, time.monotonic())
                if wait_s > 0:
                    self._collect(wait_s)
                    continue
            self._waiting = [decode for decode in self._waiting if decode not in batch]
            batch = [decode for decode in batch if not decode.answer.cancelled()]
            if batch:
                return batch
        return []

    def _fitting(self, steps: list[Decode]) -> list[Decode]:
        """As many as make a batch."""
        if not self._stage.batches:
            return steps[:1]
        is_padded = self._stage.batching.layout == "padded"
        rows = longest = held = 0
        batch = list[Decode]()
        for decode in steps:
            more, length = decode.kv.batch, decode.kv.length + 1
            if batch and rows + more > MOST_ROWS:
                break
            padded = (rows + more) * max(longest, length)
            if batch and is_padded and padded > max(FREE_PADDED_TOKENS, _MOST_PADDED * (held + more * length)):
                continue  # a batch of its own, or of others as long, comes next
            rows, longest, held = rows + more, max(longest, length), held + more * length
            batch.append(decode)
        return batch

    def _collect(self, timeout_s: float) -> bool:
        """Put steps that have arrived in line, waiting for the first one if told to; False if there was none."""
        found = False
        while True:
            try:
                decode = self._arrived.get(timeout=timeout_s) if timeout_s > 0 else self._arrived.get_nowait()
            except queue.Empty:
                return found
            self._window.arrived(decode.kv, decode.arrived_at)
            self._waiting.append(decode)
            found, timeout_s = True, 0.0

    def _execute(self, batch: list[Decode]) -> None:
        """Compute one batch and answer it: the one place where so many sessions' decode steps are computed."""
        began = time.monotonic()
        self.batch_sizes[len(batch)] += 1
        results = self._compute_batch(batch)
        now = time.monotonic()
        for decode in batch:
            decode.kv.compute_s = now - began
        self._compute.tell_loop(lambda: _answer(batch, results))  # people wait for it, for the rest nobody does
        self._window.cost.note(len(batch), now - began)
        self._window.answered([decode.kv for decode in batch], batch[0].group, now)
        metrics.BATCH_SIZE.observe(len(batch))
        for decode in batch:
            metrics.HOP_QUEUE.observe(began - decode.arrived_at)
            metrics.HOP_COMPUTE.observe(now - began)

    def _compute_batch(self, batch: list[Decode]) -> list[Tensor | BaseException]:
        if len(batch) > 1:
            try:
                steps = [(decode.kv, decode.step) for decode in batch]
                return list(block_ops.infer_together(self._stage, batch[0].span, steps))
            except Exception as error:  # noqa: BLE001 - whose fault it is shows when each is computed alone
                log.warning("batch.failed sessions=%d reason=%r", len(batch), error)
        return [attempt(self._job(decode.kv, decode.span, decode.step)) for decode in batch]


def _answer(batch: list[Decode], results: list[Tensor | BaseException]) -> None:
    for decode, result in zip(batch, results, strict=True):
        settle(decode.answer, result)


def _pieces(step: StepInput, tokens: int) -> list[StepInput]:
    """A long step as several: beams are reordered and prompts added in the first one."""
    first = tokens if step.prompts is None else max(tokens, step.prompts.shape[2])
    if step.hidden.shape[1] <= first:
        return [step]
    rest = step.hidden[:, first:].split(tokens, dim=1)
    later = [StepInput(hidden=hidden, prompts=None, hypo_ids=None) for hidden in rest]
    return [replace(step, hidden=step.hidden[:, :first]), *later]
