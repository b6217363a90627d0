"""Prompts in front of a local model's text, for families that treat their input differently."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
)

from geopetals.client.hollow import RemoteCache
from geopetals.client.ptune import PrefixedCache, add_prompts, check_tuning, deep_prompts
from geopetals.errors import UnsupportedInput
from tests.models import VOCABULARY

PREFIX, LAYERS, HIDDEN = 4, 3, 32
COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0}
SHAPE: dict[str, Any] = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**COMMON, **SHAPE, intermediate_size=64),
    "gemma2": Gemma2Config(**COMMON, **SHAPE, intermediate_size=64, num_key_value_heads=4, head_dim=8),
    "bloom": BloomConfig(**COMMON, hidden_size=HIDDEN, n_layer=LAYERS, n_head=4),
    "falcon": FalconConfig(**COMMON, **SHAPE),
    "gpt2": GPT2Config(**COMMON, n_embd=HIDDEN, n_layer=LAYERS, n_head=4),
    "opt": OPTConfig(**COMMON, **SHAPE, ffn_dim=64, word_embed_proj_dim=HIDDEN),
}


def build(family: str) -> Any:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(CONFIGS[family])
    return model.eval().requires_grad_(False)


def random_ids(batch: int, length: int = 7) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", CONFIGS)
def test_prompts_are_embeddings_in_front_of_the_text(family: str) -> None:
    """As if a user had put them there with `inputs_embeds`: positions and embedding norms are theirs too."""
    model = build(family)
    ids, mask = random_ids(3), torch.ones(3, 7, dtype=torch.int64)
    embedded = model.get_input_embeddings()(ids)
    tuned = build(family)
    add_prompts(tuned, "ptune", PREFIX)
    vectors = tuned.base_model.prompt_embeddings.weight
    front = torch.cat([vectors.expand(3, -1, -1), embedded], dim=1)
    expected = model(inputs_embeds=front, use_cache=False).logits[:, PREFIX:]
    for inputs in (
        {"input_ids": ids},
        {"input_ids": ids, "attention_mask": mask, "position_ids": torch.arange(7)[None].expand(3, -1)},
        {"inputs_embeds": embedded},
    ):
        found = tuned(**inputs, use_cache=False, past_key_values=None).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert [name for name, p in tuned.named_parameters() if p.requires_grad] == [
        f"{tuned.base_model_prefix}.prompt_embeddings.weight"
    ]
    loss = tuned(input_ids=ids, labels=ids, use_cache=False).loss
    assert torch.autograd.grad(loss, vectors)[0].abs().max() > 0


def test_a_tuple_is_cut_too() -> None:
    tuned = build("llama")
    add_prompts(tuned, "ptune", PREFIX)
    ids = random_ids(2)
    found = tuned(input_ids=ids, use_cache=False, return_dict=False)[0]
    torch.testing.assert_close(found, tuned(input_ids=ids, use_cache=False).logits)


def test_deep_prompts_have_petals_layout() -> None:
    """A row of the embedding holds the vectors of one prompt position for all blocks."""
    model = build("llama")
    add_prompts(model, "deep_ptune", PREFIX)
    weight = model.base_model.intermediate_prompt_embeddings.weight
    prompts = deep_prompts(model)
    assert prompts is not None
    assert prompts.shape == (LAYERS, 1, PREFIX, HIDDEN)
    for block in range(LAYERS):
        expected = weight[:, block * HIDDEN : (block + 1) * HIDDEN]
        assert torch.equal(prompts[block, 0], expected)


def test_prompts_stay_in_float32_beside_a_model_in_half_precision() -> None:
    model = build("llama").to(torch.bfloat16)
    add_prompts(model, "deep_ptune", PREFIX)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    prompts = deep_prompts(model)
    assert prompts is not None
    assert prompts.dtype == torch.bfloat16
    assert model(input_ids=random_ids(1), use_cache=False).logits.dtype == torch.bfloat16


def test_without_tuning_nothing_is_added() -> None:
    model = build("llama")
    before = dict(model.named_parameters())
    add_prompts(model, None, 0)
    assert dict(model.named_parameters()).keys() == before.keys()
    assert deep_prompts(model) is None


@pytest.mark.parametrize(
    ("mode", "length", "reason"),
    [
        ("lora", 4, "the modes are ptune and deep_ptune"),
        ("ptune", 0, "pre_seq_len=16"),
        ("deep_ptune", -1, "pre_seq_len=16"),
    ],
)
def test_what_is_no_tuning_is_refused(mode: str, length: int, reason: str) -> None:
    with pytest.raises(UnsupportedInput, match=reason):
        check_tuning(mode, length)


def test_the_decoder_counts_prompts_that_generation_does_not() -> None:
    position = 0
    text = RemoteCache(lambda: position, LAYERS)
    empty = PrefixedCache(text, PREFIX)
    assert empty.is_empty
    assert empty.get_seq_length() == 0
    position = 7
    later = PrefixedCache(text, PREFIX)
    assert not later.is_empty
    assert (text.get_seq_length(), later.get_seq_length()) == (7, 7 + PREFIX)


def test_prompts_are_saved_and_loaded_under_petals_names(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    first, second = build("llama"), build("llama")
    for model in (first, second):
        add_prompts(model, "deep_ptune", PREFIX)
    save_file({n: p for n, p in first.named_parameters() if p.requires_grad}, tmp_path / "prompts.safetensors")
    loaded = load_file(tmp_path / "prompts.safetensors")
    assert set(loaded) == {"model.prompt_embeddings.weight", "model.intermediate_prompt_embeddings.weight"}
    assert not second.load_state_dict(loaded, strict=False).unexpected_keys
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name))
