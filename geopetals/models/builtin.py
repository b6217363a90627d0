"""The models that have a name here: the values of their `config.json` that a card is made of."""

import functools

from geopetals.models.card import ModelCard
from geopetals.models.families import card_from_config

_Values = dict[str, object]


def _bloom(*, blocks: int, hidden: int, heads: int) -> _Values:
    return {
        "model_type": "bloom",
        "n_layer": blocks,
        "hidden_size": hidden,
        "n_head": heads,
        "vocab_size": 250880,
        "dtype": "bfloat16",
    }


def _llama(
    *, blocks: int, hidden: int, inner: int, heads: int, kv_heads: int, vocabulary: int, tokens: int, dtype: str
) -> _Values:
    return {
        "model_type": "llama",
        "num_hidden_layers": blocks,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": tokens,
        "tie_word_embeddings": False,
        "dtype": dtype,
    }


def _llama2(*, blocks: int, hidden: int, inner: int, heads: int, kv_heads: int) -> _Values:
    return _llama(
        blocks=blocks,
        hidden=hidden,
        inner=inner,
        heads=heads,
        kv_heads=kv_heads,
        vocabulary=32000,
        tokens=4096,
        dtype="float16",
    )


def _llama3(*, blocks: int, hidden: int, inner: int, heads: int, tokens: int = 8192) -> _Values:
    return _llama(
        blocks=blocks,
        hidden=hidden,
        inner=inner,
        heads=heads,
        kv_heads=8,
        vocabulary=128256,
        tokens=tokens,
        dtype="bfloat16",
    )


def _qwen3(*, blocks: int, hidden: int, inner: int, heads: int, tied: bool = False) -> _Values:
    return {
        "model_type": "qwen3",
        "num_hidden_layers": blocks,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": tied,
        "dtype": "bfloat16",
    }


def _qwen3_moe(*, blocks: int, hidden: int, expert: int, heads: int, kv_heads: int) -> _Values:
    return _qwen3(blocks=blocks, hidden=hidden, inner=3 * hidden, heads=heads) | {
        "model_type": "qwen3_moe",
        "num_key_value_heads": kv_heads,
        "moe_intermediate_size": expert,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    }


_CONFIGS: dict[str, _Values] = {
    "bloom-560m": _bloom(blocks=24, hidden=1024, heads=16),
    "bloom-7b1": _bloom(blocks=30, hidden=4096, heads=32),
    "bloom-176b": _bloom(blocks=70, hidden=14336, heads=112),
    "llama-2-7b": _llama2(blocks=32, hidden=4096, inner=11008, heads=32, kv_heads=32),
    "llama-2-70b": _llama2(blocks=80, hidden=8192, inner=28672, heads=64, kv_heads=8),
    "llama-3-8b": _llama3(blocks=32, hidden=4096, inner=14336, heads=32),
    "llama-3-70b": _llama3(blocks=80, hidden=8192, inner=28672, heads=64),
    "llama-3-405b": _llama3(blocks=126, hidden=16384, inner=53248, heads=128, tokens=131072),
    "qwen3-0.6b": _qwen3(blocks=28, hidden=1024, inner=3072, heads=16, tied=True),
    "qwen3-1.7b": _qwen3(blocks=28, hidden=2048, inner=6144, heads=16, tied=True),
    "qwen3-4b": _qwen3(blocks=36, hidden=2560, inner=9728, heads=32, tied=True),
    "qwen3-8b": _qwen3(blocks=36, hidden=4096, inner=12288, heads=32),
    "qwen3-14b": _qwen3(blocks=40, hidden=5120, inner=17408, heads=40),
    "qwen3-32b": _qwen3(blocks=64, hidden=5120, inner=25600, heads=64),
    "qwen3-30b-a3b": _qwen3_moe(blocks=48, hidden=2048, expert=768, heads=32, kv_heads=4),
    "qwen3-235b-a22b": _qwen3_moe(blocks=94, hidden=4096, expert=1536, heads=64, kv_heads=4),
}
NAMES = tuple(_CONFIGS)


@functools.cache
def builtin_card(name: str) -> ModelCard:
    """Raises KeyError for a name that is not in NAMES."""
    return card_from_config(name, _CONFIGS[name])
