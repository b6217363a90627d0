from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from geopetals.client.hollow import RemoteCache, load_client
from geopetals.errors import CheckpointError, SwarmFailure, UnsupportedInput
from geopetals.swarm.checkpoint import Checkpoint
from geopetals.swarm.stage import Stage, load_stage
from tests.models import VOCABULARY, save_llama, save_model

CPU = torch.device("cpu")
SPANS = ((0, 2), (2, 4), (4, 6))
HELD = ((0, 2), (1, 5), (4, 6))  # the second is entered in the middle of its span
Generate = Callable[..., Tensor]


class InProcess:
    """A client whose chain of three stages is in the same process."""

    def __init__(self, directory: Path) -> None:
        checkpoint = Checkpoint.open(str(directory))
        self.stages: list[Stage] = [load_stage(checkpoint, *held, dtype=torch.float32, device=CPU) for held in HELD]
        self.model, self.stack = load_client(checkpoint, dtype=torch.float32, device=CPU)
        self.num_blocks = checkpoint.num_blocks

    def cache(self, batch: int, max_length: int = 128) -> RemoteCache:
        hops = [
            (stage, span, stage.allocate_kv(*span, batch=batch, max_length=max_length))
            for stage, span in zip(self.stages, SPANS, strict=True)
        ]
        cache = RemoteCache(lambda: hops[-1][2].length, self.num_blocks)

        def call(hidden: Tensor) -> Tensor:
            order = cache.take_hypo_ids()
            for stage, span, kv in hops:
                if order is not None:
                    kv.reorder(order)
                hidden = stage.run(hidden, *span, kv=kv)
            return hidden

        self.stack.call = call
        return cache

    def generate(self, ids: Tensor, *, rows: int = 1, **options: Any) -> Tensor:
        model: Any = self.model
        tokens: Tensor = model.generate(ids, past_key_values=self.cache(rows * len(ids)), **options)
        return tokens


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


SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SMALL | {"intermediate_size": 128, "num_key_value_heads": 2, "max_position_embeddings": 512}
FAMILIES: dict[str, PretrainedConfig] = {
    "qwen2": Qwen2Config(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED, head_dim=16),
    "mistral": MistralConfig(**GROUPED, sliding_window=8),
    "gemma2": Gemma2Config(**GROUPED, head_dim=16, sliding_window=8),
    "gpt2": GPT2Config(**SMALL, n_positions=512),
    "bloom": BloomConfig(**SMALL),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path: Path, family: str) -> None:
    directory = save_model(tmp_path, FAMILIES[family], sharded=True)
    local: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    options = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 24, "min_new_tokens": 24}
    torch.manual_seed(5)
    tokens = InProcess(directory).generate(prompt(2, 12), **options)
    torch.manual_seed(5)
    assert torch.equal(tokens, local.generate(prompt(2, 12), **options))


def test_family_that_cannot_be_split(tmp_path: Path) -> None:
    from transformers import MambaConfig

    directory = save_model(tmp_path, MambaConfig(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2))
    with pytest.raises(CheckpointError, match=r"cannot be served"):
        load_stage(Checkpoint.open(str(directory)), 0, 1, dtype=torch.float32, device=CPU)


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
