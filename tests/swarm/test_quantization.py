"""Blocks in 8 and 4 bits give what the same model gives when it is quantized and run in one process."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from geopetals.client.hollow import load_client
from geopetals.errors import CheckpointError, StackError, UnsupportedInput
from geopetals.swarm.blocks import measured_block_bytes
from geopetals.swarm.checkpoint import Checkpoint
from geopetals.swarm.quantization import memory_bytes, quantization_config, stored_quantization
from geopetals.swarm.stage import Stage, load_stage
from tests import models

CPU = torch.device("cpu")
FORMATS = ("int8", "nf4")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save_llama(tmp_path_factory.mktemp("models") / "llama", layers=4, hidden_size=64)


@pytest.fixture(scope="module", params=FORMATS)
def quantization(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def local_model(directory: Path, quantization: str) -> PreTrainedModel:
    config = quantization_config(quantization, torch.float32)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, quantization_config=config)


def split(directory: Path, quantization: str | None) -> list[Stage]:
    checkpoint = Checkpoint.open(str(directory))
    spans = ((0, 2), (1, 4))
    return [load_stage(checkpoint, a, b, dtype=torch.float32, device=CPU, quantization=quantization) for a, b in spans]


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@torch.inference_mode()
def test_two_stages_equal_the_quantized_local_model(directory: Path, quantization: str) -> None:
    local, (first, second) = local_model(directory, quantization), split(directory, quantization)
    ids = torch.randint(3, models.VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))
    hidden = local.model.embed_tokens(ids)
    ours = local.model.norm(second.run(first.run(hidden, 0, 2), 2, 4))
    assert relative(ours, local.model(ids).last_hidden_state) < 1e-5


@torch.inference_mode()
def test_decoding_equals_the_quantized_local_model_step_by_step(directory: Path, quantization: str) -> None:
    """In the same pieces: int8 finds its scales, and nf4 its layout, call by call."""
    local, (first, second) = local_model(directory, quantization), split(directory, quantization)
    ids = torch.randint(3, models.VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(1))
    caches = [first.allocate_kv(0, 2, batch=1, max_length=12), second.allocate_kv(2, 4, batch=1, max_length=12)]
    past = DynamicCache(config=local.config)
    for piece in ids.split([7, 1, 1, 3], dim=1):
        hidden = first.run(local.model.embed_tokens(piece), 0, 2, kv=caches[0])
        ours = local.model.norm(second.run(hidden, 2, 4, kv=caches[1]))
        assert relative(ours, local.model(piece, past_key_values=past).last_hidden_state) < 1e-5


@torch.inference_mode()
def test_a_checkpoint_that_is_quantized_already_is_served_as_it_is(
    directory: Path, quantization: str, tmp_path: Path
) -> None:
    local_model(directory, quantization).save_pretrained(tmp_path)  # before any forward: bitsandbytes repacks then
    checkpoint = Checkpoint.open(str(tmp_path))
    assert stored_quantization(checkpoint.config) == "bitsandbytes"
    stored = load_stage(checkpoint, 0, 4, dtype=torch.float32, device=CPU)
    local = local_model(directory, quantization)
    hidden = local.model.embed_tokens(torch.tensor([[5, 6, 7, 8]]))
    ours = local.model.norm(stored.run(hidden, 0, 4))
    assert relative(ours, local.model(torch.tensor([[5, 6, 7, 8]])).last_hidden_state) < 1e-5


def test_the_client_needs_no_quantizer_for_its_part(directory: Path, quantization: str, tmp_path: Path) -> None:
    local_model(directory, quantization).save_pretrained(tmp_path)
    hollow, _ = load_client(Checkpoint.open(str(tmp_path)))
    plain, _ = load_client(Checkpoint.open(str(directory)))
    assert torch.equal(hollow.lm_head.weight, plain.lm_head.weight)
    assert hollow.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize("method", ["nonsense", None])
def test_an_unknown_quantization_is_refused(directory: Path, tmp_path: Path, method: str | None) -> None:
    copy = shutil.copytree(directory, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    with pytest.raises(CheckpointError, match="cannot load"):
        load_stage(Checkpoint.open(str(copy)), 0, 2, dtype=torch.float32, device=CPU)


def test_quantizing_twice_is_refused(directory: Path, quantization: str, tmp_path: Path) -> None:
    local_model(directory, quantization).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="quantized already"):
        load_stage(Checkpoint.open(str(tmp_path)), 0, 2, dtype=torch.float32, device=CPU, quantization="nf4")


def test_memory_per_block_is_measured(directory: Path, quantization: str) -> None:
    checkpoint = Checkpoint.open(str(directory))
    measured = measured_block_bytes(checkpoint, dtype=torch.float32, device=CPU, quantization=quantization)
    stage = load_stage(checkpoint, 0, 4, dtype=torch.float32, device=CPU, quantization=quantization)
    assert 4 * measured == pytest.approx(stage.memory_bytes, rel=0.02)
    full = checkpoint.block_bytes(torch.float32)
    assert measured < {"int8": 0.3, "nf4": 0.2}[quantization] * full
    weights = sum(parameter.numel() for parameter in stage._base.layers.parameters())
    assert stage.memory_bytes >= weights  # uint8 and int8 weights at least


def test_memory_counts_tied_storages_once() -> None:
    module = torch.nn.Linear(8, 8, bias=False)
    both = torch.nn.ModuleList([module, module])
    assert memory_bytes(both) == 8 * 8 * 4


def test_without_bitsandbytes_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StackError, match="pip install bitsandbytes"):
        quantization_config("nf4", torch.float32)


def test_another_format_is_refused() -> None:
    with pytest.raises(UnsupportedInput, match="choose int8 or nf4"):
        quantization_config("int3", torch.float32)
