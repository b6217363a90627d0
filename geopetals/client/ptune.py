"""Prompt tuning as in PETALS: trainable vectors in front of the text, and with `deep_ptune` also in every block.

The vectors are parameters of the base model, under PETALS' names: `prompt_embeddings.weight` [prefix, hidden] and
`intermediate_prompt_embeddings.weight` [prefix, blocks * hidden]. They stay in float32, whatever the model's format.
"""

from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from geopetals.client.hollow import RemoteCache
from geopetals.errors import UnsupportedInput
from geopetals.swarm.architecture import find_decoder

TuningMode = Literal["ptune", "deep_ptune"]


def check_tuning(tuning_mode: str | None, pre_seq_len: int) -> int:
    """How many prompt vectors stand before the text. Raises UnsupportedInput for what is no kind of tuning."""
    if tuning_mode is None:
        return 0
    if tuning_mode not in get_args(TuningMode):
        known = " and ".join(get_args(TuningMode))
        raise UnsupportedInput(f"tuning_mode={tuning_mode!r} is not known: the modes are {known}.")
    if pre_seq_len < 1:
        raise UnsupportedInput(f"{tuning_mode} needs prompt vectors: pass pre_seq_len=16, for example.")
    return pre_seq_len


def add_prompts(model: PreTrainedModel, tuning_mode: str | None, pre_seq_len: int) -> None:
    """Give the base model trainable prompts, initialised at random, and the habit of putting them before its input."""
    prefix = check_tuning(tuning_mode, pre_seq_len)
    config: Any = model.config
    config.tuning_mode, config.pre_seq_len = tuning_mode, prefix
    if prefix == 0:
        return
    base: Any = model.base_model
    base.pre_seq_len = prefix
    base.prompt_embeddings = _vectors(model, prefix, config.hidden_size)
    if tuning_mode == "deep_ptune":
        base.intermediate_prompt_embeddings = _vectors(model, prefix, config.num_hidden_layers * config.hidden_size)
    # Some models for text generation call their innermost decoder past the base model.
    decoder, _, _ = find_decoder(model, config.num_hidden_layers)
    decoder.register_forward_pre_hook(partial(_put_before, base.prompt_embeddings), with_kwargs=True)
    decoder.register_forward_hook(partial(_take_away, prefix), with_kwargs=True)


def deep_prompts(model: PreTrainedModel) -> Tensor | None:
    """What `deep_ptune` adds to the inputs of the blocks, [blocks, 1, prefix, hidden]; None in other modes."""
    base: Any = model.base_model
    vectors: nn.Embedding | None = getattr(base, "intermediate_prompt_embeddings", None)
    if vectors is None:
        return None
    blocks = model.config.num_hidden_layers
    return vectors.weight.view(base.pre_seq_len, blocks, -1).transpose(0, 1).unsqueeze(1).to(model.dtype)


class PrefixedCache(RemoteCache):
    """Wraps a session's cache, which counts text, for the decoder, which must count the prompts too."""

    def __init__(self, text: RemoteCache, prefix: int) -> None:
        self.text = text
        self.is_empty = text.position() == 0
        super().__init__(lambda: text.position() + (prefix if text.position() else 0), len(text.layers))


def _vectors(model: PreTrainedModel, rows: int, size: int) -> nn.Embedding:
    vectors = nn.Embedding(rows, size, dtype=torch.float32, device=model.device)
    nn.init.normal_(vectors.weight, std=float(getattr(model.config, "initializer_range", 0.02)))
    return vectors


def _put_before(
    vectors: nn.Embedding, decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before the decoder's forward(): prompts and embedded tokens instead of token ids."""
    cache = kwargs.get("past_key_values")
    if cache is not None:
        cache = PrefixedCache(cache, vectors.num_embeddings)
    # Positions and masks are counted anew, by the decoder itself: given ones are for the text alone.
    for_text = {"position_ids", "attention_mask"}
    kwargs = {name: None if name in for_text else value for name, value in kwargs.items()}
    kwargs["past_key_values"] = cache
    if cache is not None and not cache.is_empty:
        return args, kwargs
    ids = args[0] if args else kwargs.pop("input_ids", None)
    text = kwargs.get("inputs_embeds")
    if text is None:
        text = decoder.get_input_embeddings()(ids)
    prompts = vectors.weight.to(text.dtype).expand(text.shape[0], -1, -1)
    kwargs["inputs_embeds"] = torch.cat([prompts, text], dim=1)
    return ((None, *args[1:]) if args else ()), kwargs


def _take_away(
    prefix: int, decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """After it: hidden states of the text alone, and the cache that was given."""
    cache = kwargs["past_key_values"]
    if cache is not None:
        output.past_key_values = cache.text
    if cache is None or cache.is_empty:
        output.last_hidden_state = output.last_hidden_state[:, prefix:]
    return output
