"""Hidden states go round the ring: the same tokens pushed, relayed and mixed, and whatever breaks on the way."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from geopetals.client.avoidance import Avoidance
from geopetals.client.hop import HopSession
from geopetals.client.model import DistributedModel
from geopetals.errors import NoChain, ServerBroken
from geopetals.swarm import ring_messages
from geopetals.swarm.checkpoint import Checkpoint
from geopetals.swarm.heartbeat import SERVER_SILENCE_S
from geopetals.swarm.ring_messages import PUSH_STREAM
from geopetals.swarm.stage import Stage, load_stage
from tests.models import VOCABULARY, save_llama
from tests.ring_swarm import Net, RingSwarm, ring_model

HIDDEN, NEW_TOKENS = 64, 12
SPANS = {"a": (0, 2), "b": (2, 4), "c": (4, 6), "b2": (2, 4), "ab": (0, 4), "bc": (2, 6)}
GREEDY: dict[str, Any] = {"do_sample": False}
SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 1.5, "top_k": 0}
BEAMS: dict[str, Any] = {"do_sample": False, "num_beams": 3}
Act = Callable[[], object]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("ring") / "llama", max_position_embeddings=4096)


@pytest.fixture(scope="module")
def stages(directory: Path) -> dict[str, Stage]:
    checkpoint = Checkpoint.open(str(directory))
    cpu = torch.device("cpu")
    return {name: load_stage(checkpoint, *span, dtype=torch.float32, device=cpu) for name, span in SPANS.items()}


@pytest.fixture(scope="module")
def local(directory: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval()


@pytest.fixture
def net(stages: dict[str, Stage]) -> Net:
    return Net(dict(stages))


@pytest.fixture
def model(directory: Path, net: Net) -> Iterator[DistributedModel]:
    with ring_model(directory, net) as connected:
        yield connected


def swarm_of(model: DistributedModel) -> RingSwarm:
    assert isinstance(model.swarm, RingSwarm)
    return model.swarm


def prompt(batch: int = 1, tokens: int = 5) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(0))


def generate(model: Any, ids: Tensor, *criteria: StoppingCriteria, **options: Any) -> Tensor:
    torch.manual_seed(7)
    tokens: Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        stopping_criteria=StoppingCriteriaList(list(criteria)),
        **options,
    )
    return tokens


class After(StoppingCriteria):
    """Does something after so many new tokens."""

    def __init__(self, tokens: int, act: Act) -> None:
        self._left, self._act = tokens, act

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self._left -= 1
        if self._left == 0:
            self._act()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def wait_for(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def on_loop(model: DistributedModel, act: Act) -> None:
    async def run() -> None:
        act()

    model.swarm.run(run())


# Push, relay, mixed


@pytest.mark.parametrize("ways", ["push", "off", "bad link", "refused", "stock in the middle"])
@pytest.mark.parametrize(
    ("batch", "options"), [(1, GREEDY), (3, SAMPLING), (1, BEAMS)], ids=["greedy", "sampling", "beams"]
)
def test_the_same_tokens_pushed_and_relayed(
    directory: Path, net: Net, local: PreTrainedModel, ways: str, batch: int, options: dict[str, Any]
) -> None:
    net.without_push |= {"c"} if ways == "refused" else set()
    net.stock |= {"b"} if ways == "stock in the middle" else set()
    with ring_model(directory, net, push=ways != "off") as model:
        if ways == "bad link":
            swarm_of(model).avoid_link(net["a"].peer_id, net["b"].peer_id)
        with model.inference_session(max_length=40) as session:
            found = generate(model, prompt(batch), **options)
            modes = [(hop.mode, hop.why) for hop in session.route]
        assert swarm_of(model).names(session) == [] == list(session.route)
    assert torch.equal(found, generate(local, prompt(batch), **options))
    expected = {
        "push": [("push", ""), ("push", "")],
        "off": [("relay", "push is off"), ("relay", "push is off")],
        "bad link": [("relay", "the link between the two failed lately"), ("push", "")],
        "refused": [("push", ""), ("relay", "protocols not supported")],
        "stock in the middle": [("relay", "stock PETALS does not push")] * 2,
    }[ways]
    assert modes == [*expected, ("answer", "")]


@pytest.mark.parametrize("tokens", [1, 7, 2500])
@pytest.mark.parametrize("push", [True, False])
def test_prompts_of_any_length(directory: Path, net: Net, local: PreTrainedModel, tokens: int, push: bool) -> None:
    with ring_model(directory, net, push=push) as model:
        found = generate(model, prompt(tokens=tokens), **GREEDY)
    assert torch.equal(found, generate(local, prompt(tokens=tokens), **GREEDY))


def test_all_positions_where_they_are_asked_for(model: DistributedModel, local: Any) -> None:
    ids = prompt(2, 1300)
    with torch.no_grad(), model.inference_session(max_length=1300):
        found = torch.cat([model(ids[:, :1200]).logits, model(ids[:, 1200:]).logits], dim=1)
        expected = local(ids).logits
    assert torch.allclose(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_pieces_fit_servers_of_a_wider_format(model: DistributedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that computes in float32 pushes twice what a client in bfloat16 sends."""
    most, sent = 32 * HIDDEN * 4, []
    monkeypatch.setattr(ring_messages, "MAX_CHUNK_BYTES", most)
    post = HopSession.post

    def recording(hop: HopSession, step: Any, hidden: Tensor, *args: Any) -> None:
        sent.append(hidden.shape[1])
        post(hop, step, hidden, *args)

    monkeypatch.setattr(HopSession, "post", recording)
    inputs = torch.randn(1, 80, HIDDEN, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), model.inference_session(max_length=80) as session:
        session.step(inputs.bfloat16())
    assert sent == [32, 32, 16]


def test_the_client_gets_one_position_of_a_prompt(model: DistributedModel, net: Net) -> None:
    """And the servers in between send it none."""
    with model.inference_session(max_length=2000):
        model.generate(prompt(tokens=1500), max_new_tokens=1, **GREEDY)
        whole = 1500 * HIDDEN * 4
        control = [cable for cable in net.cables if cable.source == "client"]
        pushed = [cable for cable in net.cables if cable.name == PUSH_STREAM]
        assert len(control) == 3
        assert len(pushed) == 2
        assert all(cable.bytes >= whole for cable in pushed)
        assert sum(cable.bytes for cable in control) < 1.2 * whole


def test_pieces_of_a_prompt_overlap_along_the_chain(
    model: DistributedModel, net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first server goes on to the last piece while the second has not finished the first one."""
    last_begun = threading.Event()
    first, second = net["a"].stage, net["b"].stage
    run_first, run_second, pieces = first.run, second.run, 0

    def counting(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal pieces
        pieces += 1
        if pieces == 3:
            last_begun.set()
        return run_first(hidden, *args, **kwargs)

    def waiting(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert last_begun.wait(20)
        return run_second(hidden, *args, **kwargs)

    monkeypatch.setattr(first, "run", counting)
    monkeypatch.setattr(second, "run", waiting)
    model.generate(prompt(tokens=1500), max_new_tokens=1, **GREEDY)
    assert pieces >= 3


def test_a_stock_server_in_the_middle_of_a_long_prompt(directory: Path, net: Net, local: PreTrainedModel) -> None:
    """It answers every piece in full, the last server only what is needed; one that fails is replaced."""
    net.stock |= {"b"}
    with ring_model(directory, net) as model, model.inference_session(max_length=1600) as session:
        found = generate(model, prompt(tokens=1500), After(4, kill(model, net, "b")), **SAMPLING)
        assert swarm_of(model).names(session) == ["a", "b2", "c"]
        assert [hop.mode for hop in session.route] == ["push", "push", "answer"]
    assert torch.equal(found, generate(local, prompt(tokens=1500), **SAMPLING))


def test_nothing_for_longer_than_the_time_limit_is_a_failure(directory: Path, net: Net, local: PreTrainedModel) -> None:
    """Of a stock server, which sends no heartbeats."""
    net.stock |= {"b"}
    with ring_model(directory, net, request_timeout=0.5) as model, model.inference_session(max_length=40) as session:
        found = generate(model, prompt(), After(4, lambda: net.stop_running("b")), **GREEDY)
        assert swarm_of(model).names(session) == ["a", "b2", "c"]
    assert torch.equal(found, generate(local, prompt(), **GREEDY))


def test_a_second_turn_goes_on(model: DistributedModel, local: Any) -> None:
    ids = prompt(tokens=6)
    with model.inference_session(max_length=60):
        first = generate(model, ids, **GREEDY)
        more = prompt(tokens=4)
        second = model.generate(more, max_new_tokens=5, **GREEDY)
    whole = torch.cat([first, more], dim=1)
    expected = local.generate(whole, attention_mask=torch.ones_like(whole), max_new_tokens=5, **GREEDY)
    assert torch.equal(torch.cat([first, second], dim=1), expected)


# Failures


def kill(model: DistributedModel, net: Net, name: str) -> Act:
    return lambda: on_loop(model, lambda: net.kill(name))


@pytest.mark.parametrize("victim", ["a", "b", "c"])
@pytest.mark.parametrize(
    ("way", "options"),
    [
        ("killed", GREEDY),
        ("killed", BEAMS),
        ("killed", SAMPLING),
        ("silent", SAMPLING),
        ("not a number", SAMPLING),
        ("another shape", GREEDY),
    ],
    ids=str,
)
def test_no_failure_changes_a_token(
    directory: Path,
    stages: dict[str, Stage],
    local: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    victim: str,
    way: str,
    options: dict[str, Any],
) -> None:
    spare = {"a": "ab", "b": "b2", "c": "bc"}[victim]
    net = Net({name: stages[name] for name in ("a", "b", "c", spare)})
    with ring_model(directory, net) as model:

        def act() -> None:
            match way:
                case "killed":
                    on_loop(model, lambda: net.kill(victim))
                case "silent":
                    on_loop(model, lambda: net.stop_running(victim))
                    net.down.add(victim)
                case "not a number":
                    monkeypatch.setattr(stages[victim], "run", lambda hidden, *_, **__: hidden * float("nan"))
                case "another shape":
                    monkeypatch.setattr(stages[victim], "run", lambda hidden, *_, **__: hidden[..., :-1])

        with model.inference_session(max_length=40) as session:
            found = generate(model, prompt(2), After(4, act), **options)
            assert victim not in swarm_of(model).names(session)
            assert all(hop.mode == "push" for hop in session.route[:-1])
        monkeypatch.undo()
    assert torch.equal(found, generate(local, prompt(2), **options))


def test_two_in_a_row_and_one_during_recovery(model: DistributedModel, net: Net, local: PreTrainedModel) -> None:
    replayed = threading.Event()
    run = net["b2"].stage.run

    def die_in_replay(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not replayed.is_set():
            replayed.set()
            model.swarm.call_soon(lambda: net.kill("b2"))
        return run(hidden, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, model.inference_session(max_length=40) as session:
        patch.setattr(net["b2"].stage, "run", die_in_replay)
        after = (After(3, kill(model, net, "b")), After(7, kill(model, net, "a")))
        found = generate(model, prompt(), *after, **SAMPLING)
        assert swarm_of(model).names(session) == ["ab", "c"]
        assert replayed.is_set()
    assert torch.equal(found, generate(local, prompt(), **SAMPLING))


def test_a_failure_in_the_prompt(
    model: DistributedModel, net: Net, local: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, pieces = net["b"].stage.run, 0

    def die_at_the_second(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal pieces
        pieces += 1
        if pieces == 2:
            kill(model, net, "b")()
        return run(hidden, *args, **kwargs)

    monkeypatch.setattr(net["b"].stage, "run", die_at_the_second)
    found = generate(model, prompt(tokens=2000), **GREEDY)
    assert pieces >= 2
    assert torch.equal(found, generate(local, prompt(tokens=2000), **GREEDY))


@pytest.mark.parametrize("options", [GREEDY, BEAMS], ids=["greedy", "beams"])
@pytest.mark.parametrize("way", ["cut", "silent"])
def test_a_broken_link_between_two_live_servers_is_relayed(
    model: DistributedModel, net: Net, local: PreTrainedModel, way: str, options: dict[str, Any]
) -> None:
    def act() -> None:
        cable = net.cable("a", "b")
        if way == "cut":
            on_loop(model, cable.cut)
        cable.silent = True

    with model.inference_session(max_length=40) as session:
        found = generate(model, prompt(), After(4, act), **options)
        assert swarm_of(model).names(session) == ["a", "b", "c"]
        assert [hop.mode for hop in session.route] == ["relay", "push", "answer"]
        assert session.route[0].why == "the link between the two failed lately"
    assert torch.equal(found, generate(local, prompt(), **options))


def test_a_long_computation_is_not_called_dead(
    model: DistributedModel, net: Net, local: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = net["b"].stage.run

    def slow(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        time.sleep(2 * SERVER_SILENCE_S)
        monkeypatch.setattr(net["b"].stage, "run", run)
        return run(hidden, *args, **kwargs)

    monkeypatch.setattr(net["b"].stage, "run", slow)
    with model.inference_session(max_length=40) as session:
        found = generate(model, prompt(), **GREEDY)
        assert swarm_of(model).names(session) == ["a", "b", "c"]
    assert sum(cable.source == "client" for cable in net.cables) == 3
    assert torch.equal(found, generate(local, prompt(), **GREEDY))


def test_a_server_that_dies_between_two_turns(model: DistributedModel, net: Net, local: Any) -> None:
    with model.inference_session(max_length=60) as session:
        first = generate(model, prompt(), **GREEDY)
        kill(model, net, "b")()
        second = model.generate(None, max_new_tokens=5, **GREEDY)
        assert swarm_of(model).names(session) == ["a", "b2", "c"]
    expected = local.generate(first, attention_mask=torch.ones_like(first), max_new_tokens=5, **GREEDY)
    assert torch.equal(torch.cat([first, second], dim=1), expected)


def test_what_everybody_computes_wrong_is_an_error_that_comes(
    model: DistributedModel, net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    for peer in net.peers.values():
        monkeypatch.setattr(peer.stage, "run", lambda hidden, *_, **__: hidden * float("nan"))
    with pytest.raises((ServerBroken, NoChain)):
        generate(model, prompt(), **GREEDY)


def test_blocks_that_nobody_has_any_more_are_waited_for(
    directory: Path, stages: dict[str, Stage], local: PreTrainedModel
) -> None:
    net = Net({name: stages[name] for name in ("a", "b", "c")})
    with ring_model(directory, net, recovery_timeout=20.0) as model:

        def restart() -> None:
            net.down.clear()
            swarm_of(model)._avoided = Avoidance(ban_s=15.0)

        def act() -> None:
            kill(model, net, "b")()
            threading.Timer(0.3, restart).start()

        found = generate(model, prompt(), After(4, act), **SAMPLING)
    assert torch.equal(found, generate(local, prompt(), **SAMPLING))


def test_blocks_that_never_come_back_are_an_error_that_names_them(directory: Path, stages: dict[str, Stage]) -> None:
    net = Net({name: stages[name] for name in ("a", "b", "c")})
    with ring_model(directory, net) as model, pytest.raises(NoChain, match="blocks 2:4"):
        generate(model, prompt(), After(4, kill(model, net, "b")), **GREEDY)


# Ends


def test_the_cache_is_free_after_a_session(model: DistributedModel, net: Net) -> None:
    with model.inference_session(max_length=40):
        generate(model, prompt(), **GREEDY)
        assert not net.is_free()
    wait_for(net.is_free)


def test_the_cache_of_a_client_that_vanishes_is_free_soon(
    model: DistributedModel, net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connections stay open and nothing comes any more."""
    with model.inference_session(max_length=40):
        generate(model, prompt(), **GREEDY)
        for cable in net.cables:
            cable.silent = cable.source == "client"
        monkeypatch.setattr(model.swarm, "_chains", set())  # it does not notice the servers' silence either
        wait_for(net.is_free)


def test_an_idle_session_is_kept(model: DistributedModel, net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    with model.inference_session(max_length=40) as session:
        generate(model, prompt(), **GREEDY)
        before = [cable.bytes for cable in net.cables]
        wait_for(lambda: all(cable.bytes > was for cable, was in zip(net.cables, before, strict=True)))
        model.generate(None, max_new_tokens=2, **GREEDY)
        assert swarm_of(model).names(session) == ["a", "b", "c"]
    assert len(net.cables) == 5


def test_small_pieces_are_as_good(
    model: DistributedModel, net: Net, local: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring_messages, "MAX_CHUNK_TOKENS", 3)
    found = generate(model, prompt(2, 100), After(4, kill(model, net, "b")), **GREEDY)
    assert torch.equal(found, generate(local, prompt(2, 100), **GREEDY))
