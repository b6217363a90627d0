"""A copy for transformers 4.34 is the same model."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from geopetals.bench.checkpoints import legacy_config, legacy_copy
from geopetals.errors import CheckpointError
from tests.models import save_llama


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 500_000.0},
        {"rope_type": "linear", "rope_theta": 20_000.0, "factor": 4.0},
    ],
)
def test_the_copy_computes_the_same_and_names_what_older_releases_read(rope: dict[str, object], tmp_path: Path) -> None:
    model = save_llama(tmp_path / "model", layers=2, rope_parameters=rope)
    copy = legacy_copy(model, tmp_path / "copy")
    assert legacy_copy(model, copy) == copy  # again, over what is there
    config = json.loads((copy / "config.json").read_text())
    assert "rope_parameters" not in config
    assert config["rope_theta"] == rope["rope_theta"]
    assert config["torch_dtype"] == "float32"
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        ours, theirs = (AutoModelForCausalLM.from_pretrained(d)(tokens).logits for d in (model, copy))
    assert torch.equal(ours, theirs)


def test_a_model_without_rotary_embeddings_stays_as_it_is() -> None:
    assert legacy_config({"model_type": "bloom", "n_layer": 2}) == {"model_type": "bloom", "n_layer": 2}


def test_what_older_releases_cannot_compute_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="llama3"):
        legacy_config({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6, "factor": 8.0}})
    with pytest.raises(CheckpointError, match=r"config\.json"):
        legacy_copy(tmp_path, tmp_path / "copy")
