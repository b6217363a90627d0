"""Classifiers put together from language models, against Transformers' own with the same weights."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    OPTConfig,
    PretrainedConfig,
)

from geopetals.client.classification import load_trained_head, with_classifier_head
from geopetals.client.hollow import load_client
from geopetals.client.ptune import add_prompts
from geopetals.errors import CheckpointError
from geopetals.swarm.checkpoint import Checkpoint
from tests.models import VOCABULARY

COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0}
SHAPE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**COMMON, **SHAPE, intermediate_size=64),
    "bloom": BloomConfig(**COMMON, hidden_size=32, n_layer=2, n_head=4),
    "falcon": FalconConfig(**COMMON, **SHAPE),
    "gpt2": GPT2Config(**COMMON, n_embd=32, n_layer=2, n_head=4),
    "gpt_neox": GPTNeoXConfig(**COMMON, **SHAPE, intermediate_size=64),
    "opt": OPTConfig(**COMMON, **SHAPE, ffn_dim=64, word_embed_proj_dim=32),
}


def language_model(config: PretrainedConfig) -> Any:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    return model.eval().requires_grad_(False)


def padded_ids() -> torch.Tensor:
    ids = torch.randint(3, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(1))
    ids[1, 4:] = 0
    return ids


@pytest.mark.parametrize("family", CONFIGS)
def test_a_classifier_is_transformers_own(family: str) -> None:
    source = language_model(CONFIGS[family])
    found: Any = with_classifier_head(source, num_labels=3)
    assert type(found).__name__.endswith("ForSequenceClassification")
    assert [name for name, p in found.named_parameters() if p.requires_grad] == ["score.weight"]
    own: Any = AutoModelForSequenceClassification.from_config(found.config).eval()
    own.load_state_dict(found.state_dict())
    ids, labels = padded_ids(), torch.tensor([2, 0, 1])
    output, expected = found(ids, labels=labels), own(ids, labels=labels)
    assert output.logits.shape == (3, 3)
    torch.testing.assert_close(output.logits, expected.logits)
    torch.testing.assert_close(output.loss, expected.loss)


@pytest.mark.parametrize("family", CONFIGS)
def test_tuned_prompts_move_no_label(family: str) -> None:
    """A row's label is read off its own last token, with prompts in front or without."""
    model: Any = with_classifier_head(language_model(CONFIGS[family]), num_labels=3)
    add_prompts(model, "ptune", 4)
    with torch.no_grad():
        logits = model(padded_ids(), use_cache=False).logits
        alone = model(padded_ids()[1:2, :4], use_cache=False).logits
        again = model(padded_ids(), use_cache=False).logits
    torch.testing.assert_close(logits[1:2], alone)
    assert torch.equal(logits, again)


def test_numbers_instead_of_labels() -> None:
    model: Any = with_classifier_head(language_model(CONFIGS["llama"]), num_labels=1, problem_type="regression")
    output = model(padded_ids(), labels=torch.tensor([0.5, -1.0, 2.0]))
    expected = torch.nn.functional.mse_loss(output.logits.squeeze(), torch.tensor([0.5, -1.0, 2.0]))
    torch.testing.assert_close(output.loss, expected)


def test_a_head_in_the_format_of_the_model() -> None:
    source = language_model(CONFIGS["llama"]).to(torch.bfloat16)
    model: Any = with_classifier_head(source)
    assert model.score.weight.dtype == torch.bfloat16
    assert model(padded_ids()).logits.shape == (3, 2)


def test_a_family_without_a_classifier_is_refused() -> None:
    source = language_model(CohereConfig(**COMMON, **SHAPE, intermediate_size=64))
    with pytest.raises(CheckpointError, match="no sequence classifier for cohere"):
        with_classifier_head(source)


def test_a_trained_head_is_taken_over(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_labels=3, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    trained = LlamaForSequenceClassification(config)
    trained.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(str(tmp_path))
    ours: Any = with_classifier_head(load_client(checkpoint)[0], num_labels=3)
    load_trained_head(ours, checkpoint)
    assert torch.equal(ours.score.weight, trained.score.weight)
    other = with_classifier_head(load_client(checkpoint)[0], num_labels=5)
    with pytest.raises(CheckpointError, match="pass num_labels=3"):
        load_trained_head(other, checkpoint)
