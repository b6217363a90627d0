"""Rotary embeddings that depend on the length of the text."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from geopetals.errors import UnsupportedInput
from geopetals.swarm.checkpoint import Checkpoint
from geopetals.swarm.stage import Stage, load_stage
from tests.families import relative_error, save_tiny, tiny_config
from tests.in_process import CPU
from tests.models import save_llama

LIMIT = 16


def stage_of(directory: Path) -> Stage:
    return load_stage(Checkpoint.open(str(directory)), 0, 6, dtype=torch.float32, device=CPU)


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    return save_llama(tmp_path_factory.mktemp("dynamic"), max_position_embeddings=LIMIT, rope_parameters=rope)


@pytest.fixture(scope="module")
def longrope(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [1.0 + 0.5 * number for number in range(8)],
        "original_max_position_embeddings": LIMIT,
    }
    directory = tmp_path_factory.mktemp("longrope")
    config = tiny_config("phi3", rope_parameters=rope, original_max_position_embeddings=LIMIT, sliding_window=None)
    save_tiny(directory, config)
    local: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    local.model.norm = torch.nn.Identity()
    return directory, local


def hidden_states(tokens: int) -> torch.Tensor:
    return torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(tokens))


def test_dynamic_angles_are_served_up_to_the_length_of_training(dynamic: Path) -> None:
    local: Any = AutoModelForCausalLM.from_pretrained(dynamic, dtype=torch.float32).eval()
    local.model.norm = torch.nn.Identity()
    stage, hidden = stage_of(dynamic), hidden_states(LIMIT)
    with torch.no_grad():
        expected = local.model(inputs_embeds=hidden, use_cache=False)[0]
    assert relative_error(stage.run(hidden, 0, 6), expected) < 1e-5
    kv = stage.allocate_kv(0, 6, batch=1, max_length=64)
    assert relative_error(stage.run(hidden, 0, 6, kv=kv), expected) < 1e-5
    for longer in (None, kv):
        with pytest.raises(UnsupportedInput, match=rf"beyond {LIMIT} tokens"):
            stage.run(hidden_states(LIMIT + 1), 0, 6, kv=longer)


@pytest.mark.parametrize("pieces", [(9, 7), (20, 1, 5), (17, 30)])
def test_long_angles_equal_the_local_model(longrope: tuple[Path, Any], pieces: tuple[int, ...]) -> None:
    directory, local = longrope
    stage, hidden = stage_of(directory), hidden_states(sum(pieces))
    with torch.no_grad():
        expected = local.model(inputs_embeds=hidden, use_cache=False)[0]
    kv = stage.allocate_kv(0, 6, batch=1, max_length=64)
    out = torch.cat([stage.run(piece, 0, 6, kv=kv) for piece in hidden.split(pieces, dim=1)], dim=1)
    assert relative_error(out, expected) < 1e-5


def test_a_session_does_not_pass_from_short_to_long_angles(longrope: tuple[Path, Any]) -> None:
    stage = stage_of(longrope[0])
    kv = stage.allocate_kv(0, 6, batch=1, max_length=64)
    stage.run(hidden_states(LIMIT), 0, 6, kv=kv)
    with pytest.raises(UnsupportedInput, match=rf"beyond {LIMIT} tokens"):
        stage.run(hidden_states(1), 0, 6, kv=kv)
    assert kv.length == LIMIT
