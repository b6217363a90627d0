"""Tiny models with random weights, saved as a person would save them; equal seeds give equal bytes."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
VOCABULARY = 256 + len(SPECIAL_TOKENS)
CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def save_llama(
    directory: Path,
    *,
    layers: int = 6,
    hidden_size: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    tied: bool = False,
    sharded: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """A Llama with grouped-query attention, and its tokenizer. `sharded`: about one shard for each block."""
    settings = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **{"max_position_embeddings": 512} | config,
    )
    return save_model(directory, settings, sharded=sharded, seed=seed, dtype=dtype)


def save_model(
    directory: Path,
    config: PretrainedConfig,
    *,
    sharded: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    spread: float | None = None,
) -> Path:
    """A model of any family with random weights, and the tokenizer.

    With `spread` weights are drawn anew, that wide for each input: all parts of the model then matter to the output.
    """
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    if spread is not None:
        _draw_anew(model, spread)
    model = model.to(dtype)
    torch.set_rng_state(generator_state)
    model.generation_config.pad_token_id = 0
    size = _shard_bytes(model) if sharded else "1GB"
    model.save_pretrained(directory, max_shard_size=size)
    save_tokenizer(directory)
    return directory


@torch.no_grad()
def _draw_anew(model: PreTrainedModel, spread: float) -> None:
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=spread / parameter.shape[-1] ** 0.5)
        elif parameter.is_floating_point():
            parameter.add_(0.1 * torch.randn_like(parameter))


def _shard_bytes(model: PreTrainedModel) -> int:
    largest = max(parameter.nbytes for parameter in model.parameters())
    layers: int = model.config.num_hidden_layers
    return max(largest, sum(parameter.nbytes for parameter in model.parameters()) // (layers + 1))


def save_tokenizer(directory: Path) -> None:
    """One token for each byte: any text survives encoding and decoding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, bos, eos = SPECIAL_TOKENS
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos)
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)
