"""Models of families that are not counted by hand: Transformers builds them without weights, and says.

The only place of the planner that loads torch, and only for such a model.
"""

from collections.abc import Mapping
from typing import Any

from geopetals.errors import CheckpointError
from geopetals.models.card import ModelCard
from geopetals.models.config import Config


def measured_card(name: str, values: Mapping[str, object]) -> ModelCard:
    """Raises CheckpointError for what Transformers does not know or cannot build, and where blocks are not alike."""
    try:
        import torch
        import transformers
    except ModuleNotFoundError as error:
        raise CheckpointError(f"{name} is of a family that only Transformers knows: install {error.name}.") from error
    config = Config(name, values)
    settings: dict[str, Any] = {
        key: value for key, value in values.items() if key not in ("auto_map", "quantization_config")
    }
    try:
        known = transformers.AutoConfig.for_model(**settings)
        with torch.device("meta"):
            model: Any = transformers.AutoModelForCausalLM.from_config(
                known, dtype=torch.bfloat16, trust_remote_code=False
            )
            layers = _layers(torch, model, int(known.num_hidden_layers))
            keys, values_shape = _cache_of_one_token(torch, transformers, model)
    except CheckpointError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"{name} is not understood by Transformers: {reason or type(error).__name__}") from error
    sizes = {sum(parameter.numel() for parameter in layer.parameters()) for layer in layers}
    if len(sizes) > 1:
        raise config.refuse("has blocks of different sizes: choose a model whose blocks are all alike")
    linear = tuple((m.out_features, m.in_features) for m in layers[0].modules() if isinstance(m, torch.nn.Linear))
    block = sizes.pop()
    per_head = keys[3] + values_shape[3]
    if keys[1] != values_shape[1] or per_head % 2:
        raise config.refuse("keeps keys and values of different numbers of heads, which the planner cannot count")
    return ModelCard(
        name=name,
        family=str(known.model_type),
        num_blocks=len(layers),
        hidden_size=int(known.hidden_size),
        heads=int(getattr(known, "num_attention_heads", keys[1])),
        kv_heads=int(keys[1]),
        head_dim=per_head // 2,
        linear=linear,
        other_parameters=block - sum(rows * columns for rows, columns in linear),
        active_parameters=block,
        outside_parameters=sum(p.numel() for p in model.parameters()) - block * len(layers),
        max_tokens=config.count_if_given("max_position_embeddings", "n_positions"),
    )


def _layers(torch: Any, model: Any, count: int) -> Any:
    found = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    if not found:
        raise CheckpointError(f"{type(model).__name__} has no list of {count} blocks: it cannot be split over servers.")
    return found[0]


def _cache_of_one_token(torch: Any, transformers: Any, model: Any) -> tuple[Any, Any]:
    """Shapes [batch, heads, tokens, head_dim] of what the first block keeps of one token."""
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device="meta"), past_key_values=cache, use_cache=True)
    layer = cache.layers[0]
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if keys is None or values is None or keys.ndim != 4 or values.ndim != 4:
        raise CheckpointError(f"{type(model).__name__} keeps something else than keys and values: it cannot be split.")
    return tuple(keys.shape), tuple(values.shape)
