"""A model that is split over processes computes what the whole model computes in one: hidden states and tokens."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList, TextStreamer

import geopetals
from geopetals.errors import UnsupportedInput
from geopetals.swarm.local import LocalSwarm
from tests.live.conftest import THREE_STAGES, TWO_STAGES, Connect, load_local
from tests.models import VOCABULARY

pytestmark = pytest.mark.live

RELATIVE = 1e-5
NEW_TOKENS = 24
SAMPLING = {"do_sample": True, "temperature": 1.5, "top_k": 0, "top_p": 0.95}
BEAMS = {"do_sample": False, "num_beams": 4}
GREEDY = {"do_sample": False}


def prompts(batch: int, length: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def assert_close(found: torch.Tensor, expected: torch.Tensor, relative: float = RELATIVE) -> None:
    """The largest difference, relative to the largest value."""
    assert found.shape == expected.shape
    difference = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert float(difference) <= relative


@torch.no_grad()
def hidden_after_blocks(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of a local Llama: what its last block gives to its final norm."""
    kept: list[torch.Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    try:
        model(ids)
    finally:
        hook.remove()
    return kept[0]


def seeded(model: Any, ids: torch.Tensor, *, seed: int = 7, **options: Any) -> torch.Tensor:
    torch.manual_seed(seed)
    tokens: torch.Tensor = model.generate(ids, max_new_tokens=NEW_TOKENS, **options)
    return tokens


@pytest.fixture(params=["two stages", "three stages"])
def remote(request: pytest.FixtureRequest, llama: Path, connect: Connect) -> Any:
    swarm: LocalSwarm = request.getfixturevalue(request.param.replace(" ", "_"))
    return connect(llama, join=swarm.token)


@pytest.mark.parametrize(("name", "spans"), [("two_stages", TWO_STAGES), ("three_stages", THREE_STAGES)])
def test_chain_enters_servers_in_the_middle_of_their_spans(
    request: pytest.FixtureRequest, llama: Path, connect: Connect, name: str, spans: list[tuple[int, int]]
) -> None:
    swarm: LocalSwarm = request.getfixturevalue(name)
    assert [(server.start, server.end) for server in swarm.servers] == spans
    model = connect(llama, join=swarm.token)
    with model.inference_session(max_length=4) as session:
        session.open(1)
        starts = [0, *(end for _, end in spans[:-1])]
        assert [(hop.start, hop.end) for hop in session.route] == [
            (start, end) for start, (_, end) in zip(starts, spans, strict=True)
        ]
        assert [hop.peer_id for hop in session.route] == [server.peer_id for server in swarm.servers]
    assert any(start > span[0] for start, span in zip(starts, spans, strict=True))


@pytest.mark.parametrize("batch", [1, 3])
def test_hidden_states(remote: Any, local: PreTrainedModel, batch: int) -> None:
    """At once and with the prefill in pieces, the last of one token."""
    ids = prompts(batch, 13)
    expected = hidden_after_blocks(local, ids)
    for lengths in ([13], [5, 7, 1]):
        with torch.no_grad(), remote.inference_session(max_length=13) as session:
            inputs = remote.get_input_embeddings()(ids)
            found = torch.cat([session.step(piece) for piece in inputs.split(lengths, dim=1)], dim=1)
            assert session.position == 13
        assert_close(found, expected)


@pytest.mark.parametrize("batch", [1, 3])
def test_logits(remote: Any, local: PreTrainedModel, batch: int) -> None:
    """Without a session, and in pieces inside one."""
    ids = prompts(batch, 13)
    with torch.no_grad():
        expected = local(ids).logits
        assert_close(remote(ids).logits, expected)
        with remote.inference_session(max_length=16):
            pieces = [remote(piece).logits for piece in ids.split([4, 9], dim=1)]
        assert_close(torch.cat(pieces, dim=1), expected)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(GREEDY, id="greedy"),
        pytest.param(SAMPLING, id="sampling"),
        pytest.param(BEAMS, id="beams"),
        pytest.param({**BEAMS, "num_return_sequences": 3}, id="beams-returned"),
        pytest.param({**BEAMS, "do_sample": True, "temperature": 1.5}, id="beams-sampled"),
        pytest.param({**SAMPLING, "num_return_sequences": 3}, id="samples-returned"),
        pytest.param({**GREEDY, "repetition_penalty": 1.4}, id="repetition-penalty"),
    ],
)
def test_tokens(remote: Any, local: PreTrainedModel, batch: int, options: dict[str, Any]) -> None:
    ids = prompts(batch)
    expected = seeded(local, ids, **options)
    assert torch.equal(seeded(remote, ids, **options), expected)
    if options.get("do_sample"):
        assert len(set(expected[0, ids.shape[1] :].tolist())) > NEW_TOKENS // 4, "too monotonous to show anything"


def test_scores_come_with_the_tokens(remote: Any, local: PreTrainedModel) -> None:
    ids = prompts(1)
    options = {**GREEDY, "max_new_tokens": 5, "output_logits": True, "return_dict_in_generate": True}
    found, expected = remote.generate(ids, **options), local.generate(ids, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert_close(torch.stack(found.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("options", [pytest.param(GREEDY, id="greedy"), pytest.param(SAMPLING, id="sampling")])
def test_several_turns_in_one_session(remote: Any, local: PreTrainedModel, options: dict[str, Any]) -> None:
    """Each turn sends its new tokens alone; a local model is given all of the past each time."""
    turns = [prompts(1, 7, seed=1), prompts(1, 4, seed=2), None]
    past = prompts(1, 0)
    with remote.inference_session(max_length=100):
        for number, turn in enumerate(turns):
            fresh = seeded(remote, turn, seed=number, **options)
            context = past if turn is None else torch.cat([past, turn], dim=1)
            everything = {"attention_mask": torch.ones_like(context)}  # an answer may hold the padding token
            past_length, past = past.shape[1], seeded(local, context, seed=number, **options, **everything)
            assert torch.equal(fresh, past[:, past_length:])


def test_turns_in_a_session_that_is_passed(remote: Any, local: PreTrainedModel) -> None:
    ids = prompts(1)
    with remote.inference_session(max_length=60) as session:
        with remote.use_session(None):
            first = seeded(remote, ids, session=session, **GREEDY)
            assert remote.active_session is None
        second = remote.generate(None, max_new_tokens=4, **GREEDY)
    expected = local.generate(ids, max_new_tokens=NEW_TOKENS + 4, **GREEDY)
    assert torch.equal(torch.cat([first, second], dim=1), expected)


def test_a_session_outgrows_its_length_but_not_in_its_first_step(remote: Any, local: PreTrainedModel) -> None:
    with remote.inference_session(max_length=10) as session:
        found = seeded(remote, prompts(2), **SAMPLING)
        assert session.max_length == found.shape[1] - 1
    assert torch.equal(found, seeded(local, prompts(2), **SAMPLING))
    with remote.inference_session(max_length=8), pytest.raises(UnsupportedInput, match="max_length of 8"):
        remote.generate(prompts(1), max_new_tokens=9, **GREEDY)


class Collected(TextStreamer):
    """Keeps what a streamer is given."""

    def __init__(self) -> None:
        self.values: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.values.extend(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_streamer(remote: Any, local: PreTrainedModel) -> None:
    found, expected = Collected(), Collected()
    seeded(remote, prompts(1), streamer=found, **SAMPLING)
    seeded(local, prompts(1), streamer=expected, **SAMPLING)
    assert found.ended
    assert found.values == expected.values


class AfterTokens(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self._length = length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self._length)


def test_stopping_criteria(remote: Any, local: PreTrainedModel) -> None:
    ids = prompts(3)
    found = seeded(remote, ids, stopping_criteria=StoppingCriteriaList([AfterTokens(14)]), **SAMPLING)
    assert found.shape == (3, 14)
    assert torch.equal(found, seeded(local, ids, **SAMPLING)[:, :14])


def test_end_of_text_token(remote: Any, local: PreTrainedModel) -> None:
    """Rows of a batch that end early are padded, as by a local model."""
    ids = prompts(3)
    row = seeded(local, ids, **SAMPLING)[0, ids.shape[1] :].tolist()
    options = {**SAMPLING, "eos_token_id": row[NEW_TOKENS // 2], "pad_token_id": 0}
    expected = seeded(local, ids, **options)
    assert (expected[0] == 0).any()
    assert torch.equal(seeded(remote, ids, **options), expected)


def test_a_long_prompt(remote: Any, local: PreTrainedModel) -> None:
    ids = prompts(2, 400)
    assert torch.equal(seeded(remote, ids, **GREEDY), seeded(local, ids, **GREEDY))


def test_clients_do_not_disturb_each_other(llama: Path, two_stages: LocalSwarm, local: Any, connect: Connect) -> None:
    """Two clients with two sessions each, at the same time."""
    models = [connect(llama, join=two_stages.token) for _ in range(2)]
    expected = [local.generate(prompts(1, 6 + n, seed=n), max_new_tokens=NEW_TOKENS, **GREEDY) for n in range(4)]
    found: dict[int, torch.Tensor] = {}
    together = threading.Barrier(4)

    def work(number: int) -> None:
        ids = prompts(1, 6 + number, seed=number)
        together.wait(30)
        found[number] = models[number % 2].generate(ids, max_new_tokens=NEW_TOKENS, **GREEDY)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(torch.equal(found[number], expected[number]) for number in range(4))


def test_addresses_instead_of_a_token(llama: Path, two_stages: LocalSwarm, local: Any, connect: Connect) -> None:
    from geopetals.join_token import JoinToken

    peers = JoinToken.decode(two_stages.token).peers
    model = connect(llama, initial_peers=list(peers))
    assert torch.equal(seeded(model, prompts(1), **GREEDY), seeded(local, prompts(1), **GREEDY))
    named = connect(llama, initial_peers=list(peers), dht_prefix="llama")
    assert torch.equal(seeded(named, prompts(1), **GREEDY), seeded(local, prompts(1), **GREEDY))


def test_the_model_is_named_by_the_token(two_stages: LocalSwarm, local: Any, connect: Connect) -> None:
    model = connect(join=two_stages.token)
    assert torch.equal(seeded(model, prompts(1), **GREEDY), seeded(local, prompts(1), **GREEDY))


def test_client_of_a_sharded_checkpoint(sharded_llama: Path, two_stages: LocalSwarm, local: Any, connect: Any) -> None:
    """The servers have the single file: the weights are the same."""
    model = connect(sharded_llama, join=two_stages.token)
    assert torch.equal(seeded(model, prompts(1), **SAMPLING), seeded(local, prompts(1), **SAMPLING))


@pytest.fixture(scope="module", params=["float16", "bfloat16"])
def half(request: pytest.FixtureRequest, llama: Path) -> Iterator[tuple[LocalSwarm, torch.dtype]]:
    with LocalSwarm(str(llama), dtype=request.param) as swarm:
        yield swarm.start(spans=TWO_STAGES), getattr(torch, request.param)


def test_half_precision(half: tuple[LocalSwarm, torch.dtype], llama: Path, connect: Connect) -> None:
    """Against the local model in the same format: within two units in the last place of the largest value.

    Rounding is the format's own: servers round between blocks where the local model does, but a matrix product over
    another number of tokens may add up in another order.
    """
    swarm, dtype = half
    same_format = load_local(llama, dtype)
    model = connect(llama, join=swarm.token, dtype=dtype)
    ids = prompts(3, 13)
    with torch.no_grad():
        expected = hidden_after_blocks(same_format, ids)
        with model.inference_session(max_length=13) as session:
            inputs = model.get_input_embeddings()(ids)
            found = torch.cat([session.step(piece) for piece in inputs.split([5, 7, 1], dim=1)], dim=1)
    assert found.dtype == dtype
    assert_close(found, expected, relative=2 * torch.finfo(dtype).eps)
    assert_close(found, hidden_after_blocks(load_local(llama), ids), relative=32 * torch.finfo(dtype).eps)


def test_the_package_names_the_model_class() -> None:
    assert geopetals.AutoDistributedModelForCausalLM.from_pretrained
