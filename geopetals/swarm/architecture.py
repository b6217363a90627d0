"""What a model is made of: its class in Transformers, its decoder layers, and which tensor belongs to which."""

import re
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from geopetals.errors import CheckpointError

# What Transformers raises at a config or at weights that make no sense to it.
MODEL_ERRORS: tuple[type[Exception], ...] = (
    StrictDataclassError,
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
# Per-family knowledge: factors by which some decoders multiply what comes from the embedding, under these names.
# A server gets hidden states that the client has multiplied already.
INPUT_FACTORS = ("embedding_multiplier",)
_OTHER_SENSES = ("vision_config", "audio_config")
_BLOCK_KEY = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer)\.(\d+)\.")


def block_of(key: str) -> int | None:
    """The block that a checkpoint's tensor belongs to, or None for embeddings, final norm and LM head."""
    match = _BLOCK_KEY.search(key)
    return int(match.group(1)) if match else None


def native_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """Transformers' own class for text generation. Raises CheckpointError for models that cannot be split."""
    kind = getattr(config, "model_type", None) or type(config).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise CheckpointError(f"{kind} is an encoder-decoder; only decoder-only models can be split over servers.")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CheckpointError(f"{kind} is not a decoder-only language model that Transformers can generate text with.")
    has_layers = isinstance(getattr(config, "num_hidden_layers", None), int)
    if not has_layers or any(hasattr(config, name) for name in _OTHER_SENSES):
        raise CheckpointError(f"{kind} is more than a language model; use a checkpoint of its text model alone.")
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    cls: type[PreTrainedModel] = found[0] if isinstance(found, tuple | list) else found
    _require_plain_caches(config, kind)
    return cls


def _require_plain_caches(config: PretrainedConfig, kind: str) -> None:
    """Every layer keeps keys and values of its own, of all tokens or of those in a window, and nothing else."""
    try:
        layers = DynamicCache(config=config).layers
    except MODEL_ERRORS as error:
        raise CheckpointError(
            f"Transformers has no cache for the layers of this {kind}: it cannot be split."
        ) from error
    for layer in layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            what = "layers with a recurrent or convolution state"
        elif isinstance(layer, DummyLayer):
            what = "layers that have no attention or use the keys and values of other layers"
        elif type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            what = f"layers that keep more than keys and values ({type(layer).__name__})"
        else:
            continue
        raise CheckpointError(f"this {kind} has {what}: it cannot be split over servers.")


def find_layers(base: nn.Module, num_blocks: int) -> tuple[str, nn.ModuleList]:
    """The decoder layers inside a model, and their dotted name there. Raises CheckpointError unless it has one list."""
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in base.named_modules():
        inside_found = any(name.startswith(f"{outer}.") for outer, _ in found)
        if isinstance(module, nn.ModuleList) and len(module) == num_blocks and not inside_found:
            found.append((name, module))
    if len(found) != 1:
        raise CheckpointError(
            f"{type(base).__name__} has no single list of {num_blocks} decoder layers: it cannot be split."
        )
    return found[0]


def find_decoder(model: PreTrainedModel, num_blocks: int) -> tuple[Any, str, nn.ModuleList]:
    """The innermost model around the decoder layers, which can be called with hidden states; then as find_layers."""
    name, layers = find_layers(model, num_blocks)
    parts = name.split(".")
    decoder, inside = model, name
    for depth in range(1, len(parts)):
        module = model.get_submodule(".".join(parts[:depth]))
        if isinstance(module, PreTrainedModel):
            decoder, inside = module, ".".join(parts[depth:])
    return decoder, inside, layers
