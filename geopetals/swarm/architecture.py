"""What a model is made of: its class in Transformers, its decoder layers, and which tensor belongs to which."""

import re
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
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
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(
            f"this {kind} checkpoint is quantized; use the one with full weights, and choose --dtype."
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or not isinstance(
        getattr(config, "num_hidden_layers", None), int
    ):
        raise CheckpointError(f"{kind} is not a decoder-only language model that Transformers can generate text with.")
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    cls: type[PreTrainedModel] = found[0] if isinstance(found, tuple | list) else found
    return cls


def find_layers(base: nn.Module, num_blocks: int) -> tuple[str, nn.ModuleList]:
    """The decoder layers among the children of a base model, and their name there."""
    found = [(k, m) for k, m in base.named_children() if isinstance(m, nn.ModuleList) and len(m) == num_blocks]
    if len(found) != 1:
        raise CheckpointError(
            f"{type(base).__name__} has no single list of {num_blocks} decoder layers: it cannot be split."
        )
    return found[0]
