"""The blocks [start, end) of a model on one device: what a block server computes with."""

import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from geopetals.errors import BlocksError, CheckpointError, MemoryShortage, UnsupportedInput
from geopetals.progress import Reporter, Silent
from geopetals.swarm.architecture import block_of, find_layers
from geopetals.swarm.checkpoint import Checkpoint
from geopetals.swarm.device_memory import is_out_of_memory
from geopetals.swarm.hollow import AbsentBlock, AbsentPositions, AbsentStep, Flow, load_hollow
from geopetals.swarm.kv_cache import LayerShape, SessionKV


class Gate(nn.Module):
    """A decoder layer that is held, and runs when it is among the blocks asked for."""

    def __init__(self, layer: nn.Module, block: int, flow: Flow) -> None:
        super().__init__()
        self.layer = layer
        self._block = block
        self._flow = flow

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Any:
        if self._flow.start <= self._block < self._flow.end:
            return self.layer(hidden_states, *args, **kwargs)
        return self._flow.pack(hidden_states)


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
        self.memory_bytes = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
        self._base = model.base_model
        self._flow = flow
        self._find_layer_convention()
        self._shapes = self._probe_cache()

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

    def allocate_kv(self, start: int, end: int, *, batch: int, max_length: int) -> SessionKV:
        """A cache for sessions through the blocks [start, end). Raises MemoryShortage if it does not fit."""
        self._check_span(start, end)
        return SessionKV(
            self._shapes[start - self.start : end - self.start],
            start=start,
            num_blocks=self.num_blocks,
            batch=batch,
            max_length=max_length,
            dtype=self.dtype,
            device=self.device,
        )

    def kv_bytes_per_token(self) -> int:
        """Attention cache of one token in one block: the largest of the blocks held."""
        return max(shape.bytes_per_token(self.dtype) for shape in self._shapes)

    def _compute(self, hidden: Tensor, start: int, end: int, kv: SessionKV | None) -> Tensor:
        try:
            out = self._forward(self._bring(hidden), start, end, None if kv is None else kv.cache)
            return out.to(hidden.device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            tokens = hidden.shape[0] * hidden.shape[1]
            raise MemoryShortage(f"{tokens} tokens at once do not fit on {self.device}; send fewer.") from error

    def _bring(self, hidden: Tensor) -> Tensor:
        if hidden.device.type == "cpu" and self.device.type == "cuda" and not hidden.requires_grad:
            hidden = hidden.pin_memory()  # the copy then overlaps with the work that queues up behind it
        return hidden.to(self.device, self.dtype, non_blocking=True)

    def _forward(self, hidden: Tensor, start: int, end: int, cache: Any) -> Tensor:
        self._flow.start, self._flow.end = start, end
        out: Tensor = self._base(inputs_embeds=hidden, past_key_values=cache, use_cache=cache is not None)[0]
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

    @torch.inference_mode()
    def _find_layer_convention(self) -> None:
        """With no block active the model must hand its input through.

        Tells whether layers return tensors or tuples, and that nothing acts on hidden states but the layers.
        """
        probe = torch.linspace(-1, 1, 2 * self.hidden_size, dtype=self.dtype, device=self.device).view(1, 2, -1)
        for as_tuple in (False, True):
            self._flow.as_tuple = as_tuple
            try:
                out = self._forward(probe, self.start, self.start, None)
            except (IndexError, TypeError, AttributeError, RuntimeError, ValueError):
                continue
            if out.shape == probe.shape and torch.equal(out, probe):
                return
        name = type(self._base).__name__
        raise CheckpointError(f"{name} does more than run its layers in a row: it cannot be split over servers.")

    @torch.inference_mode()
    def _probe_cache(self) -> list[LayerShape]:
        """Run one token and look at what each block hands to its cache: no names of config fields to guess."""
        cache = DynamicCache(config=self.config)
        probe = torch.zeros(1, 1, self.hidden_size, dtype=self.dtype, device=self.device)
        self._forward(probe, self.start, self.end, cache)
        return [_layer_shape(cache.layers[block]) for block in range(self.start, self.end)]


def _layer_shape(layer: Any) -> LayerShape:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if keys is None or values is None or keys.dim() != 4 or values.dim() != 4:
        raise CheckpointError("a block keeps something else than keys and values between tokens: it cannot be served.")
    return LayerShape(
        key_heads=keys.shape[1],
        key_dim=keys.shape[3],
        value_heads=values.shape[1],
        value_dim=values.shape[3],
        window=layer.sliding_window if getattr(layer, "is_sliding", False) else None,
    )


def load_stage(
    checkpoint: Checkpoint,
    start: int,
    end: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
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
        hollow=lambda native: _hollow_for_server(native, flow, checkpoint.num_blocks),
        wanted=lambda key: (block := block_of(key)) is not None and start <= block < end,
        dtype=dtype,
        device=device,
        reporter=reporter,
        task=f"loading blocks {start}:{end}",
    )
    _, layers = find_layers(model.base_model, checkpoint.num_blocks)
    for block in range(start, end):  # only now: parameters must be loaded under the checkpoint's names
        layers[block] = Gate(layers[block], block, flow)
    stage = Stage(model, flow, num_blocks=checkpoint.num_blocks, dtype=dtype, device=device)
    took_s = time.monotonic() - began
    reporter.line(f"blocks {start}:{end} loaded: {stage.memory_bytes / 1e6:.1f} MB in {took_s:.1f} s")
    return stage


def _hollow_for_server(model: PreTrainedModel, flow: Flow, num_blocks: int) -> None:
    """Keep the served layers, and what has no weights, as rotary embeddings; the rest hands hidden states through."""
    base: Any = model.base_model
    name, layers = find_layers(base, num_blocks)
    for block, layer in enumerate(layers):
        if not flow.start <= block < flow.end:
            layers[block] = AbsentBlock(flow, layer)
    embedding = base.get_input_embeddings()
    for child_name, child in list(base.named_children()):
        has_weights = next(child.parameters(), None) is not None
        if child_name == name or not (has_weights or "norm" in child_name):
            continue
        is_position = isinstance(child, nn.Embedding) and child is not embedding
        setattr(base, child_name, AbsentPositions() if is_position else AbsentStep())
    for child_name, child in list(model.named_children()):
        if child is not base:
            setattr(model, child_name, AbsentStep())
    model.all_tied_weights_keys = {}
