"""A batch of unequal prompts answers as the model in one process does with the same padding and mask."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from geopetals.client.model import DistributedModel
from geopetals.client.padding import left_padding
from geopetals.errors import UnsupportedInput
from tests.client.fake_swarm import FakeHop, World, connect, load_stages
from tests.models import VOCABULARY, save_llama

PAD = 0
LENGTHS = (7, 3, 7, 1)
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8}
SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 1.3, "top_k": 0, "max_new_tokens": 8}
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "sampling": SAMPLING,
    "beams": {**GREEDY, "num_beams": 3},
    "sampled beams": {**SAMPLING, "num_beams": 2},
    "several answers": {**SAMPLING, "num_return_sequences": 2},
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def local(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@pytest.fixture
def world(directory: Path) -> World:
    return World(load_stages(directory))


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, directory: Path, world: World) -> Iterator[DistributedModel]:
    connected = connect(monkeypatch, directory, world)
    yield connected
    assert world.caches_held == 0
    connected.close()


def prompts() -> tuple[Tensor, Tensor]:
    """Left-padded ids and their mask."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.full((len(LENGTHS), max(LENGTHS)), PAD)
    for row, length in enumerate(LENGTHS):
        ids[row, -length:] = torch.randint(3, VOCABULARY, (length,), generator=generator)
    return ids, (ids != PAD).long()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_tokens_equal_the_local_models(model: DistributedModel, local: Any, options: dict[str, Any]) -> None:
    ids, mask = prompts()
    torch.manual_seed(5)
    ours = model.generate(ids, attention_mask=mask, **options)
    torch.manual_seed(5)
    assert ours.tolist() == local.generate(ids, attention_mask=mask, **options).tolist()


def test_padding_is_told_by_its_token_where_no_mask_is_given(model: DistributedModel, local: Any) -> None:
    ids, _ = prompts()
    assert model.generate(ids, **GREEDY).tolist() == local.generate(ids, **GREEDY).tolist()


def test_scores_equal_the_local_models(model: DistributedModel, local: Any) -> None:
    ids, mask = prompts()
    options = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    ours, theirs = (m.generate(ids, attention_mask=mask, **options) for m in (model, local))
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), rtol=1e-4, atol=1e-4)


def test_a_server_that_dies_changes_nothing(model: DistributedModel, world: World, local: Any) -> None:
    ids, mask = prompts()

    async def die_once(hop: FakeHop, number: int) -> None:
        if number == 9:
            raise world.die(hop.hop)

    world.before_step = die_once
    ours = model.generate(ids, attention_mask=mask, **GREEDY)
    assert ours.tolist() == local.generate(ids, attention_mask=mask, **GREEDY).tolist()


@pytest.mark.parametrize("mask", [[[1, 1, 0]], [[1, 0, 1]], [[0, 0, 0]], [[0, 1, 0]]])
def test_other_masks_are_refused(mask: list[list[int]]) -> None:
    with pytest.raises(UnsupportedInput, match="padding_side = 'left'"):
        left_padding(torch.tensor(mask))


def test_inside_a_session_prompts_have_one_length(model: DistributedModel) -> None:
    ids, mask = prompts()
    with (
        model.inference_session(max_length=20) as session,
        pytest.raises(UnsupportedInput, match="inside a session"),
    ):
        model.generate(ids, attention_mask=mask, session=session, **GREEDY)
