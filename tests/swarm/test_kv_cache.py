"""Sliding windows: bounded memory, the same numbers. The reference is a cache that keeps everything."""

from itertools import chain, repeat
from typing import Any

import pytest
import torch
from torch import Tensor

from geopetals.errors import MemoryShortage, UnsupportedInput
from geopetals.swarm.kv_cache import LayerShape, SessionKV

WINDOW, BATCH, HEADS, DIM = 16, 3, 2, 4
SLOTS = WINDOW - 1 + 8


def session(window: int | None = WINDOW, *, max_length: int = 500) -> SessionKV:
    shape = LayerShape(key_heads=HEADS, key_dim=DIM, value_heads=HEADS, value_dim=DIM, window=window)
    return SessionKV(
        [shape],
        start=1,
        windows=[None, window, window],
        batch=BATCH,
        max_length=max_length,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


class Step:
    """One step of a session, and of one that keeps all tokens: what attention reads must be the same."""

    def __init__(self, kv: SessionKV) -> None:
        self.kv = kv
        self.seen = torch.empty(BATCH, HEADS, 0, DIM)
        self.generator = torch.Generator().manual_seed(0)

    def compute(self, tokens: int) -> Tensor:
        """Write keys and values as a forward pass does, without counting the tokens yet."""
        new = torch.randn(BATCH, HEADS, tokens, DIM, generator=self.generator)
        everything = torch.cat([self.seen, new], dim=2)
        length, offset = self.kv.cache.get_mask_sizes(tokens, 1)
        keys, values = self.kv.cache.update(new, -new, 1)
        assert offset == max(self.kv.length - WINDOW + 1, 0)
        assert torch.equal(keys, everything[:, :, offset : offset + length])
        assert torch.equal(values, -keys)
        return everything

    def take(self, tokens: int) -> None:
        self.seen = self.compute(tokens)
        self.kv.length += tokens


@pytest.mark.parametrize("steps", [[1] * 100, [40, *[1] * 60], [7] * 20, [3, 30, 1, 1, 50, 2, 1, 1, 9], [SLOTS, 1, 1]])
def test_a_step_reads_what_is_in_the_window(steps: list[int]) -> None:
    step = Step(session())
    for tokens in steps:
        step.take(tokens)


def test_memory_is_bounded_by_the_window_and_the_step() -> None:
    kv = session(max_length=10_000)
    token = 2 * BATCH * HEADS * DIM * 4
    assert kv.memory_bytes == SLOTS * token
    step = Step(kv)
    step.take(100)
    assert kv.memory_bytes == 100 * token
    step.take(60)
    assert kv.memory_bytes == (WINDOW - 1 + 60) * token
    step.take(1)
    assert kv.memory_bytes == SLOTS * token
    assert session(max_length=5).memory_bytes == 5 * token
    assert session(None, max_length=50).memory_bytes == 50 * token


def test_most_steps_move_nothing() -> None:
    kv = session()
    step = Step(kv)
    layer: Any = kv.cache.layers[1]
    moves = 0
    for _ in range(400):
        before = layer.first_held
        step.take(1)
        moves += layer.first_held != before
    assert moves <= 400 / 8


def test_reordered_rows_take_their_window_with_them() -> None:
    step = Step(session())
    for tokens, order in zip((40, 1, 1, 8, 1, 30, 1), chain([[2, 0, 0]], repeat([1, 2, 0])), strict=False):
        step.take(tokens)
        step.kv.reorder(torch.tensor(order))
        step.seen = step.seen[order]
    step.take(1)


@pytest.mark.parametrize("tokens", [1, 10, 100])
def test_a_step_that_failed_can_be_taken_again(tokens: int) -> None:
    step = Step(session())
    for before in (20, 1, 1, 1):
        step.take(before)
        step.compute(tokens)
        step.compute(tokens)
        step.take(1)


def test_tokens_are_forgotten_as_far_as_the_window_is_held() -> None:
    step = Step(session())
    for tokens in [10, *[1] * 30]:
        step.take(tokens)
    step.kv.truncate(39)
    step.seen = step.seen[:, :, :39]
    step.take(2)
    with pytest.raises(UnsupportedInput, match=r"give 0, or \d+ to 41"):
        step.kv.truncate(18)
    step.kv.truncate(0)
    step.seen = step.seen[:, :, :0]
    for tokens in (3, 30, 1):
        step.take(tokens)


def test_blocks_that_are_not_held_have_their_own_windows() -> None:
    assert session().cache.is_sliding == [False, True, True]


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("first", [1, 9, 15, 16, 40])
def test_a_session_grows_past_its_first_length(window: int | None, first: int) -> None:
    """In steps, with what it holds, and never beyond what the new length takes."""
    step, longest = Step(session(window, max_length=first)), first
    step.take(first)
    while longest < 100:
        longest += 13
        step.kv.grow(longest)
        assert step.kv.max_length == longest
        assert step.kv.memory_bytes <= session(None, max_length=longest).memory_bytes
        for _ in range(13):
            if window is None:
                step.seen = compare_whole(step)
            else:
                step.take(1)
    assert step.kv.length == longest


def compare_whole(step: Step) -> Tensor:
    new = torch.randn(BATCH, HEADS, 1, DIM, generator=step.generator)
    everything = torch.cat([step.seen, new], dim=2)
    keys, values = step.kv.cache.update(new, -new, 1)
    assert torch.equal(keys, everything)
    assert torch.equal(values, -keys)
    step.kv.length += 1
    return everything


def test_growing_to_less_changes_nothing() -> None:
    kv = session(max_length=50)
    kv.grow(20)
    assert kv.max_length == 50


def test_a_cache_that_cannot_grow_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(session(None, max_length=20))
    step.seen = torch.empty(BATCH, HEADS, 0, DIM)
    step.seen = compare_whole(step)

    def full(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(Tensor, "new_empty", full)
    with pytest.raises(MemoryShortage, match="40 tokens does not fit"):
        step.kv.grow(40)
    assert step.kv.max_length == 20
    compare_whole(step)
