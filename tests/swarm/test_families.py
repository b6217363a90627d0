from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, LlamaModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from geopetals.errors import CheckpointError
from geopetals.swarm.architecture import native_class
from geopetals.swarm.checkpoint import Checkpoint
from geopetals.swarm.stage import load_stage
from tests.families import differences, read_document, save_tiny, tiny_config
from tests.in_process import CPU, TWO, InProcess
from tests.models import save_llama

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SHARDED = {"llama", "llama3-tied", "gpt2", "mixtral", "gemma3"}
WITH_BEAMS = {"llama3-tied", "mistral", "gemma3", "mixtral", "bloom", "gpt2"}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama3-tied": ("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "mistral": ("mistral", {}),
    "mixtral": ("mixtral", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3_text", {}),
    "phi3": ("phi3", {}),
    "falcon": ("falcon", {}),
    "falcon-alibi": ("falcon", {"alibi": True, "multi_query": False}),
    "falcon-grouped": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt2": ("gpt2", {}),
    "bloom": ("bloom", {}),
    "opt": ("opt", {}),
    "granite": ("granite", {"embedding_multiplier": 12.0, "residual_multiplier": 0.22}),
    "llama4-chunks": ("llama4_text", {}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_split_over_servers_it_equals_the_local_model(tmp_path: Path, name: str) -> None:
    family, settings = FAMILIES[name]
    local = save_tiny(tmp_path, tiny_config(family, **settings), sharded=name in SHARDED)
    remote = InProcess(tmp_path)
    assert differences(remote, local, 1) == []
    assert differences(remote, local, 3, beams=name in WITH_BEAMS) == []


def test_two_stages_equal_the_local_model_too(tmp_path: Path) -> None:
    local = save_tiny(tmp_path, tiny_config("gemma3_text"))
    assert differences(InProcess(tmp_path, TWO), local, 3) == []


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("bart", {}, "encoder-decoder"),
        ("gemma3", {}, "more than a language model"),
        ("mamba", {}, "recurrent or convolution state"),
        ("jamba", {}, "recurrent or convolution state"),
        ("qwen3_next", {}, "recurrent or convolution state"),
        ("lfm2", {"layer_types": ["conv", "full_attention"] * 16}, "recurrent or convolution state"),
        ("gemma3n_text", {}, "keys and values of other layers"),
        ("deepseek_v32", {}, "more than keys and values"),
    ],
)
def test_config_alone_tells_what_cannot_be_split(family: str, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        native_class(CONFIG_MAPPING[family](**settings))


def test_inputs_for_each_layer_are_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, tiny_config("gemma4_text", hidden_size_per_layer_input=16))
    with pytest.raises(CheckpointError, match=r"cannot be split"):
        InProcess(tmp_path)


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, tiny_config("bert", is_decoder=False))
    with pytest.raises(CheckpointError, match=r"encoder"):
        InProcess(tmp_path)


Forward = Callable[..., Any]
model_forward: Forward = LlamaModel.forward
layer_forward: Forward = LlamaDecoderLayer.forward


def reads_the_embedding(self: Any, inputs_embeds: Tensor, **kwargs: Any) -> Any:
    return model_forward(self, inputs_embeds=inputs_embeds, first=inputs_embeds, **kwargs)


def shares_a_list(self: Any, **kwargs: Any) -> Any:
    return model_forward(self, shared=[], **kwargs)


def shares_an_object(self: Any, **kwargs: Any) -> Any:
    return model_forward(self, shared=object(), **kwargs)


def runs_its_layers_twice(self: Any, inputs_embeds: Tensor, **kwargs: Any) -> Any:
    once = model_forward(self, inputs_embeds=inputs_embeds, **kwargs)[0]
    return model_forward(self, inputs_embeds=once, **kwargs)


def scales_what_comes_in(self: Any, inputs_embeds: Tensor, **kwargs: Any) -> Any:
    return model_forward(self, inputs_embeds=inputs_embeds * 2, **kwargs)


def keeps_a_state(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    out: Tensor = layer_forward(self, hidden_states, **kwargs)
    shifted = torch.cat([torch.zeros_like(out[:, :1]), out[:, :-1]], dim=1)
    return out + 0.1 * shifted


def looks_ahead(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    out: Tensor = layer_forward(self, hidden_states, **kwargs)
    return out + 0.1 * out.mean(dim=1, keepdim=True)


def mixes_the_batch(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    out: Tensor = layer_forward(self, hidden_states, **kwargs)
    return out + 0.1 * out.mean(dim=0, keepdim=True)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("unknown"))


@pytest.mark.parametrize("span", [(2, 3), (2, 5)])
@pytest.mark.parametrize(
    ("kind", "forward"),
    [
        (LlamaModel, reads_the_embedding),
        (LlamaModel, shares_a_list),
        (LlamaModel, shares_an_object),
        (LlamaModel, runs_its_layers_twice),
        (LlamaModel, scales_what_comes_in),
        (LlamaDecoderLayer, keeps_a_state),
        (LlamaDecoderLayer, looks_ahead),
        (LlamaDecoderLayer, mixes_the_batch),
    ],
)
def test_an_unknown_family_is_refused_for_what_it_does(
    llama: Path, monkeypatch: pytest.MonkeyPatch, kind: type, forward: Forward, span: tuple[int, int]
) -> None:
    """Llamas with a secret stand for families that nobody has seen yet; one block is enough to tell."""
    checkpoint = Checkpoint.open(str(llama))
    monkeypatch.setattr(kind, "forward", forward)
    with pytest.raises(CheckpointError, match=r"cannot be split over servers"):
        load_stage(checkpoint, *span, dtype=torch.float32, device=CPU)


def test_the_document_is_about_all_families_of_this_transformers() -> None:
    version, statuses = read_document(DOCUMENT)
    assert {family for family, _ in FAMILIES.values()} <= {k for k, status in statuses.items() if status == "works"}
    if version == transformers.__version__:
        assert set(statuses) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
