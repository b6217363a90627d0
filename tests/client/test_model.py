import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation import StoppingCriteria, StoppingCriteriaList

from geopetals.client.model import AutoDistributedModelForCausalLM, DistributedModel
from geopetals.client.session import InferenceSession
from geopetals.errors import CheckpointError, SwarmMismatch, TokenError, UnsupportedInput
from geopetals.join_token import JoinToken
from geopetals.swarm.checkpoint import Checkpoint
from geopetals.swarm.stage import Stage
from tests.client.fake_swarm import World, connect, load_stages
from tests.models import VOCABULARY, save_llama

PEER = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWAkxmPQg8FgoTvy7Wi2hWbjBJYuFBQ1q2JX7oxEkXb4jD"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def stages(directory: Path) -> list[Stage]:
    return load_stages(directory)


@pytest.fixture(scope="module")
def local(directory: Path) -> Any:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval()


@pytest.fixture
def world(stages: list[Stage]) -> World:
    return World(stages)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, directory: Path, world: World) -> Iterator[DistributedModel]:
    connected = connect(monkeypatch, directory, world)
    yield connected
    assert world.caches_held == 0
    connected.close()


def prompt(batch: int = 1, tokens: int = 5, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def locally(local: Any, ids: Tensor, **options: Any) -> Any:
    return local.generate(ids, attention_mask=torch.ones_like(ids), **options)


# The same as the model in one process

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8}
SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 1.2, "top_k": 0, "top_p": 0.95, "max_new_tokens": 8}
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "sampling": SAMPLING,
    "beams": {**GREEDY, "num_beams": 3},
    "sampled beams": {**SAMPLING, "num_beams": 2},
    "several answers": {**SAMPLING, "num_return_sequences": 3},
    "penalty": {**GREEDY, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "total length": {"do_sample": False, "max_length": 11},
    "one token": {"do_sample": False, "max_new_tokens": 1},
    "no limit": {"do_sample": False},
}


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_the_tokens_are_the_local_models(
    model: DistributedModel, local: Any, options: dict[str, Any], batch: int
) -> None:
    ids = prompt(batch)
    torch.manual_seed(7)
    expected = locally(local, ids, **options)
    torch.manual_seed(7)
    assert torch.equal(model.generate(ids, **options), expected)


def test_a_generation_config_is_heeded(model: DistributedModel, local: Any) -> None:
    config = GenerationConfig(max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=2)
    expected = locally(local, prompt(), generation_config=config)
    assert torch.equal(model.generate(prompt(), generation_config=config), expected)


def test_input_ids_may_be_named(model: DistributedModel, local: Any) -> None:
    expected = locally(local, prompt(), **GREEDY)
    assert torch.equal(model.generate(input_ids=prompt(), **GREEDY), expected)
    assert torch.equal(model.generate(inputs=prompt(), attention_mask=torch.ones(1, 5), **GREEDY), expected)


def test_scores_are_the_local_models(model: DistributedModel, local: Any) -> None:
    wanted = {**GREEDY, "output_scores": True, "return_dict_in_generate": True}
    expected, found = locally(local, prompt(), **wanted), model.generate(prompt(), **wanted)
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.scores, expected.scores, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_stopping_criteria_are_asked(model: DistributedModel) -> None:
    class AfterThree(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 8)

    found = model.generate(prompt(), stopping_criteria=StoppingCriteriaList([AfterThree()]), **GREEDY)
    assert found.shape == (1, 8)


def test_forward_without_a_session_is_the_local_forward(model: DistributedModel, local: Any) -> None:
    network: Any = model
    with torch.no_grad():
        expected, found = local(prompt(2)).logits, network(prompt(2)).logits
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_forward_in_a_session_goes_on(model: DistributedModel, local: Any) -> None:
    network: Any = model
    ids = prompt(1, 7)
    with torch.no_grad(), model.inference_session(max_length=7):
        parts = [network(piece).logits for piece in ids.split([4, 1, 2], dim=1)]
        expected = local(ids).logits
    assert torch.allclose(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-4)


def test_it_is_a_model_of_its_family(model: DistributedModel, local: Any) -> None:
    assert isinstance(model, type(local))
    assert model.config.num_hidden_layers == 6
    assert inspect.signature(model.forward).parameters.keys() == inspect.signature(local.forward).parameters.keys()


# Several turns in one session, as in PETALS


def test_turns_go_on_where_the_session_is(model: DistributedModel, local: Any, world: World) -> None:
    with model.inference_session(max_length=40) as session:
        first = model.generate(prompt(), **GREEDY)
        question = prompt(1, 3, seed=1)
        second = model.generate(question, **GREEDY)
        third = model.generate(None, **GREEDY)
    assert torch.equal(first, locally(local, prompt(), **GREEDY))
    history = torch.cat([first, question], dim=1)
    whole = locally(local, history, **GREEDY)
    assert torch.equal(second, whole[:, first.shape[1] :])
    longer = locally(local, whole, **GREEDY)
    assert torch.equal(third, longer[:, whole.shape[1] :])
    assert session.output_ids is not None
    assert torch.equal(session.output_ids, longer)
    assert sum(world.opened.values()) == 2


def test_token_by_token_is_the_whole_answer(model: DistributedModel, local: Any) -> None:
    one = {**GREEDY, "max_new_tokens": 1}
    expected = locally(local, prompt(), **GREEDY)
    with model.inference_session(max_length=20):
        parts = [model.generate(prompt(), **one)]
        parts += [model.generate(None, **one) for _ in range(expected.shape[1] - 6)]
    assert torch.equal(torch.cat(parts, dim=1), expected)


def test_turns_send_only_what_is_new(model: DistributedModel, world: World) -> None:
    with model.inference_session(max_length=40) as session:
        model.generate(prompt(), **{**GREEDY, "max_new_tokens": 2})
        assert session.position == 6  # 5 + 2 - 1: the last token was not run yet
        model.generate(prompt(1, 3, seed=1), **{**GREEDY, "max_new_tokens": 1})
        assert session.position == 10


def test_a_batch_has_turns_too(model: DistributedModel, local: Any) -> None:
    with model.inference_session(max_length=40):
        first = model.generate(prompt(3), **GREEDY, eos_token_id=None)
        second = model.generate(prompt(3, 2, seed=1), **GREEDY, eos_token_id=None)
    history = torch.cat([first, prompt(3, 2, seed=1)], dim=1)
    expected = locally(local, history, **GREEDY, eos_token_id=None)
    assert torch.equal(second, expected[:, first.shape[1] :])


def test_a_session_survives_a_failure_between_turns(model: DistributedModel, local: Any, world: World) -> None:
    with model.inference_session(max_length=40):
        first = model.generate(prompt(), **GREEDY)
        world.dead.add("server1")
        second = model.generate(None, **GREEDY)
    assert torch.equal(second, locally(local, first, **GREEDY)[:, first.shape[1] :])


def test_beams_after_an_answer_are_right_or_refused(model: DistributedModel, local: Any) -> None:
    """The rows of the caches are those of other beams by then: an answer computed from them would be wrong."""
    beams = {**GREEDY, "num_beams": 3}
    with model.inference_session(max_length=40):
        first = model.generate(prompt(), **beams)
        try:
            with pytest.warns(UserWarning, match="beams"):
                second = model.generate(None, **beams)
        except UnsupportedInput:
            return
    assert torch.equal(second, locally(local, first, **beams)[:, first.shape[1] :])


def test_after_a_broken_answer_the_session_gives_no_wrong_one(model: DistributedModel) -> None:
    """The servers have seen tokens by then that no answer tells of."""

    class Breaks:
        tokens = 0

        def put(self, value: Tensor) -> None:
            self.tokens += 1
            if self.tokens == 4:
                raise KeyboardInterrupt

        def end(self) -> None:
            return None

    with model.inference_session(max_length=40):
        with pytest.raises(KeyboardInterrupt):
            model.generate(prompt(), streamer=Breaks(), **GREEDY)
        with pytest.raises(UnsupportedInput):
            model.generate(prompt(1, 3, seed=1), **GREEDY)


def test_a_named_session_is_used(model: DistributedModel) -> None:
    with model.inference_session(max_length=20) as outer:
        other = InferenceSession(model.swarm, 20)
        with other:
            model.generate(prompt(), session=other, **GREEDY)
            assert (outer.position, other.position > 0) == (0, True)
        assert model.active_session is outer
    assert model.active_session is None


def test_generation_outside_a_session_leaves_none(model: DistributedModel, world: World) -> None:
    model.generate(prompt(), **GREEDY)
    assert model.active_session is None
    assert world.caches_held == 0


def test_a_session_too_short_says_so(model: DistributedModel, world: World) -> None:
    with model.inference_session(max_length=6), pytest.raises(UnsupportedInput, match="max_length of 6"):
        model.generate(prompt(), **GREEDY)


# What is refused


@pytest.mark.parametrize(
    "options",
    [{"assistant_model": object()}, {"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 2}],
    ids=lambda options: next(iter(options)),
)
def test_what_needs_a_local_cache_is_refused(model: DistributedModel, options: dict[str, Any], world: World) -> None:
    with pytest.raises(UnsupportedInput, match=next(iter(options))):
        model.generate(prompt(), **GREEDY, **options)
    assert not world.opened


def test_left_padding_in_forward_is_refused(model: DistributedModel) -> None:
    network: Any = model
    mask = torch.tensor([[0, 1, 1, 1, 1]])
    with pytest.raises(UnsupportedInput, match="pad"), torch.no_grad():
        network(prompt(), attention_mask=mask)


def test_a_cache_of_another_kind_is_refused(model: DistributedModel) -> None:
    network: Any = model
    filled = DynamicCache()
    filled.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), 0)
    with pytest.raises(UnsupportedInput, match="past_key_values"), torch.no_grad():
        network(prompt(), past_key_values=filled)
    with (
        model.inference_session(max_length=8),
        pytest.raises(UnsupportedInput, match="past_key_values"),
        torch.no_grad(),
    ):
        network(prompt(), past_key_values=filled)


def test_a_cache_of_another_session_is_refused(model: DistributedModel) -> None:
    network: Any = model
    with model.inference_session(max_length=8) as first:
        with torch.no_grad():
            network(prompt(1, 2))
        with (
            model.inference_session(max_length=8),
            pytest.raises(UnsupportedInput, match="past_key_values"),
            torch.no_grad(),
        ):
            network(prompt(), past_key_values=first.cache)


def test_a_used_cache_of_a_session_is_not_forgotten_outside_of_it(model: DistributedModel) -> None:
    """It stands for tokens that a forward pass without the session would leave out."""
    network: Any = model
    with model.inference_session(max_length=8) as session:
        with torch.no_grad():
            network(prompt(1, 2))
        with model.use_session(None), pytest.raises(UnsupportedInput), torch.no_grad():
            network(prompt(), past_key_values=session.cache)


# Opening


def open_model(*arguments: Any, **options: Any) -> DistributedModel:
    return AutoDistributedModelForCausalLM.from_pretrained(*arguments, **options)


def test_a_model_has_to_be_named() -> None:
    with pytest.raises(UnsupportedInput, match="which model"):
        open_model(initial_peers=[PEER])


def test_one_way_into_the_swarm_has_to_be_given(directory: Path) -> None:
    token = token_for(directory)
    for options in ({}, {"join": token, "initial_peers": [PEER]}):
        with pytest.raises(UnsupportedInput, match=r"either join=TOKEN or initial_peers"):
            open_model(str(directory), **options)


def token_for(directory: Path, **change: Any) -> JoinToken:
    identity = Checkpoint.open(str(directory)).identity()
    return JoinToken(swarm="tiny", model=str(directory), identity=identity, peers=(PEER,))


def test_an_unknown_option_is_named(directory: Path) -> None:
    with pytest.raises(UnsupportedInput, match=r"unknown option colour: the options are .*request_timeout"):
        open_model(str(directory), initial_peers=[PEER], colour="red")


@pytest.mark.parametrize("dtype", ["int64x", "nothing", "__class__"])
def test_a_wrong_format_is_named(directory: Path, dtype: str) -> None:
    with pytest.raises(UnsupportedInput, match=dtype):
        open_model(str(directory), initial_peers=[PEER], dtype=dtype)


def test_a_wrong_token_is_refused(directory: Path) -> None:
    with pytest.raises(TokenError):
        open_model(str(directory), join="gp1notatoken")


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        open_model(str(tmp_path), initial_peers=[PEER])


def test_the_token_of_another_model_is_refused(directory: Path, tmp_path: Path) -> None:
    other = save_llama(tmp_path / "other", layers=4)
    with pytest.raises(SwarmMismatch, match="another model"):
        open_model(str(directory), join=token_for(other))


def test_a_token_names_the_model_and_the_swarm(monkeypatch: pytest.MonkeyPatch, directory: Path, world: World) -> None:
    text = token_for(directory).encode()
    model = connect(monkeypatch, directory, world, join=text, initial_peers=())
    assert model.swarm.swarm == "tiny"
    model.close()
    model.close()


# What remote blocks cannot see


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"position_ids": torch.tensor([[0, 1, 0, 1, 2]])}, "position_ids"),
        ({"attention_mask": torch.zeros(1, 1, 5, 5)}, "no other mask"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"output_attentions": True}, "output_attentions"),
    ],
)
def test_forward_refuses_what_would_be_ignored(model: DistributedModel, options: dict[str, Any], words: str) -> None:
    network: Any = model
    with pytest.raises(UnsupportedInput, match=words), torch.no_grad():
        network(prompt(), **options)


def test_usual_positions_are_accepted(model: DistributedModel, local: Any) -> None:
    network: Any = model
    positions = torch.arange(5)[None]
    with torch.no_grad():
        ours = network(prompt(), position_ids=positions).logits
    torch.testing.assert_close(ours, local(prompt(), position_ids=positions).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("where", ["argument", "config"])
@pytest.mark.parametrize(("name", "value"), [("guidance_scale", 3.0), ("use_cache", False)])
def test_generate_refuses_what_needs_another_cache(
    model: DistributedModel, world: World, where: str, name: str, value: object
) -> None:
    options = {name: value} if where == "argument" else {"generation_config": GenerationConfig(**{name: value})}
    with pytest.raises(UnsupportedInput, match="leave"):
        model.generate(prompt(), max_new_tokens=2, **options)
    assert not world.opened
