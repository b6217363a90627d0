"""From a `config.json` to a ModelCard: what each family of Transformers' decoder-only models puts into a block.

The same names, defaults and shapes as in the classes of Transformers 5; no torch here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from geopetals.models.card import DTYPES, Dtype, ModelCard
from geopetals.models.config import Config

_Linear = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """One decoder layer, and what stands outside of the layers beside the embedding and the LM head."""

    heads: int
    kv_heads: int
    head_dim: int
    linear: _Linear
    other: int
    inactive: int = 0
    outside: int
    tied: bool


def card_from_config(name: str, values: Mapping[str, object]) -> ModelCard:
    """Families that are not counted here are left to Transformers, which takes seconds to load.

    Raises CheckpointError for what is no language model, and for models whose blocks are not alike.
    """
    config = Config(name, values)
    family = config.text("model_type")
    if family is None:
        raise config.refuse("has no model_type: give the config.json of a language model")
    if family not in _FAMILIES or config.values.get("kv_lora_rank") is not None:
        from geopetals.models.measured import measured_card

        return measured_card(name, values)
    hidden = config.count("hidden_size", "n_embd")
    block = _FAMILIES[family](config, hidden)
    if block.heads % block.kv_heads:
        raise config.refuse(f"has {block.heads} attention heads, which {block.kv_heads} key-value heads cannot share")
    embedding = config.count("vocab_size") * hidden
    parameters = sum(rows * columns for rows, columns in block.linear) + block.other
    return ModelCard(
        name=name,
        family=family,
        num_blocks=config.count("num_hidden_layers", "n_layer"),
        hidden_size=hidden,
        heads=block.heads,
        kv_heads=block.kv_heads,
        head_dim=block.head_dim,
        linear=block.linear,
        other_parameters=block.other,
        active_parameters=parameters - block.inactive,
        outside_parameters=embedding * (1 if block.tied else 2) + block.outside,
        stored_dtype=_stored_dtype(config),
        max_tokens=config.count_if_given("max_position_embeddings", "n_positions"),
    )


def _stored_dtype(config: Config) -> Dtype | None:
    stored = config.text("dtype", "torch_dtype")
    return next((dtype for dtype in DTYPES if dtype == stored), None)


def _attention(config: Config, hidden: int, *, head_dim: int | None = None) -> tuple[int, int, int]:
    """Heads, key-value heads and the size of a head."""
    heads = config.count("num_attention_heads", "n_head")
    default = head_dim or max(hidden // heads, 1)
    return heads, config.count("num_key_value_heads", default=heads), config.count("head_dim", default=default)


def _llama_like(
    config: Config,
    hidden: int,
    *,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    head_norms: bool = False,
    norms: int = 2,
    tied: bool = False,
    head_dim: int | None = None,
) -> _Block:
    """Grouped attention, a gated MLP and RMS norms, with or without biases."""
    heads, kv_heads, size = _attention(config, hidden, head_dim=head_dim)
    inner, queries, keys = config.count("intermediate_size"), heads * size, kv_heads * size
    other = norms * hidden + head_norms * 2 * size
    other += qkv_bias * (queries + 2 * keys) + out_bias * hidden + mlp_bias * (2 * inner + hidden)
    return _Block(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=size,
        linear=(*_projections(hidden, queries, keys), (inner, hidden), (inner, hidden), (hidden, inner)),
        other=other,
        outside=hidden,
        tied=config.flag("tie_word_embeddings", default=tied),
    )


def _projections(hidden: int, queries: int, keys: int) -> _Linear:
    return (queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)


def _llama(config: Config, hidden: int) -> _Block:
    bias = config.flag("attention_bias", default=False)
    return _llama_like(config, hidden, qkv_bias=bias, out_bias=bias, mlp_bias=config.flag("mlp_bias", default=False))


def _qwen2(config: Config, hidden: int) -> _Block:
    return _llama_like(config, hidden, qkv_bias=True)


def _qwen3(config: Config, hidden: int) -> _Block:
    bias = config.flag("attention_bias", default=False)
    return _llama_like(config, hidden, qkv_bias=bias, out_bias=bias, head_norms=True, head_dim=128)


def _gemma2(config: Config, hidden: int) -> _Block:
    bias = config.flag("attention_bias", default=False)
    return _llama_like(config, hidden, qkv_bias=bias, out_bias=bias, norms=4, tied=True, head_dim=256)


def _gemma3(config: Config, hidden: int) -> _Block:
    bias = config.flag("attention_bias", default=False)
    return _llama_like(config, hidden, qkv_bias=bias, out_bias=bias, norms=4, head_norms=True, tied=True, head_dim=256)


def _mixture(config: Config, hidden: int, *, inner: int, experts: int, head_norms: bool) -> _Block:
    heads, kv_heads, size = _attention(config, hidden)
    queries, keys = heads * size, kv_heads * size
    chosen = config.count("num_experts_per_tok", default=2 if config.text("model_type") == "mixtral" else 8)
    if chosen > experts:
        raise config.refuse(f"chooses {chosen} of {experts} experts: correct num_experts_per_tok")
    expert = 3 * inner * hidden
    bias = config.flag("attention_bias", default=False) * (queries + 2 * keys + hidden)
    return _Block(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=size,
        linear=_projections(hidden, queries, keys),
        other=2 * hidden + head_norms * 2 * size + bias + experts * (hidden + expert),
        inactive=(experts - chosen) * expert,
        outside=hidden,
        tied=config.flag("tie_word_embeddings", default=False),
    )


def _mixtral(config: Config, hidden: int) -> _Block:
    experts = config.count("num_local_experts", "num_experts", default=8)
    inner = config.count("intermediate_size")
    return _mixture(config, hidden, inner=inner, experts=experts, head_norms=False)


def _qwen3_moe(config: Config, hidden: int) -> _Block:
    if config.values.get("mlp_only_layers") or config.count("decoder_sparse_step", default=1) != 1:
        raise config.refuse("has blocks with and without experts: choose a model whose blocks are all alike")
    inner = config.count("moe_intermediate_size")
    experts = config.count("num_experts", "num_local_experts")
    return _mixture(config, hidden, inner=inner, experts=experts, head_norms=True)


def _phi3(config: Config, hidden: int) -> _Block:
    heads, kv_heads, size = _attention(config, hidden)
    inner, queries, keys = config.count("intermediate_size"), heads * size, kv_heads * size
    return _Block(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=size,
        linear=((queries + 2 * keys, hidden), (hidden, queries), (2 * inner, hidden), (hidden, inner)),
        other=2 * hidden,
        outside=hidden,
        tied=config.flag("tie_word_embeddings", default=False),
    )


def _classic(
    config: Config,
    hidden: int,
    *,
    inner: int,
    bias: bool,
    norms: int,
    outside: int,
    tied: bool,
    kv_heads: int | None = None,
) -> _Block:
    """One matrix for queries, keys and values, an MLP of two, layer norms with a bias."""
    heads = config.count("num_attention_heads", "n_head")
    size = max(hidden // heads, 1)
    fused = (heads + 2 * (kv_heads or heads)) * size
    return _Block(
        heads=heads,
        kv_heads=kv_heads or heads,
        head_dim=size,
        linear=((fused, hidden), (hidden, hidden), (inner, hidden), (hidden, inner)),
        other=norms * 2 * hidden + bias * (fused + hidden + inner + hidden),
        outside=outside,
        tied=config.flag("tie_word_embeddings", default=tied),
    )


def _bloom(config: Config, hidden: int) -> _Block:
    return _classic(config, hidden, inner=4 * hidden, bias=True, norms=2, outside=4 * hidden, tied=True)


def _gpt2(config: Config, hidden: int) -> _Block:
    outside = 2 * hidden + hidden * config.count("n_positions", "max_position_embeddings", default=1024)
    inner = config.count("n_inner", default=4 * hidden)
    return _classic(config, hidden, inner=inner, bias=True, norms=2, outside=outside, tied=True)


def _gpt_neox(config: Config, hidden: int) -> _Block:
    if not config.flag("attention_bias", default=True):
        raise config.refuse("has attention layers without bias, which is not known here")
    inner = config.count("intermediate_size")
    return _classic(config, hidden, inner=inner, bias=True, norms=2, outside=2 * hidden, tied=False)


def _falcon(config: Config, hidden: int) -> _Block:
    heads = config.count("num_attention_heads", "n_head")
    parallel = config.flag("parallel_attn", default=True)
    if config.flag("new_decoder_architecture", default=False):
        kv_heads = config.count("num_kv_heads", "n_head_kv", default=heads)
        norms = config.count("num_ln_in_parallel_attn", default=2)
    else:
        kv_heads = 1 if config.flag("multi_query", default=True) else heads
        norms = 1 if parallel else 2
    return _classic(
        config,
        hidden,
        inner=config.count("ffn_hidden_size", default=4 * hidden),
        bias=config.flag("bias", default=False),
        norms=norms,
        outside=2 * hidden,
        tied=True,
        kv_heads=kv_heads,
    )


_FAMILIES: dict[str, Callable[[Config, int], _Block]] = {
    "bloom": _bloom,
    "falcon": _falcon,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "llama": _llama,
    "mistral": _llama_like,
    "mixtral": _mixtral,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
}
FAMILIES = tuple(_FAMILIES)
