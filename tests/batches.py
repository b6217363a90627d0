"""Sessions on one stage twice: their decode steps in batches, and one session after another."""

from collections.abc import Sequence

import torch
from torch import Tensor

from geopetals.swarm.kv_cache import SessionKV
from geopetals.swarm.stage import Stage


class Twins:
    """Two caches that are to stay equal: `together` is computed in batches, `alone` never."""

    def __init__(self, stage: Stage, span: range, *, batch: int, max_length: int, seed: int) -> None:
        self._stage, self._span = stage, span
        self._generator = torch.Generator().manual_seed(seed)
        self.together, self.alone = (self._cache(batch, max_length) for _ in range(2))

    @property
    def room(self) -> int:
        return self.together.max_length - self.together.length

    def hidden(self, tokens: int) -> Tensor:
        return torch.randn(self.together.batch, tokens, self._stage.hidden_size, generator=self._generator)

    def prefill(self, tokens: int) -> None:
        hidden = self.hidden(tokens)
        for kv in (self.together, self.alone):
            self._stage.run(hidden, self._span.start, self._span.stop, kv=kv)

    def _cache(self, batch: int, max_length: int) -> SessionKV:
        return self._stage.allocate_kv(self._span.start, self._span.stop, batch=batch, max_length=max_length)


def decode(stage: Stage, span: range, twins: Sequence[Twins]) -> float:
    """One token for each of the sessions; how far the batch is from what each gives alone, relative to the largest."""
    inputs = [twin.hidden(1) for twin in twins]
    batch = stage.decode(torch.cat(inputs), span.start, span.stop, [twin.together for twin in twins])
    expected = [
        stage.run(hidden, span.start, span.stop, kv=twin.alone) for hidden, twin in zip(inputs, twins, strict=True)
    ]
    assert [twin.together.length for twin in twins] == [twin.alone.length for twin in twins]
    whole = torch.cat(expected)
    return float((batch - whole).abs().max() / whole.abs().max())


def decode_error(stage: Stage, *, steps: int = 6) -> float:
    """The largest difference for sessions of 1, 2 and 1 sequences at different positions, one of which stalls."""
    span = range(stage.start, stage.end)
    twins = []
    for seed, (batch, length) in enumerate([(1, 13), (2, 4), (1, 1)]):
        twins.append(Twins(stage, span, batch=batch, max_length=length + steps, seed=seed))
        twins[-1].prefill(length)
    return max(decode(stage, span, twins if step % 3 else twins[1:]) for step in range(steps))
