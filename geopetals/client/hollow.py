"""The client's side of a hollow model: embeddings, final norm and LM head are here, the blocks are remote."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from geopetals.errors import SwarmFailure, UnsupportedInput
from geopetals.progress import Reporter, Silent
from geopetals.swarm.absent import AbsentBlock, Flow, copy_settings
from geopetals.swarm.architecture import block_of, find_decoder, find_layers
from geopetals.swarm.chain_probe import find_convention, require_chain
from geopetals.swarm.checkpoint import Checkpoint
from geopetals.swarm.hollow import load_hollow


class RemoteStack(nn.Module):
    """Stands where the first block stood. `call` takes hidden states [batch, tokens, hidden] through all blocks."""

    call: Callable[[Tensor], Tensor]

    def __init__(self, flow: Flow, layer: nn.Module) -> None:
        super().__init__()
        self._flow = flow
        self.call = _not_connected
        copy_settings(layer, self)

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor | tuple[Tensor | None, ...]:
        out = self.call(hidden_states)
        if out.shape != hidden_states.shape:
            raise SwarmFailure(
                f"the chain answered {list(out.shape)} to {list(hidden_states.shape)}; take other servers."
            )
        return self._flow.pack(out.to(hidden_states.device, hidden_states.dtype))


def _not_connected(hidden: Tensor) -> Tensor:
    raise UnsupportedInput(
        "the model is not connected to a swarm yet; open it with from_pretrained(model, join=TOKEN)."
    )


class RemoteCache(Cache):
    """What generate() sees of the attention caches on the servers.

    `position()` tells how many tokens the chain has processed. A beam search's reordering waits in `hypo_ids` (int64
    [batch], or None) for the next step, which takes it and sets it to None.
    """

    def __init__(self, position: Callable[[], int], num_blocks: int) -> None:
        self.position = position
        self.hypo_ids: Tensor | None = None
        super().__init__(layers=[_RemoteLayer(position) for _ in range(num_blocks)])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i of the next step continues what row beam_idx[i] is now; twice before a step composes."""
        ids = beam_idx.to(torch.int64)
        self.hypo_ids = ids if self.hypo_ids is None else self.hypo_ids[ids.to(self.hypo_ids.device)]

    def take_hypo_ids(self) -> Tensor | None:
        """The reordering that the next step has to apply, handed over once."""
        taken, self.hypo_ids = self.hypo_ids, None
        return taken

    def crop(self, tokens_to_remove: int) -> None:
        raise UnsupportedInput("tokens cannot be taken back from remote caches; turn assisted generation off.")

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise UnsupportedInput("remote caches cannot be repeated; give each sequence its own row from the start.")

    def batch_select_indices(self, indices: Tensor) -> None:
        raise UnsupportedInput("rows cannot be dropped from remote caches; open a new session for those left.")

    def reset(self) -> None:
        raise UnsupportedInput("remote caches cannot be reset; open a new session.")


class _RemoteLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, position: Callable[[], int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._position = position
        self.is_initialized = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._position() + query_length, 0

    def get_seq_length(self) -> int:
        return self._position()

    def get_max_length(self) -> int:
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        return None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        raise RuntimeError("a remote block wrote to the client's cache")


def load_client(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device = torch.device("cpu"),  # noqa: B008
    reporter: Reporter = Silent(),  # noqa: B008
) -> tuple[PreTrainedModel, RemoteStack]:
    """The model with a RemoteStack for its blocks; only the shards with the rest are read. Raises CheckpointError."""
    began = time.monotonic()
    flow = Flow(0, checkpoint.num_blocks)
    stacks: list[RemoteStack] = []

    def hollow(model: PreTrainedModel) -> None:
        _, layers = find_layers(model, checkpoint.num_blocks)
        stacks.append(RemoteStack(flow, layers[0]))
        layers[0] = stacks[-1]
        for block in range(1, checkpoint.num_blocks):
            layers[block] = AbsentBlock(flow, layers[block])

    model = load_hollow(
        checkpoint,
        hollow=hollow,
        wanted=lambda key: block_of(key) is None,
        dtype=dtype,
        device=device,
        reporter=reporter,
        task="loading embeddings and head",
        holds_blocks=False,
    )
    _require_chain(model, stacks[-1], flow, checkpoint.num_blocks)
    _use_cache(model)
    memory = sum(parameter.nbytes for parameter in model.parameters())
    reporter.line(f"embeddings and head loaded: {memory / 1e6:.1f} MB in {time.monotonic() - began:.1f} s")
    return model, stacks[-1]


def _use_cache(model: PreTrainedModel) -> None:
    """The caches are on the servers whatever the checkpoint says: else generate() would send each prompt again."""
    model.config.use_cache = True
    if model.generation_config is not None:
        model.generation_config.use_cache = True


def _require_chain(model: PreTrainedModel, stack: RemoteStack, flow: Flow, num_blocks: int) -> None:
    """Raises CheckpointError if the blocks need more from here than hidden states."""
    decoder, _, layers = find_decoder(model, num_blocks)
    name, tokens = type(decoder).__name__, 3
    embedding: Any = model.get_input_embeddings()
    vocabulary = int(embedding.weight.shape[0])

    def run(probe: int) -> Any:
        ids = (torch.arange(tokens, device=model.device)[None] + 1 + probe * tokens) % vocabulary
        return decoder(input_ids=ids, use_cache=False)[0]

    stack.call = lambda hidden: hidden
    try:
        with torch.inference_mode():
            find_convention(flow, name, lambda: run(0), lambda out: out.shape[:2] == (1, tokens))
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        require_chain(flow, name, list(layers), run)
    finally:
        model.requires_grad_(False)
        stack.call = _not_connected
