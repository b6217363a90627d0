"""Cards of models: exact parameter counts, and the bytes that Transformers and bitsandbytes really use."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from transformers import AutoConfig, AutoModelForCausalLM

from geopetals.errors import CheckpointError
from geopetals.models import FAMILIES, NAMES, builtin_card, card_from_config, find_card, read_card
from geopetals.swarm.checkpoint import Checkpoint
from geopetals.swarm.stage import load_stage
from tests import models
from tests.families import tiny_config

PUBLISHED = {
    "bloom-560m": 559_214_592,
    "bloom-7b1": 7_069_016_064,
    "bloom-176b": 176_247_271_424,
    "llama-2-7b": 6_738_415_616,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3-405b": 405_853_388_800,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
}
_TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 112,
}
_CLASSIC = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 112}
CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("bloom", {"hidden_size": 64, "n_layer": 3, "n_head": 4, "vocab_size": 112}),
    ("falcon", _CLASSIC),
    ("falcon", {**_CLASSIC, "multi_query": False, "bias": True, "parallel_attn": False}),
    ("falcon", {**_CLASSIC, "new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 80}),
    ("gemma2", {**_TINY, "head_dim": 32}),
    ("gemma3_text", {**_TINY, "head_dim": 32}),
    ("gpt2", {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 112, "n_positions": 50, "n_inner": 80}),
    ("gpt_neox", _TINY),
    ("llama", _TINY),
    ("llama", {**_TINY, "head_dim": 24, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("mistral", _TINY),
    ("mixtral", {**_TINY, "num_local_experts": 4, "num_experts_per_tok": 2}),
    ("phi3", {**_TINY, "pad_token_id": 0}),
    ("qwen2", _TINY),
    ("qwen3", {**_TINY, "attention_bias": True}),
    ("qwen3_moe", {**_TINY, "num_experts": 4, "moe_intermediate_size": 48, "num_experts_per_tok": 2}),
]


def test_each_known_family_is_compared_with_transformers() -> None:
    assert {family for family, _ in CONFIGS} == set(FAMILIES)


@pytest.mark.parametrize(("family", "values"), CONFIGS, ids=[family for family, _ in CONFIGS])
def test_parameters_are_those_of_the_model_in_transformers(family: str, values: dict[str, Any]) -> None:
    config = AutoConfig.for_model(family, **values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    card = card_from_config("tiny", config.to_dict())
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3)
    assert card.num_blocks == 3
    assert [sum(p.numel() for p in block.parameters()) for block in blocks] == [card.block_parameters] * 3
    assert card.total_parameters == sum(p.numel() for p in model.parameters())
    assert card.hidden_size == 64


@pytest.mark.parametrize("name", NAMES)
def test_built_in_models_have_the_published_number_of_parameters(name: str) -> None:
    assert builtin_card(name).total_parameters == PUBLISHED[name]


def test_active_parameters_of_mixtures_are_those_in_their_names() -> None:
    for name, billions in (("qwen3-30b-a3b", 3), ("qwen3-235b-a22b", 22)):
        card = builtin_card(name)
        used = card.num_blocks * card.active_parameters + card.outside_parameters
        assert used == pytest.approx(billions * 1e9, rel=0.15)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("weights", [None, "int8", "nf4"])
def test_bytes_are_those_of_a_loaded_block(family: str, weights: str | None, tmp_path: Path) -> None:
    values: dict[str, Any] = {"hidden_size": 128, "head_dim": 32, "vocab_size": models.VOCABULARY}
    experts = {"num_experts": 4, "moe_intermediate_size": 64, "num_experts_per_tok": 2} if family == "qwen3_moe" else {}
    config = AutoConfig.for_model(family, **{**_TINY, "intermediate_size": 192, **values, **experts})
    directory = models.save_model(tmp_path / "model", config)
    card = read_card(directory)
    stage = load_stage(
        Checkpoint.open(str(directory)),
        0,
        1,
        dtype=torch.float32,
        device=torch.device("cpu"),
        quantization=weights,
    )
    # The stage also holds the rotary embedding's few frequencies.
    assert 0 <= stage.memory_bytes - card.block_bytes(weights or "float32", dtype="float32") <= 1024  # type: ignore[arg-type]
    assert stage.kv_bytes_per_token() == card.kv_bytes_per_token("float32")


def test_a_path_to_a_config_and_its_directory_give_the_same_card(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **_TINY}))
    assert find_card(str(tmp_path)) == find_card(str(tmp_path / "config.json"))
    assert find_card(str(tmp_path)).name == tmp_path.name


REFUSED: list[tuple[object, str]] = [
    ({"model_type": "mamba"}, "keeps something else than keys and values"),
    ({"model_type": "no_such_family"}, "is not understood by Transformers"),
    ({"model_type": "deepseek_v3"}, "blocks are all alike"),
    ({"hidden_size": 64}, "no model_type"),
    ({"model_type": "llama", **_TINY, "num_hidden_layers": -2}, "num_hidden_layers is -2"),
    ({"model_type": "llama", **_TINY, "hidden_size": "64"}, "hidden_size is '64'"),
    ({"model_type": "llama", **_TINY, "num_key_value_heads": 3}, "4 attention heads"),
    ({"model_type": "llama", **_TINY, "attention_bias": 1}, "attention_bias is 1"),
    ({k: v for k, v in {"model_type": "llama", **_TINY}.items() if k != "intermediate_size"}, "intermediate_size"),
    ({"model_type": "qwen3_moe", **_TINY, "num_experts": 4, "mlp_only_layers": [0]}, "blocks are all alike"),
    ([1], "no JSON object"),
]


@pytest.mark.parametrize(("config", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_cannot_be_described_is_refused_in_one_sentence(config: object, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words) as caught:
        find_card(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["opt", "gptj", "olmo2", "cohere", "phi", "starcoder2", "mpt", "glm4", "smollm3"])
def test_other_families_are_counted_by_transformers(family: str) -> None:
    config = tiny_config(family)
    card = card_from_config(family, json.loads(config.to_json_string(use_diff=False)))
    model = AutoModelForCausalLM.from_config(config)
    assert card.total_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert card.num_blocks == config.num_hidden_layers


def test_latent_attention_is_counted_as_what_is_kept_of_a_token() -> None:
    card = card_from_config("mla", {"model_type": "deepseek_v3", "first_k_dense_replace": 0, "num_hidden_layers": 2})
    latent, rotary = 512, 64
    assert card.kv_bytes_per_token("bfloat16") == (latent + rotary) * 2


def test_a_wrong_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(CheckpointError, match="did you mean llama-3-8b"):
        find_card("llama-3-8")


def test_a_broken_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="no JSON"):
        find_card(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        find_card(str(tmp_path / "empty"))


def test_without_the_hub_the_error_says_what_to_give_instead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("geopetals.models.hub.HfApi", lambda: HfApi(endpoint="http://127.0.0.1:9"))
    with pytest.raises(CheckpointError, match="Hub cannot be reached"):
        find_card("nobody/no-such-model")
