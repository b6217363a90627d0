"""The attention cache of one session on one server: preallocated, written in place."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from geopetals.errors import MemoryShortage, UnsupportedInput


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """What one block puts into the cache for each token, and how many tokens it looks back at (None: all)."""

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int
    window: int | None

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        return (self.key_heads * self.key_dim + self.value_heads * self.value_dim) * dtype.itemsize


class SessionKV:
    """Keys and values of the blocks [start, end) for `batch` sequences of at most `max_length` tokens.

    Only [:length] of the tensors, each [batch, heads, max_length, head_dim], means anything. Not for concurrent use.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        *,
        start: int,
        num_blocks: int,
        batch: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        if batch < 1 or max_length < 1:
            raise UnsupportedInput(f"a session needs a batch and a length of at least 1, not {batch} and {max_length}.")
        self.start = start
        self.end = start + len(shapes)
        self.batch = batch
        self.max_length = max_length
        self.length = 0
        needed = sum(shape.bytes_per_token(dtype) for shape in shapes) * batch * max_length
        try:
            held = [_HeldLayer(self, shape, dtype, device) for shape in shapes]
        except (torch.OutOfMemoryError, RuntimeError) as error:
            raise MemoryShortage(
                f"an attention cache of {needed / 1e6:.1f} MB does not fit on {device}; ask for fewer tokens."
            ) from error
        self._held = held
        before = [_AbsentLayer(self) for _ in range(self.start)]
        after = [_AbsentLayer(self) for _ in range(num_blocks - self.end)]
        self.cache = Cache(layers=[*before, *held, *after])

    @property
    def memory_bytes(self) -> int:
        return sum(layer.k.nbytes + layer.v.nbytes for layer in self._held)

    @torch.inference_mode()
    def reorder(self, hypo_ids: Tensor) -> None:
        """Row i becomes what row hypo_ids[i] was: int64 [batch]. In place, of [:length] only."""
        ids = hypo_ids.detach().to("cpu", torch.int64)
        if ids.shape != (self.batch,) or bool(((ids < 0) | (ids >= self.batch)).any()):
            raise UnsupportedInput(
                f"hypotheses must be {self.batch} rows below {self.batch}; send one for each sequence."
            )
        if self.length == 0 or torch.equal(ids, torch.arange(self.batch)):
            return
        for layer in self._held:
            for tensor in (layer.k, layer.v):
                past = tensor[:, :, : self.length]
                past.copy_(past.index_select(0, ids.to(tensor.device)))

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        if not 0 <= length <= self.length:
            raise UnsupportedInput(
                f"a cache of {self.length} tokens cannot be cut to {length}; give 0 to {self.length}."
            )
        self.length = length


class _SessionLayer(CacheLayerMixin):
    """Positions and mask sizes, which base models ask of any layer, held or not."""

    def __init__(self, session: SessionKV, window: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._session = session
        self._window = window
        self.is_sliding = window is not None
        self.is_initialized = True

    def _first_seen(self) -> int:
        return 0 if self._window is None else max(self._session.length - self._window + 1, 0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        first = self._first_seen()
        return self._session.length + query_length - first, first

    def get_seq_length(self) -> int:
        return self._session.length

    def get_max_length(self) -> int:
        return self._session.max_length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        return None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        raise RuntimeError("a block outside the session's span wrote to its cache")


class _AbsentLayer(_SessionLayer):
    def __init__(self, session: SessionKV) -> None:
        super().__init__(session, None)


class _HeldLayer(_SessionLayer):
    """New keys and values go in behind the past; what attention reads is a view."""

    def __init__(self, session: SessionKV, shape: LayerShape, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(session, shape.window)
        batch, length = session.batch, session.max_length
        self.k = torch.empty(batch, shape.key_heads, length, shape.key_dim, dtype=dtype, device=device)
        self.v = torch.empty(batch, shape.value_heads, length, shape.value_dim, dtype=dtype, device=device)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        first, past = self._first_seen(), self._session.length
        end = past + key_states.shape[2]
        self.k[:, :, past:end] = key_states
        self.v[:, :, past:end] = value_states
        return self.k[:, :, first:end], self.v[:, :, first:end]
