"""How long this machine takes for a model's blocks, measured on some of them before the server joins a swarm.

Blocks in the middle stand for all: the first and the last ones differ in some families. A pass through two blocks and
one through a single block tell what a block takes from what a pass takes whatever its length. What is measured is what
a server does: prompts go in the scheduler's pieces, sessions are decoded together.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from geopetals.coordinator.messages import DecodeSample, PrefillSample
from geopetals.swarm.kv_cache import SessionKV
from geopetals.swarm.scheduler import PIECE_TOKENS
from geopetals.swarm.stage import Stage

BUDGET_S = 8.0
HOP_SOFTWARE_S = 0.001
"""Serialization, p2pd and the hand-over between threads, for a decode token of one session: 0.9 ms, measured."""
_BLOCKS = 2
_PROMPTS = (32, 128, 512, 2048)
_MOST_STEPS, _LEAST_STEPS = 16, 2
_POINT_S = 0.25
_LEAST_S = 1e-9

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Seconds per block. `pass_s` is what a pass takes beside its blocks, however many they are."""

    decode: tuple[DecodeSample, ...]
    prefill: tuple[PrefillSample, ...]
    pass_s: float


def representative_span(num_blocks: int) -> tuple[int, int]:
    """Blocks in the middle of the model."""
    count = min(_BLOCKS, num_blocks)
    start = (num_blocks - count) // 2
    return start, start + count


def measure_curve(stage: Stage, *, budget_s: float = BUDGET_S, clock: Clock = time.perf_counter) -> Curve:
    """Measure what can be measured in about `budget_s`, the most telling points first. For the compute thread.

    There is always a prompt and a decode step, however long they take.
    """
    with torch.inference_mode():
        return _Profiler(stage, budget_s, clock).measure()


class _Profiler:
    def __init__(self, stage: Stage, budget_s: float, clock: Clock) -> None:
        self._stage, self._clock = stage, clock
        self._blocks = stage.end - stage.start
        self._budget_s, self._ends_at = budget_s, clock() + budget_s
        self._filled: dict[int, SessionKV] = {}

    def measure(self) -> Curve:
        prefill_s = self._prefill_all()
        short = max((tokens for tokens in self._filled if tokens <= 128), default=min(self._filled))
        long = max(self._filled)
        whole_s = self._decode(1, short)
        pass_s = self._pass_s(whole_s, short)
        points = [(8, short), (1, long), (2, short), (4, short), (16, short), (8, long)]
        decode = {(1, short): whole_s}
        for batch, context in points:
            if (batch, context) not in decode and self._left_s > 4 * _POINT_S:
                decode[batch, context] = self._decode(batch, context)
        return Curve(
            decode=tuple(DecodeSample(*point, self._per_block(took_s, pass_s)) for point, took_s in decode.items()),
            prefill=tuple(PrefillSample(tokens, self._per_block(took_s, 0.0)) for tokens, took_s in prefill_s.items()),
            pass_s=pass_s,
        )

    @property
    def _left_s(self) -> float:
        return self._ends_at - self._clock()

    def _per_block(self, took_s: float, pass_s: float) -> float:
        return max((took_s - pass_s) / self._blocks, _LEAST_S)

    def _prefill_all(self) -> dict[int, float]:
        """Seconds of a pass through all blocks, by the prompt's length. What comes next is expected to take in
        proportion; prompts take at most half of the time.
        """
        took: dict[int, float] = {}
        tokens, began = 0, self._clock()
        for longer in self._prompts():
            if took and longer / tokens * took[tokens] > self._budget_s / 2 - (self._clock() - began):
                break
            tokens = longer
            took[tokens] = self._prefill(tokens)
        return took

    def _prompts(self) -> list[int]:
        positions = getattr(self._stage.config, "max_position_embeddings", None) or max(_PROMPTS)
        most = int(positions) - _MOST_STEPS - 1
        return [tokens for tokens in _PROMPTS if tokens <= most] or [1]

    def _prefill(self, tokens: int) -> float:
        kv = self._allocate(tokens)
        if not self._filled:  # what happens at first only: memory, code
            self._feed(kv, tokens)
            kv = self._allocate(tokens)
        took_s = self._timed(lambda: self._feed(kv, tokens))
        self._filled[tokens] = kv
        return took_s

    def _allocate(self, tokens: int) -> SessionKV:
        start, end = self._stage.start, self._stage.end
        return self._stage.allocate_kv(start, end, batch=1, max_length=tokens + _MOST_STEPS + 1)

    def _feed(self, kv: SessionKV, tokens: int) -> None:
        piece = self._stage.piece_tokens(kv, tokens, PIECE_TOKENS)
        for done in range(0, tokens, piece):
            hidden = self._hidden(1, min(piece, tokens - done))
            self._stage.run(hidden, self._stage.start, self._stage.end, kv=kv)

    def _decode(self, batch: int, context: int, *, blocks: int | None = None) -> float:
        """Seconds of a step of `batch` sessions through all blocks, or so many of them."""
        sessions = [copy.deepcopy(self._filled[context]) for _ in range(batch)]
        hidden = self._hidden(batch, 1)
        start = self._stage.start
        end = self._stage.end if blocks is None else start + blocks

        def step() -> None:
            self._stage.decode(hidden, start, end, sessions)

        took = [self._timed(step)]
        if took[0] < _POINT_S:  # the first one warms up; of a slow device it is as good as any
            took.clear()
        while len(took) < _LEAST_STEPS or (sum(took) < _POINT_S and len(took) < _MOST_STEPS):
            took.append(self._timed(step))
        return median(took)

    def _pass_s(self, whole_s: float, context: int) -> float:
        if self._blocks == 1:
            return 0.0
        one_s = self._decode(1, context, blocks=1)
        block_s = (whole_s - one_s) / (self._blocks - 1)
        return min(max(one_s - block_s, 0.0), one_s / 2)

    def _hidden(self, batch: int, tokens: int) -> Tensor:
        return torch.zeros(batch, tokens, self._stage.hidden_size, dtype=self._stage.dtype, device=self._stage.device)

    def _timed(self, work: Callable[[], None]) -> float:
        began = self._clock()
        work()
        if self._stage.device.type == "cuda":
            torch.cuda.synchronize(self._stage.device)
        return max(self._clock() - began, _LEAST_S)
