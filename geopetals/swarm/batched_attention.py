"""Attention of decode steps whose sessions are at different positions, in one forward pass of the model's own code.

Linear layers see all rows at once. Keys and values stay where they are, in each session's own cache, and reach
attention in one of two layouts:

  rows    a list of views, one for each session; attention runs session by session, nothing is padded or copied
  padded  copies side by side, filled up with zeros to the longest, for models whose attention takes only tensors; the
          copies of one block live until the next block is computed

The model's own mask function is asked for each row's own position. The hooks are Transformers' registries of masks and
attention, which models look up by the name in their config. For rows that name is changed for the time of such a pass.
Side by side it stays, as some models compare it: the masks of that name are others in a thread that computes a batch.
"""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from geopetals.swarm.kv_cache import SessionKV

Layout = Literal["rows", "padded"]
NATIVE = ("sdpa", "eager")
_NAME = "geopetals_batch"


class _Rows(list[Any]):
    """One tensor for each session where models expect one for all."""


class DecodeBatch:
    """One token for every sequence of `sessions`, after what their caches hold; all for the same blocks.

    `cache` stands for all their caches. What it tells the model of its length must not matter: `claimed_length` is
    told instead of the longest, and `padding` more zeros are put behind keys and values that are side by side.
    """

    def __init__(
        self, sessions: Sequence[SessionKV], layout: Layout, *, claimed_length: int | None = None, padding: int = 0
    ) -> None:
        self.layout, self._padding = layout, padding
        self.sizes = [session.batch for session in sessions]
        self.lengths = [session.length for session in sessions]
        device = sessions[0].device
        rows = [session.length for session in sessions for _ in range(session.batch)]
        self.positions = torch.tensor(rows, device=device)[:, None]
        stacks = list(zip(*(session.cache.layers for session in sessions), strict=True))
        # A model asks one layer of each kind for the size of its masks: the kind is told by the offset it answers.
        windows = list(dict.fromkeys([None, *(stack[0].window for stack in stacks)]))
        self._views = [_View(window, self.lengths) for window in windows]
        length = max(self.lengths) + padding if claimed_length is None else claimed_length
        layers = [_BatchLayer(self, stack, windows.index(stack[0].window), length) for stack in stacks]
        self.cache = Cache(layers=layers)  # type: ignore[arg-type]

    def longest(self, kind: int) -> int:
        """Keys that a row has in blocks of a kind, side by side."""
        return max(self._views[kind].counts) + self._padding

    def mask(self, kind: int, mask_function: Any, device: torch.device) -> Tensor | _Rows | None:
        """Which keys each row sees: bool [rows, 1, 1, longest], or one for each session (None: all of them)."""
        view = self._views[kind]
        if self.layout == "rows" and mask_function is causal_mask_function:
            return None
        counts = self._by_row(view.counts, device)
        slots = torch.arange(self.longest(kind), device=device)[None, None, None]
        ones = self.positions.new_zeros(1, 1, 1, 1)
        number = torch.arange(len(self.positions), device=device)[:, None, None, None]
        seen: Tensor = mask_function(
            number, ones, self.positions[:, None, None], slots + self._by_row(view.firsts, device)
        )
        held = slots < counts
        seen = (seen & held).expand(len(self.positions), 1, 1, -1)
        if self.layout == "padded":
            return seen
        if bool((seen == held).all()):
            return None
        parts = seen.split(self.sizes)
        return _Rows(part[..., :count].contiguous() for part, count in zip(parts, view.counts, strict=True))

    def _by_row(self, values: Sequence[int], device: torch.device) -> Tensor:
        by_session = zip(values, self.sizes, strict=True)
        rows = [value for value, size in by_session for _ in range(size)]
        return torch.tensor(rows, device=device)[:, None, None, None]


class _View:
    """What the rows of each session see in blocks of one kind: `counts` keys from the position `firsts` on."""

    def __init__(self, window: int | None, lengths: Sequence[int]) -> None:
        self.firsts = [0 if window is None else max(length - window + 1, 0) for length in lengths]
        self.counts = [length + 1 - first for length, first in zip(lengths, self.firsts, strict=True)]


class _BatchLayer(CacheLayerMixin):
    def __init__(self, batch: DecodeBatch, stack: Sequence[Any], kind: int, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._batch, self._stack, self._kind, self._length = batch, stack, kind, length
        self.is_sliding = kind > 0
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Any, Any]:
        sizes = self._batch.sizes
        new = zip(self._stack, key_states.split(sizes), value_states.split(sizes), strict=True)
        views = [layer.update(keys, values) for layer, keys, values in new]
        keys, values = _Rows(view[0] for view in views), _Rows(view[1] for view in views)
        if self._batch.layout == "rows":
            return keys, values
        return self._side_by_side(keys), self._side_by_side(values)

    def _side_by_side(self, views: Sequence[Tensor]) -> Tensor:
        """Zeros where a session has no token: whatever else memory holds may be NaN, which no mask hides."""
        _, heads, _, dim = views[0].shape
        whole = views[0].new_zeros(sum(self._batch.sizes), heads, self._batch.longest(self._kind), dim)
        for part, view in zip(whole.split(self._batch.sizes), views, strict=True):
            part[:, :, : view.shape[2]] = view
        return whole

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._batch.longest(self._kind), self._kind

    def get_seq_length(self) -> int:
        return self._length

    def get_max_length(self) -> int:
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        return None


class _Running(threading.local):
    batch: DecodeBatch | None = None
    native: str = "sdpa"


_running = _Running()


@contextlib.contextmanager
def batched(batch: DecodeBatch, configs: Iterable[Any], native: str) -> Iterator[None]:
    """Models with these configs attend to `batch` inside. `native` is how they do it otherwise: sdpa or eager."""
    configs = list(configs) if batch.layout == "rows" else []
    _running.batch, _running.native = batch, native
    for config in configs:
        config._attn_implementation_internal = _NAME
    try:
        yield
    finally:
        for config in configs:
            config._attn_implementation_internal = native
        _running.batch = None


def _attention(
    module: Any, query: Tensor, key: Any, value: Any, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    attend = sdpa_attention_forward if _running.native == "sdpa" else _eager_attention_of(module)
    if not isinstance(key, _Rows) or _running.batch is None:
        out: tuple[Tensor, None] = attend(module, query, key, value, attention_mask, **options)
        return out
    queries = query.split(_running.batch.sizes)
    masks = attention_mask if isinstance(attention_mask, _Rows) else [attention_mask] * len(key)
    rows = zip(queries, key, value, masks, strict=True)
    outputs = [attend(module, *row, **options)[0] for row in rows]
    return torch.cat(outputs), None


def _eager_attention_of(module: Any) -> Any:
    """The family's own, which knows of soft caps and the like."""
    return sys.modules[type(module).__module__].eager_attention_forward


def _mask(
    *, kv_offset: int, mask_function: Any, device: torch.device, dtype: torch.dtype = torch.float32, **_: Any
) -> Tensor | _Rows | None:
    """In place of Transformers' mask functions, in a batch. Layers told it their kind as `kv_offset`."""
    assert _running.batch is not None
    mask = _running.batch.mask(kv_offset, mask_function, device)
    if mask is None or _running.native == "sdpa":
        return mask
    return _additive(mask, dtype) if isinstance(mask, Tensor) else _Rows(_additive(part, dtype) for part in mask)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def _unless_batched(stock: Callable[..., Any]) -> Callable[..., Any]:
    def mask(**arguments: Any) -> Any:
        return stock(**arguments) if _running.batch is None else _mask(**arguments)

    return mask


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _mask)
for _name in NATIVE:
    ALL_MASK_ATTENTION_FUNCTIONS[_name] = _unless_batched(ALL_MASK_ATTENTION_FUNCTIONS[_name])
