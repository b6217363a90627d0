"""Checkpoints that transformers 4.34 and 5 read alike: written as those of the models' own time are.

transformers 5 saves `rope_parameters`, of which 4.34 knows nothing: it then takes a rope_theta of 10000 whatever the
model has, and stock PETALS answers with plausible wrong tokens.
"""

import json
from pathlib import Path

import torch
from transformers import BloomConfig, BloomForCausalLM

from tests.models import VOCABULARY, save_llama

NUM_BLOCKS = 6
_ROPE_THETA = 500_000.0


def save(family: str, directory: Path) -> Path:
    return {"llama": _save_llama, "bloom": _save_bloom}[family](directory)


def _save_llama(directory: Path) -> Path:
    rope = {"rope_type": "default", "rope_theta": _ROPE_THETA}
    save_llama(directory, layers=NUM_BLOCKS, rope_parameters=rope)
    config = _read_config(directory)
    del config["rope_parameters"]
    _write_config(directory, {**config, "rope_theta": _ROPE_THETA, "rope_scaling": None})
    return directory


def _save_bloom(directory: Path) -> Path:
    """Parameters are named `h.0. ...`, without `transformer.`, as in bigscience/bloom; stock looks for nothing else."""
    settings = BloomConfig(
        vocab_size=VOCABULARY, hidden_size=64, n_layer=NUM_BLOCKS, n_head=4, initializer_range=0.2, pad_token_id=0
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BloomForCausalLM(settings)
    model.transformer.save_pretrained(directory)
    _write_config(directory, {**_read_config(directory), "architectures": ["BloomForCausalLM"]})
    return directory


def _read_config(directory: Path) -> dict[str, object]:
    config: dict[str, object] = json.loads((directory / "config.json").read_text())
    return config


def _write_config(directory: Path, config: dict[str, object]) -> None:
    renamed = {"torch_dtype" if key == "dtype" else key: value for key, value in config.items()}
    (directory / "config.json").write_text(json.dumps(renamed, indent=2))
