"""The blocks [start, end) of a model on one device: what a block server computes with."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from geopetals.errors import BlocksError, CheckpointError, MemoryShortage, UnsupportedInput
from geopetals.progress import Reporter, Silent
from geopetals.swarm.absent import Flow, Gate, hollow_for_server
from geopetals.swarm.architecture import MODEL_ERRORS, block_of, find_decoder, find_layers
from geopetals.swarm.batching import Batching
from geopetals.swarm.chain_probe import find_convention, require_chain
from geopetals.swarm.checkpoint import Checkpoint
from geopetals.swarm.cpu_linear import use_onednn
from geopetals.swarm.device_memory import is_out_of_memory
from geopetals.swarm.hollow import load_hollow
from geopetals.swarm.kv_cache import LayerShape, SessionKV
from geopetals.swarm.quantization import memory_bytes
from geopetals.swarm.rope import find_rope_limit
from geopetals.swarm.self_check import require_consistency


class Stage:
    """Blocks [start, end). Not for concurrent use: one thread computes."""

    def __init__(
        self, model: PreTrainedModel, flow: Flow, *, num_blocks: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.start, self.end = flow.start, flow.end
        self.num_blocks = num_blocks
        self.config = model.config
        self.hidden_size = int(model.config.hidden_size)
        self.dtype = dtype
        self.device = device
        self.memory_bytes = memory_bytes(model)
        self.computes_exactly = dtype == torch.float32 and not getattr(model, "is_quantized", False)
        self._base, _, layers = find_decoder(model, num_blocks)
        self._flow = flow
        self._rope_limit = find_rope_limit(self._base, self.config)
        self._require_chain(list(layers))
        self._windows = [_window(layer) for layer in DynamicCache(config=self.config).layers]
        self._shapes = self._probe_cache()
        require_consistency(self)
        self.batching = Batching(self, self._base, self._forward)

    @property
    def windows(self) -> list[int]:
        """Of the blocks that look back at that many tokens only."""
        return [window for window in self._windows[self.start : self.end] if window is not None]

    @property
    def max_tokens(self) -> int | None:
        """Tokens that any step can go up to; None where there is no such limit."""
        return None if self._rope_limit is None else self._rope_limit.tokens

    def run(self, hidden: Tensor, start: int, end: int, *, kv: SessionKV | None = None) -> Tensor:
        """Hidden states [batch, tokens, hidden] after the blocks [start, end), on the device `hidden` came from.

        With `kv` the tokens follow those it holds, and are added to it. Without, the blocks see these tokens alone and
        the result can be differentiated with respect to `hidden`. Raises BlocksError and UnsupportedInput; the cache
        then holds what it held.
        """
        self._check_span(start, end)
        self._check_input(hidden, start, end, kv)
        if hidden.shape[1] == 0:
            return hidden
        if kv is None:
            return self._compute(hidden, start, end, None)
        with torch.inference_mode():
            out = self._compute(hidden, start, end, kv)
        kv.length += hidden.shape[1]
        return out

    def decode(self, hidden: Tensor, start: int, end: int, sessions: Sequence[SessionKV]) -> Tensor:
        """Hidden states [rows, 1, hidden] of one new token of each sequence of several sessions, in their order.

        The same as `run` gives each session, which may be at different positions; `past_rope_limit` must be the same.
        Raises as `run` does.
        """
        self._check_span(start, end)
        parts = hidden.split([kv.batch for kv in sessions])
        layout = self.batching.layout
        if layout is None or len(sessions) == 1:
            return torch.cat([self.run(part, start, end, kv=kv) for part, kv in zip(parts, sessions, strict=True)])
        for part, kv in zip(parts, sessions, strict=True):
            self._check_input(part, start, end, kv)
        with torch.inference_mode(), self._memory_watched(hidden):
            out = self.batching.run(self._bring(hidden), start, end, sessions, layout=layout).to(hidden.device)
        for kv in sessions:
            kv.length += 1
        return out

    @property
    def batches(self) -> bool:
        """Whether `decode` is one forward pass."""
        return self.batching.layout is not None

    def past_rope_limit(self, kv: SessionKV) -> bool:
        """Whether the next token's rotary embeddings are those of long texts."""
        return self._rope_limit is not None and kv.length >= self._rope_limit.tokens

    def piece_tokens(self, kv: SessionKV, tokens: int, wanted: int) -> int:
        """How many of `tokens` new ones to compute at once, if about `wanted` over all sequences would be good."""
        passes_limit = self._rope_limit is not None and kv.length + tokens > self._rope_limit.tokens
        return tokens if passes_limit and kv.length == 0 else max(1, wanted // kv.batch)

    def allocate_kv(self, start: int, end: int, *, batch: int, max_length: int) -> SessionKV:
        """A cache for sessions through the blocks [start, end). Raises MemoryShortage if it does not fit."""
        self._check_span(start, end)
        return SessionKV(
            self._shapes[start - self.start : end - self.start],
            start=start,
            windows=self._windows,
            batch=batch,
            max_length=max_length,
            dtype=self.dtype,
            device=self.device,
        )

    def kv_bytes_per_token(self) -> int:
        """Attention cache of one token in one block: the largest of the blocks held."""
        return max(shape.bytes_per_token(self.dtype) for shape in self._shapes)

    def _compute(self, hidden: Tensor, start: int, end: int, kv: SessionKV | None) -> Tensor:
        with self._memory_watched(hidden):
            out = self._forward(self._bring(hidden), start, end, None if kv is None else kv.cache)
            return out.to(hidden.device)

    @contextlib.contextmanager
    def _memory_watched(self, hidden: Tensor) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            tokens = hidden.shape[0] * hidden.shape[1]
            raise MemoryShortage(f"{tokens} tokens at once do not fit on {self.device}; send fewer.") from error

    def _bring(self, hidden: Tensor) -> Tensor:
        if hidden.device.type == "cpu" and self.device.type == "cuda" and not hidden.requires_grad:
            hidden = hidden.pin_memory()  # the copy then overlaps with the work that queues up behind it
        return hidden.to(self.device, self.dtype, non_blocking=True)

    def _forward(self, hidden: Tensor, start: int, end: int, cache: Any, **options: Any) -> Tensor:
        self._flow.start, self._flow.end = start, end
        use_cache = cache is not None
        out: Tensor = self._base(inputs_embeds=hidden, past_key_values=cache, use_cache=use_cache, **options)[0]
        return out

    def _check_span(self, start: int, end: int) -> None:
        if not self.start <= start < end <= self.end:
            raise BlocksError(f"blocks {start}:{end} are not served here, only {self.start}:{self.end} are.")

    def _check_input(self, hidden: Tensor, start: int, end: int, kv: SessionKV | None) -> None:
        if (
            hidden.dim() != 3
            or hidden.shape[0] < 1
            or hidden.shape[2] != self.hidden_size
            or not hidden.is_floating_point()
        ):
            raise UnsupportedInput(
                f"hidden states must be floating-point [batch, tokens, {self.hidden_size}], "
                f"not {hidden.dtype} {list(hidden.shape)}."
            )
        if self._rope_limit is not None:
            self._rope_limit.check(0 if kv is None else kv.length, hidden.shape[1])
        if kv is None:
            return
        if not kv.start <= start < end <= kv.end:
            raise UnsupportedInput(f"the session's cache is for blocks {kv.start}:{kv.end}, not {start}:{end}.")
        if hidden.shape[0] != kv.batch:
            raise UnsupportedInput(f"the session has {kv.batch} sequences, not {hidden.shape[0]}.")
        if kv.length + hidden.shape[1] > kv.max_length:
            raise UnsupportedInput(
                f"{kv.length} + {hidden.shape[1]} tokens exceed the session's limit of {kv.max_length}; "
                "open a longer session."
            )

    def _require_chain(self, layers: list[nn.Module]) -> None:
        """With no block active the model must hand its input through."""
        name = type(self._base).__name__
        span = self.hidden_size * 2
        probe = torch.linspace(-1, 1, span, dtype=self.dtype, device=self.device).view(1, 2, -1)

        def run(number: int) -> Tensor:
            hidden = (probe + number).requires_grad_(torch.is_grad_enabled())
            return self._forward(hidden, self.start, self.start, None)

        with torch.inference_mode():
            find_convention(
                self._flow, name, lambda: run(0), lambda out: out.shape == probe.shape and torch.equal(out, probe)
            )
        require_chain(self._flow, name, layers, run)

    @torch.inference_mode()
    def _probe_cache(self) -> list[LayerShape]:
        """Run one token and look at what each block hands to its cache: no names of config fields to guess."""
        cache = DynamicCache(config=self.config)
        probe = torch.zeros(1, 1, self.hidden_size, dtype=self.dtype, device=self.device)
        try:
            self._forward(probe, self.start, self.end, cache)
        except MODEL_ERRORS as error:
            if is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split())[:200]
            message = f"the blocks cannot be run on their own ({reason}): they cannot be served."
            raise CheckpointError(message) from error
        return [_layer_shape(cache.layers[block]) for block in range(self.start, self.end)]


def _layer_shape(layer: Any) -> LayerShape:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if keys is None or values is None:
        raise CheckpointError(
            "a block does not use a cache of keys and values, as in encoders (is_decoder: false): it cannot be served."
        )
    if keys.dim() != 4 or values.dim() != 4:
        raise CheckpointError("a block keeps something else than keys and values between tokens: it cannot be served.")
    return LayerShape(
        key_heads=keys.shape[1],
        key_dim=keys.shape[3],
        value_heads=values.shape[1],
        value_dim=values.shape[3],
        window=_window(layer),
    )


def _window(layer: Any) -> int | None:
    return int(layer.sliding_window) if getattr(layer, "is_sliding", False) else None


def load_stage(
    checkpoint: Checkpoint,
    start: int,
    end: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str | None = None,
    reporter: Reporter = Silent(),  # noqa: B008
) -> Stage:
    """Load the blocks [start, end), reading only the shards that hold them. Raises BlocksError and CheckpointError."""
    checkpoint.check_span(start, end)
    began = time.monotonic()
    block_mb = checkpoint.block_bytes(dtype) / 1e6
    reporter.line(f"model: {checkpoint.name}, {checkpoint.num_blocks} blocks of {block_mb:.1f} MB")
    flow = Flow(start, end)
    model = load_hollow(
        checkpoint,
        hollow=lambda native: hollow_for_server(native, flow, checkpoint.num_blocks),
        wanted=lambda key: (block := block_of(key)) is not None and start <= block < end,
        dtype=dtype,
        device=device,
        reporter=reporter,
        task=f"loading blocks {start}:{end}",
        quantization=quantization,
    )
    use_onednn(model)
    _, layers = find_layers(model, checkpoint.num_blocks)
    for block in range(start, end):  # only now: parameters must be loaded under the checkpoint's names
        layers[block] = Gate(layers[block], block, flow)
    stage = Stage(model, flow, num_blocks=checkpoint.num_blocks, dtype=dtype, device=device)
    took_s = time.monotonic() - began
    reporter.line(f"blocks {start}:{end} loaded: {stage.memory_bytes / 1e6:.1f} MB in {took_s:.1f} s")
    reporter.line(stage.batching.describe())
    return stage
