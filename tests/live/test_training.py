"""Training through a live swarm: gradients, losses and trained prompts are those of the same model in one process."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForSequenceClassification, PreTrainedModel

from geopetals.client.autograd import through_swarm
from geopetals.client.classification import AutoDistributedModelForSequenceClassification
from geopetals.errors import ServerFull, UnsupportedInput
from geopetals.swarm import ring_messages
from geopetals.swarm.local import LocalServer, LocalSwarm
from tests.live.conftest import Connect, load_local
from tests.models import VOCABULARY, save_llama

pytestmark = pytest.mark.live

RELATIVE = 1e-5
PREFIX = 5
MODES = ("ptune", "deep_ptune")
IMPATIENT = {
    "max_retries": 3,
    "min_backoff": 0.05,
    "connect_timeout": 2.0,
    "request_timeout": 10.0,
    "ban_timeout": 60.0,
}


def random_ids(batch: int, length: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def random_leaf(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def assert_close(found: Tensor | None, expected: Tensor | None) -> None:
    """The largest difference, relative to the largest value."""
    assert found is not None
    assert expected is not None
    assert found.shape == expected.shape
    found, expected = found.detach().double(), expected.detach().double()
    difference = (found - expected).abs().max() / expected.abs().max()
    assert float(difference) <= RELATIVE


@contextlib.contextmanager
def prompts_in_blocks(local: Any, prompts: Tensor | None) -> Iterator[None]:
    """In this process: `prompts` [blocks, 1, prefix, hidden] are added to the first positions of each block's input."""

    def add(prompt: Tensor, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, length = arguments[0], prompt.shape[1]
        return (torch.cat([hidden[:, :length] + prompt, hidden[:, length:]], dim=1), *arguments[1:])

    hooks = [
        layer.register_forward_pre_hook(lambda _, arguments, prompt=prompt: add(prompt, arguments))
        for layer, prompt in zip(local.model.layers, prompts if prompts is not None else (), strict=False)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def local_blocks(local: Any, hidden: Tensor, prompts: Tensor | None) -> Tensor:
    """Hidden states after the last block of a local model, before its norm."""
    kept: list[Tensor] = []
    hook = local.model.norm.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    try:
        with prompts_in_blocks(local, prompts):
            local.model(inputs_embeds=hidden)
    finally:
        hook.remove()
    return kept[0]


def local_loss(local: Any, remote: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and logits of a local model with the prompts of a remote one."""
    base = remote.model
    deep = getattr(base, "intermediate_prompt_embeddings", None)
    blocks = local.config.num_hidden_layers
    prompts = None if deep is None else deep.weight.view(PREFIX, blocks, -1).permute(1, 0, 2).unsqueeze(1)
    front = base.prompt_embeddings.weight.unsqueeze(0).expand(ids.shape[0], -1, -1)
    embedded = torch.cat([front, local.model.embed_tokens(ids)], dim=1)
    with prompts_in_blocks(local, prompts):
        logits = local(inputs_embeds=embedded).logits[:, PREFIX:]
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return loss, logits


def trained(model: Any) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def take_gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    parameters = trained(model)
    grads = torch.autograd.grad(loss, list(parameters.values()))
    return dict(zip(parameters, grads, strict=True))


@pytest.fixture(params=["two stages", "three stages"])
def swarm(request: pytest.FixtureRequest) -> LocalSwarm:
    """All but the first server are entered in the middle of their spans."""
    found: LocalSwarm = request.getfixturevalue(request.param.replace(" ", "_"))
    return found


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("prompt_rows", [None, 1, 3])
def test_gradients_of_inputs_and_prompts(
    swarm: LocalSwarm, local: Any, llama: Path, connect: Connect, batch: int, prompt_rows: int | None
) -> None:
    hidden = random_leaf(batch, 7, 64, seed=1)
    rows = None if prompt_rows is None else min(prompt_rows, batch)
    prompts = None if rows is None else random_leaf(6, rows, 3, 64, seed=2)
    inputs = [hidden] if prompts is None else [hidden, prompts]
    weights = random_leaf(batch, 7, 64, seed=3).detach()
    found = through_swarm(connect(llama, join=swarm.token).swarm, hidden, prompts)
    expected = local_blocks(local, hidden, prompts)
    assert_close(found, expected)
    found_grads = torch.autograd.grad((found * weights).sum(), inputs)
    expected_grads = torch.autograd.grad((expected * weights).sum(), inputs)
    for found_grad, expected_grad in zip(found_grads, expected_grads, strict=True):
        assert_close(found_grad, expected_grad)


def test_requests_too_large_for_one_message(two_stages: LocalSwarm, local: Any, llama: Path, connect: Connect) -> None:
    """One sequence of 2.6 MB, and a batch of 1,500 tokens, which is split."""
    swarm = connect(llama, join=two_stages.token).swarm
    long = random_leaf(1, 500, 64, seed=1)
    assert_close(through_swarm(swarm, long), local_blocks(local, long, None))
    for shape in ((1, 500, 64), (5, 300, 64)):
        hidden, prompts = random_leaf(*shape, seed=1), random_leaf(6, 1, 300, 64, seed=2)
        weights = random_leaf(*shape, seed=3).detach()
        found = torch.autograd.grad((through_swarm(swarm, hidden, prompts) * weights).sum(), (hidden, prompts))
        expected = torch.autograd.grad((local_blocks(local, hidden, prompts) * weights).sum(), (hidden, prompts))
        assert_close(found[0], expected[0])
        assert_close(found[1], expected[1])


@pytest.mark.parametrize("mode", MODES)
def test_loss_and_gradients_of_tuned_prompts(
    swarm: LocalSwarm, local: Any, llama: Path, connect: Connect, mode: str
) -> None:
    remote = connect(llama, join=swarm.token, tuning_mode=mode, pre_seq_len=PREFIX)
    names = {"model.prompt_embeddings.weight", "model.intermediate_prompt_embeddings.weight"}
    assert set(trained(remote)) == (names if mode == "deep_ptune" else {"model.prompt_embeddings.weight"})
    ids = random_ids(3)
    loss, logits = local_loss(local, remote, ids)
    output = remote(ids, labels=ids)
    assert_close(output.logits, logits)
    assert_close(output.loss, loss)
    expected = take_gradients(remote, loss)
    for name, found in take_gradients(remote, output.loss).items():
        assert float(found.abs().max()) > 0
        assert_close(found, expected[name])


def test_gradients_of_the_local_part_once_it_is_thawed(
    two_stages: LocalSwarm, llama: Path, connect: Connect, tmp_path: Path
) -> None:
    """Embeddings, norm and head; they are frozen at first."""
    remote, local = connect(llama, join=two_stages.token), load_local(llama)
    assert not trained(remote)
    for parameter in remote.parameters():
        parameter.requires_grad_()
    for layer in local.model.layers:
        layer.requires_grad_(False)
    ids = random_ids(3)
    assert set(trained(remote)) == set(trained(local))
    expected = take_gradients(local, local(ids, labels=ids).loss)
    for name, found in take_gradients(remote, remote(ids, labels=ids).loss).items():
        assert_close(found, expected[name])


def test_padding_after_the_text_changes_nothing(
    two_stages: LocalSwarm, local: Any, llama: Path, connect: Connect
) -> None:
    remote = connect(llama, join=two_stages.token)
    ids, mask = random_ids(2), torch.ones(2, 9, dtype=torch.int64)
    ids[1, 6:], mask[1, 6:] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        assert_close(
            remote(ids, attention_mask=mask, labels=labels).loss, local(ids, attention_mask=mask, labels=labels).loss
        )
        with pytest.raises(UnsupportedInput, match="pad on the right"):
            remote(ids, attention_mask=mask.flip(1))


def test_gradients_do_not_pass_through_a_session(two_stages: LocalSwarm, llama: Path, connect: Connect) -> None:
    remote = connect(llama, join=two_stages.token, tuning_mode="ptune", pre_seq_len=PREFIX)
    with remote.inference_session(max_length=9), pytest.raises(UnsupportedInput, match="train outside"):
        remote(random_ids(1))


def fit(model: Any, inputs: Tensor, labels: Tensor, *, steps: int, lr: float) -> list[float]:
    optimizer = torch.optim.AdamW(trained(model).values(), lr=lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("mode", MODES)
def test_the_loss_falls_and_what_was_learned_is_generated(
    two_stages: LocalSwarm, local: PreTrainedModel, llama: Path, connect: Connect, tmp_path: Path, mode: str
) -> None:
    """Prompts that make the model say one thing; saved, they do the same in another client."""
    torch.manual_seed(0)
    model = connect(llama, join=two_stages.token, tuning_mode=mode, pre_seq_len=PREFIX)
    ids = random_ids(1, 6)
    losses = fit(model, ids, ids, steps=40, lr=0.1)
    assert losses[-1] < losses[0] / 4
    save_file(trained(model), tmp_path / "prompts.safetensors")
    again = connect(llama, join=two_stages.token, tuning_mode=mode, pre_seq_len=PREFIX)
    unexpected = again.load_state_dict(load_file(tmp_path / "prompts.safetensors"), strict=False).unexpected_keys
    assert not unexpected
    with torch.no_grad():
        assert_close(again(ids).logits, model(ids).logits)


def greedy_without_cache(model: Any, ids: Tensor, new_tokens: int) -> Tensor:
    with torch.no_grad():
        for _ in range(new_tokens):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(dim=-1)], dim=1)
    return ids


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", [1, 3])
def test_generation_with_prompts(swarm: LocalSwarm, llama: Path, connect: Connect, mode: str, batch: int) -> None:
    """Cached steps after the prompts, in one call or in several turns, give the tokens of passes without a cache."""
    model = connect(llama, join=swarm.token, tuning_mode=mode, pre_seq_len=PREFIX)
    ids, more = random_ids(batch), random_ids(batch, 3, seed=1)
    expected = greedy_without_cache(model, ids, 6)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)
    with model.inference_session(max_length=9 + 6 + 3 + 4) as opened:
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)
        assert opened.position == PREFIX + 9 + 6 - 1  # the last token has not been sent
        second = model.generate(more, max_new_tokens=4, do_sample=False)
    longer = greedy_without_cache(model, torch.cat([expected, more], dim=1), 4)
    assert torch.equal(second, longer[:, expected.shape[1] :])


@pytest.mark.parametrize("mode", MODES)
def test_prompts_longer_than_a_piece_of_the_prefill(
    two_stages: LocalSwarm, llama: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """The first step goes to the servers three tokens at a time; the second piece holds prompts and text."""
    model = connect(llama, join=two_stages.token, tuning_mode=mode, pre_seq_len=PREFIX)
    ids = random_ids(2)
    monkeypatch.setattr(ring_messages, "MAX_CHUNK_BYTES", 3 * 2 * 64 * 4)
    with torch.no_grad():
        expected = model(ids).logits
        with model.inference_session(max_length=9):
            assert_close(model(ids).logits, expected)


def test_beams_with_prompts(two_stages: LocalSwarm, llama: Path, connect: Connect) -> None:
    """Beam search moves the rows of the caches, prompts included: scores are those of passes without a cache."""
    model = connect(llama, join=two_stages.token, tuning_mode="deep_ptune", pre_seq_len=PREFIX)
    ids = random_ids(1)
    best = model.generate(
        ids, max_new_tokens=6, num_beams=4, do_sample=False, return_dict_in_generate=True, output_scores=True
    )
    with torch.no_grad():
        chosen = model(best.sequences).logits.log_softmax(dim=-1)[0, 8:-1]
    score = chosen.gather(1, best.sequences[0, 9:, None]).sum() / best.sequences[0, 9:].numel()
    assert float(best.sequences_scores[0]) == pytest.approx(float(score), abs=1e-4)


def test_a_session_without_the_prompts_is_refused(two_stages: LocalSwarm, llama: Path, connect: Connect) -> None:
    model = connect(llama, join=two_stages.token, tuning_mode="ptune", pre_seq_len=PREFIX)
    plain = connect(llama, join=two_stages.token)
    with plain.inference_session(max_length=20) as opened, pytest.raises(UnsupportedInput, match="tuned prompts"):
        model.generate(random_ids(1), session=opened, max_new_tokens=2)


@pytest.mark.parametrize("options", [{"tuning_mode": "lora"}, {"tuning_mode": "ptune"}])
def test_a_tuning_that_does_not_exist(llama: Path, options: dict[str, Any]) -> None:
    from geopetals import AutoDistributedModelForCausalLM

    with pytest.raises(UnsupportedInput, match=r"the modes are ptune and deep_ptune|pre_seq_len=16"):
        AutoDistributedModelForCausalLM.from_pretrained(str(llama), join="not needed", **options)


@pytest.fixture
def classify(llama: Path, two_stages: LocalSwarm) -> Iterator[Callable[..., Any]]:
    with contextlib.ExitStack() as stack:

        def open_model(**options: Any) -> Any:
            model = AutoDistributedModelForSequenceClassification.from_pretrained(
                str(llama), join=two_stages.token, **options
            )
            stack.callback(model.close)
            return model

        yield open_model


def test_classifier(classify: Callable[..., Any], llama: Path) -> None:
    """Labels are read off the last token that is no padding; loss and gradients are those of Transformers' own."""
    model = classify(num_labels=3)
    classifier_class: Any = LlamaForSequenceClassification
    own = classifier_class.from_pretrained(llama, num_labels=3).eval().requires_grad_(False)
    assert issubclass(type(model), LlamaForSequenceClassification)
    assert set(trained(model)) == {"score.weight"}
    own.score = model.score
    ids, labels = random_ids(3), torch.tensor([0, 2, 1])
    ids[1, 4:] = 0
    found, expected = model(ids, labels=labels), own(ids, labels=labels)
    assert found.logits.shape == (3, 3)
    assert_close(found.logits, expected.logits)
    assert_close(found.loss, expected.loss)
    assert_close(take_gradients(model, found.loss)["score.weight"], take_gradients(own, expected.loss)["score.weight"])
    with pytest.raises(UnsupportedInput, match="does not generate"):
        model.generate(ids)


@pytest.mark.parametrize("mode", [None, *MODES])
def test_classifier_learns(classify: Callable[..., Any], mode: str | None) -> None:
    """Which of two tokens a sequence ends with."""
    torch.manual_seed(0)
    model = classify(tuning_mode=mode, pre_seq_len=PREFIX)
    ids, labels = random_ids(8, 5), torch.arange(8) % 2
    ids[:, -1] = 10 + labels
    assert "score.weight" in trained(model)
    assert len(trained(model)) == 1 + (MODES.index(mode) + 1 if mode else 0)
    losses = fit(model, ids, labels, steps=15, lr=0.02)
    assert losses[-1] < losses[0] / 2


@pytest.fixture(scope="module")
def short_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("short") / "llama", layers=4)


@pytest.fixture(scope="module")
def spare(short_llama: Path) -> Iterator[LocalSwarm]:
    """Two servers; a third one with all blocks makes a shorter chain."""
    with LocalSwarm(str(short_llama)) as swarm:
        yield swarm.start(spans=[(0, 3), (2, 4)])


def prefer(model: Any, swarm: LocalSwarm, server: LocalServer) -> None:
    """Make the client choose this server while it lives, whatever the round trips are: the others look full."""
    for other in swarm.servers:
        if other.peer_id != server.peer_id:
            model.swarm.avoid(other.peer_id, ServerFull("busy"))


def end_while_asked(model: Any, method: str, swarm: LocalSwarm, server: LocalServer) -> threading.Thread:
    """Stop the server, and kill it as soon as the client has called it."""
    os.kill(server.pid, signal.SIGSTOP)
    asked = threading.Event()
    real = getattr(model.swarm, method)

    async def call(hop: Any, *arguments: Any) -> Any:
        asked.set()
        return await real(hop, *arguments)

    setattr(model.swarm, method, call)

    def kill() -> None:
        assert asked.wait(30)
        swarm.kill(server)

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


@pytest.mark.parametrize("method", ["forward_on", "backward_on"])
def test_a_server_that_dies_while_it_is_asked(
    spare: LocalSwarm, short_llama: Path, connect: Connect, method: str
) -> None:
    """The same gradients by way of two other servers."""
    server = spare.add((0, 4))
    model, local = connect(short_llama, join=spare.token, **IMPATIENT), load_local(short_llama)
    prefer(model, spare, server)
    hidden, weights = random_leaf(2, 7, 64, seed=1), random_leaf(2, 7, 64, seed=2).detach()
    expected = torch.autograd.grad((local_blocks(local, hidden, None) * weights).sum(), hidden)[0]
    if method == "forward_on":
        killer = end_while_asked(model, method, spare, server)
        output = through_swarm(model.swarm, hidden)
    else:
        output = through_swarm(model.swarm, hidden)
        killer = end_while_asked(model, method, spare, server)
    found = torch.autograd.grad((output * weights).sum(), hidden)[0]
    killer.join(30)
    assert_close(found, expected)
    late = connect(short_llama, join=spare.token, **IMPATIENT)  # it also sweeps up what the killed server has left
    assert_close(through_swarm(late.swarm, hidden), output)


@pytest.mark.parametrize("mode", MODES)
def test_a_session_with_prompts_whose_server_dies(
    spare: LocalSwarm, short_llama: Path, connect: Connect, mode: str
) -> None:
    """The caches on the other servers hold the prompts too."""
    server = spare.add((0, 4))
    model = connect(short_llama, join=spare.token, tuning_mode=mode, pre_seq_len=PREFIX, **IMPATIENT)
    prefer(model, spare, server)
    ids = random_ids(2)
    with torch.no_grad():
        expected = model(ids).logits
        with model.inference_session(max_length=9) as opened:
            first = model(ids[:, :6]).logits
            assert [hop.peer_id for hop in opened.route] == [server.peer_id]
            spare.kill(server)
            found = torch.cat([first, model(ids[:, 6:]).logits], dim=1)
            assert len(opened.route) == 2
    assert_close(found, expected)
    connect(short_llama, join=spare.token)  # it also sweeps up what the killed server has left
