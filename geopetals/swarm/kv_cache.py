"""The attention cache of one session on one server: preallocated, written in place.

A block with a sliding window of `w` tokens keeps the last `w - 1` and room for some new ones. When that is full, what
the next step sees is moved to the front: a token is copied about twice in its life, and most steps copy nothing. A step
that brings more tokens than there is room for gets a larger tensor until the step after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from geopetals.errors import MemoryShortage, UnsupportedInput

_LEAST_ROOM = 8


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

    def slots(self, max_length: int) -> int:
        """Tokens that are held for a session of at most `max_length`, but for a long step's."""
        if self.window is None:
            return max_length
        return min(max_length, self.window - 1 + max(self.window // 2, _LEAST_ROOM))


class SessionKV:
    """Keys and values of the blocks [start, end) for `batch` sequences of at most `max_length` tokens.

    Never takes more memory than `max_length` tokens in every block would. `windows` are those of all blocks of the
    model: some size their masks by the first block of a kind, held or not. `compute_s` is how long the last step was
    computed. Not for concurrent use.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        *,
        start: int,
        windows: Sequence[int | None],
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
        self.device = device
        self.max_length = max_length
        self.length = 0
        self.compute_s = 0.0
        needed = sum(shape.bytes_per_token(dtype) * shape.slots(max_length) for shape in shapes) * batch
        try:
            held = [_HeldLayer(self, shape, dtype, device) for shape in shapes]
        except (torch.OutOfMemoryError, RuntimeError) as error:
            raise MemoryShortage(
                f"an attention cache of {needed / 1e6:.1f} MB does not fit on {device}; ask for fewer tokens."
            ) from error
        self._held = held
        before = [_AbsentLayer(self, window) for window in windows[: self.start]]
        after = [_AbsentLayer(self, window) for window in windows[self.end :]]
        self.cache = Cache(layers=[*before, *held, *after])

    @property
    def memory_bytes(self) -> int:
        return sum(layer.k.nbytes + layer.v.nbytes for layer in self._held)

    def grow(self, max_length: int) -> None:
        """Make room for `max_length` tokens in all. Raises MemoryShortage; the cache then holds what it held.

        What is held is copied block by block: for a moment one block's cache is there twice.
        """
        if max_length <= self.max_length:
            return
        try:
            for layer in self._held:
                layer.grow(max_length)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            raise MemoryShortage(
                f"an attention cache of {max_length} tokens does not fit on {self.device}; ask for fewer tokens."
            ) from error
        self.max_length = max_length

    @torch.inference_mode()
    def reorder(self, hypo_ids: Tensor) -> None:
        """Row i becomes what row hypo_ids[i] was: int64 [batch]. In place, and only where there are tokens."""
        ids = hypo_ids.detach().to("cpu", torch.int64)
        if ids.shape != (self.batch,) or bool(((ids < 0) | (ids >= self.batch)).any()):
            raise UnsupportedInput(
                f"hypotheses must be {self.batch} rows below {self.batch}; send one for each sequence."
            )
        if self.length == 0 or torch.equal(ids, torch.arange(self.batch)):
            return
        for layer in self._held:
            for tensor in (layer.k, layer.v):
                past = tensor[:, :, : self.length - layer.first_held]
                past.copy_(past.index_select(0, ids.to(tensor.device)))

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on. What has left a sliding window does not come back: UnsupportedInput."""
        least = max(layer.least_length() for layer in self._held)
        if not (length == 0 or max(least, 1) <= length <= self.length):
            allowed = f"0, or {max(least, 1)} to {self.length}"
            raise UnsupportedInput(f"a cache of {self.length} tokens cannot be cut to {length}; give {allowed}.")
        self.length = length


class _SessionLayer(CacheLayerMixin):
    """Positions and mask sizes, which base models ask of any layer, held or not."""

    def __init__(self, session: SessionKV, window: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._session = session
        self.window = window
        self.is_sliding = window is not None
        self.is_initialized = True

    def _first_seen(self) -> int:
        return 0 if self.window is None else max(self._session.length - self.window + 1, 0)

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
    """A block of another server, or outside the session's span."""


class _HeldLayer(_SessionLayer):
    """New keys and values go in behind the past; what attention reads is a view.

    Slot 0 holds the token at the position `first_held`, which a step never sees the past of.
    """

    def __init__(self, session: SessionKV, shape: LayerShape, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(session, shape.window)
        self.first_held = 0
        self._shape = shape
        self._slots = shape.slots(session.max_length)
        self.k = torch.empty(session.batch, shape.key_heads, self._slots, shape.key_dim, dtype=dtype, device=device)
        self.v = torch.empty(session.batch, shape.value_heads, self._slots, shape.value_dim, dtype=dtype, device=device)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        first, past, tokens = self._first_seen(), self._session.length, key_states.shape[2]
        if past == 0:
            self.first_held = 0
        fits = past - self.first_held + tokens <= self.k.shape[2]
        if not fits or self.k.shape[2] > self._slots >= past - first + tokens:
            self._move(first, past, tokens)
        begin, end = past - self.first_held, past - self.first_held + tokens
        self.k[:, :, begin:end] = key_states
        self.v[:, :, begin:end] = value_states
        return self.k[:, :, first - self.first_held : end], self.v[:, :, first - self.first_held : end]

    def least_length(self) -> int:
        """The shortest past, but for none at all, that a step could follow with what is held."""
        return 0 if self.window is None or self.first_held == 0 else self.first_held + self.window - 1

    def grow(self, max_length: int) -> None:
        slots = self._shape.slots(max_length)
        if slots > self.k.shape[2]:
            held = self._session.length - self.first_held
            larger = [tensor.new_empty(*tensor.shape[:2], slots, tensor.shape[3]) for tensor in (self.k, self.v)]
            for target, tensor in zip(larger, (self.k, self.v), strict=True):
                target[:, :, :held] = tensor[:, :, :held]
            self.k, self.v = larger
        self._slots = slots

    def _move(self, first: int, past: int, tokens: int) -> None:
        """Put [first, past) to the front, where `tokens` more fit behind. Nothing changes if memory is short.

        What the step after a failed or forgotten one needs is still there: [first, past) is kept until then.
        """
        slots = max(self._slots, past - first + tokens)
        kept = slice(first - self.first_held, past - self.first_held)
        moved = []
        for tensor in (self.k, self.v):
            held = tensor[:, :, kept]
            if slots == tensor.shape[2]:
                moved.append((tensor, held.clone()))
            else:
                moved.append((tensor.new_empty(*tensor.shape[:2], slots, tensor.shape[3]), held))
        for target, held in moved:
            target[:, :, : past - first] = held
        (self.k, _), (self.v, _) = moved
        self.first_held = first
