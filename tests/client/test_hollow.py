from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaModel, PreTrainedModel

from geopetals.client.hollow import RemoteCache, load_client
from geopetals.errors import CheckpointError, SwarmFailure, UnsupportedInput
from geopetals.swarm.checkpoint import Checkpoint
from tests.in_process import CPU, InProcess
from tests.models import VOCABULARY, save_llama


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("client"), tied=request.param, sharded=True)


@pytest.fixture(scope="module")
def remote(directory: Path) -> InProcess:
    return InProcess(directory)


@pytest.fixture(scope="module")
def local(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def prompt(batch: int, tokens: int = 9) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(batch))


def test_client_holds_no_blocks_and_the_servers_nothing_else(remote: InProcess, local: Any) -> None:
    assert not [name for name, _ in remote.model.named_parameters() if ".layers." in name]
    held_here = sum(parameter.numel() for parameter in remote.model.parameters())
    blocks = sum(parameter.numel() for parameter in local.model.layers.parameters())
    assert held_here + blocks == sum(parameter.numel() for parameter in local.parameters())
    assert remote.model.config.name_or_path == local.config.name_or_path


@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_tokens_equal_the_local_model(remote: InProcess, local: Any, batch: int) -> None:
    options = {"do_sample": False, "max_new_tokens": 40, "min_new_tokens": 40}
    tokens = remote.generate(prompt(batch), **options)
    assert torch.equal(tokens, local.generate(prompt(batch), **options))
    assert len(set(tokens[0, 9:].tolist())) > 10


@pytest.mark.parametrize("batch", [1, 3])
def test_sampled_tokens_equal_the_local_model(remote: InProcess, local: Any, batch: int) -> None:
    options = {"do_sample": True, "temperature": 3.0, "max_new_tokens": 40, "min_new_tokens": 40}
    torch.manual_seed(11)
    tokens = remote.generate(prompt(batch), **options)
    torch.manual_seed(11)
    assert torch.equal(tokens, local.generate(prompt(batch), **options))
    assert len(set(tokens[0, 9:].tolist())) > 25


@pytest.mark.parametrize("batch", [1, 3])
def test_beams_equal_the_local_model(remote: InProcess, local: Any, batch: int) -> None:
    options = {"num_beams": 4, "do_sample": False, "max_new_tokens": 20, "num_return_sequences": 2}
    tokens = remote.generate(prompt(batch), rows=4, **options)
    assert torch.equal(tokens, local.generate(prompt(batch), **options))


def test_logits_of_a_prompt_in_pieces(remote: InProcess, local: Any) -> None:
    ids, cache = prompt(3, 14), remote.cache(3)
    model: Any = remote.model
    with torch.no_grad():
        expected = local(ids).logits
        pieces = [model(piece, past_key_values=cache).logits for piece in ids.split((5, 8, 1), dim=1)]
    logits = torch.cat(pieces, dim=1)
    assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-5


def test_a_checkpoint_that_asks_for_no_cache_is_generated_from_with_one(tmp_path: Path) -> None:
    directory = save_llama(tmp_path, use_cache=False)
    remote = InProcess(directory)
    local: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    options = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    assert torch.equal(remote.generate(prompt(1), **options), local.generate(prompt(1), **options))
    assert [output.shape[1] for output in remote.outputs] == [9] + 7 * [1]


def test_what_only_the_client_can_see_is_refused_there(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original: Any = LlamaModel.forward

    def forward(self: Any, input_ids: Any = None, **kwargs: Any) -> Any:
        return original(self, input_ids=input_ids, token_ids=input_ids, **kwargs)

    checkpoint = Checkpoint.open(str(directory))
    monkeypatch.setattr(LlamaModel, "forward", forward)
    with pytest.raises(CheckpointError, match=r"more than hidden states and positions \(token_ids\)"):
        load_client(checkpoint, dtype=torch.float32, device=CPU)


def test_reordering_composes_until_a_step_takes_it() -> None:
    cache = RemoteCache(lambda: 3, 2)
    assert cache.take_hypo_ids() is None
    rows = torch.tensor([10, 20, 30])
    first, second = torch.tensor([2, 0, 1]), torch.tensor([1, 1, 0])
    cache.reorder_cache(first)
    cache.reorder_cache(second)
    taken = cache.take_hypo_ids()
    assert taken is not None
    assert torch.equal(rows[taken], rows[first][second])
    assert cache.hypo_ids is None
    assert cache.get_seq_length() == 3


def test_what_remote_caches_cannot_do_is_refused() -> None:
    cache = RemoteCache(lambda: 3, 2)
    for refused in (
        lambda: cache.crop(1),
        lambda: cache.batch_repeat_interleave(2),
        lambda: cache.batch_select_indices(torch.tensor([0])),
        cache.reset,
    ):
        with pytest.raises(UnsupportedInput):
            refused()


def test_model_without_a_swarm_and_with_a_wrong_answer(directory: Path) -> None:
    model, stack = load_client(Checkpoint.open(str(directory)), dtype=torch.float32, device=CPU)
    forward: Any = model
    assert isinstance(model, PreTrainedModel)
    with pytest.raises(UnsupportedInput, match=r"not connected"):
        forward(prompt(1))
    stack.call = lambda hidden: hidden[:, :1]
    with pytest.raises(SwarmFailure, match=r"answered"):
        forward(prompt(1))
