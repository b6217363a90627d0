import asyncio
import gc
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from geopetals.client.chain import Chain
from geopetals.client.lease import Lease, Waiting
from geopetals.client.model import DistributedModel
from geopetals.client.routing import Hop
from geopetals.client.session import InferenceSession
from geopetals.coordinator.messages import ChainHop, Close, Open
from geopetals.errors import (
    Busy,
    ControlLost,
    NoChain,
    ServerFull,
    ServerGone,
    ServerMoving,
    ServerRefused,
    SwarmFailure,
    UnsupportedInput,
)
from geopetals.swarm import ring_messages
from geopetals.swarm.stage import Stage
from tests.client.fake_swarm import FakeHop, World, connect, forever, load_stages
from tests.models import VOCABULARY, save_llama

HIDDEN = 64


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("session"))


@pytest.fixture(scope="module")
def stages(directory: Path) -> list[Stage]:
    return load_stages(directory)


@pytest.fixture(scope="module")
def local(directory: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval()


@pytest.fixture
def world(stages: list[Stage]) -> World:
    return World(stages)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, directory: Path, world: World) -> Iterator[DistributedModel]:
    connected = connect(monkeypatch, directory, world)
    yield connected
    connected.close()


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(seed))


def prompt(batch: int = 1, tokens: int = 5) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(0))


def close_to(ours: Tensor, reference: Tensor) -> bool:
    return ours.shape == reference.shape and float((ours - reference).abs().max()) <= 1e-5 * float(
        reference.abs().max()
    )


def all_blocks(stages: list[Stage], hidden: Tensor) -> Tensor:
    with torch.inference_mode():
        return stages[-1].run(hidden, 0, 6)


class DieAt:
    """Kills the server that is asked the n-th time, before it computes or when its answer is on its way."""

    def __init__(self, *numbers: int, answer_lost: bool = False) -> None:
        self.numbers, self.answer_lost = numbers, answer_lost
        self.died = 0

    async def __call__(self, hop: FakeHop, number: int) -> None:
        if number in self.numbers:
            self.died += 1
            if self.answer_lost:
                hop.compute(torch.zeros(hop.kv.batch, 1, HIDDEN), None)
            raise hop.world.die(hop.hop)


# What a session computes


def test_steps_equal_one_pass(model: DistributedModel, stages: list[Stage], world: World) -> None:
    hidden = randn(2, 9)
    with model.inference_session(max_length=9) as session:
        outputs = [session.step(piece) for piece in hidden.split([4, 1, 3, 1], dim=1)]
        assert session.position == 9
        assert [(hop.start, hop.end) for hop in session.route] == [(0, 3), (3, 6)]
        assert world.caches_held == 2
    assert close_to(torch.cat(outputs, dim=1), all_blocks(stages, hidden))
    assert world.caches_held == 0


def test_long_prompts_go_in_pieces(
    model: DistributedModel, stages: list[Stage], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring_messages, "MAX_CHUNK_BYTES", 2 * 2 * HIDDEN * 4)
    hidden = randn(2, 9)
    with model.inference_session(max_length=9) as session:
        assert close_to(session.step(hidden), all_blocks(stages, hidden))
    assert world.steps == 2 * 5


def test_rows_are_reordered_on_every_hop(model: DistributedModel, stages: list[Stage]) -> None:
    past, new, order = randn(3, 4), randn(3, 1, seed=1), torch.tensor([2, 2, 0])
    with model.inference_session(max_length=5) as session:
        session.step(past)
        found = session.step(new, order)
    assert close_to(found, all_blocks(stages, torch.cat([past[order], new], dim=1))[:, 4:])


def test_the_format_of_the_caller_is_kept(model: DistributedModel) -> None:
    with model.inference_session(max_length=4) as session:
        assert session.step(randn(1, 2).bfloat16()).dtype == torch.bfloat16


# Recovery


@pytest.mark.parametrize("answer_lost", [False, True])
@pytest.mark.parametrize("step", range(10))
def test_no_failure_changes_what_comes_out(
    model: DistributedModel,
    stages: list[Stage],
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    answer_lost: bool,
) -> None:
    """Prefill in three pieces over two hops, a reordering, more steps: the server that does the n-th piece dies."""
    monkeypatch.setattr(ring_messages, "MAX_CHUNK_BYTES", 3 * 2 * HIDDEN * 4)
    world.before_step = fault = DieAt(step, answer_lost=answer_lost)
    past, new, more, order = randn(3, 6), randn(3, 1, seed=1), randn(3, 1, seed=2), torch.tensor([2, 2, 0])
    with model.inference_session(max_length=8) as session:
        outputs = [session.step(past), session.step(new, order), session.step(more)]
        assert len(world.dead) == fault.died == 1
        assert world.caches_held == len(session.route)
    reordered = all_blocks(stages, torch.cat([past[order], new, more], dim=1))
    assert close_to(outputs[0], all_blocks(stages, past))
    assert close_to(torch.cat(outputs[1:], dim=1), reordered[:, 6:])
    assert world.caches_held == 0


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generation_survives_every_failure(
    monkeypatch: pytest.MonkeyPatch,
    directory: Path,
    stages: list[Stage],
    local: PreTrainedModel,
    options: dict[str, Any],
) -> None:
    generate: Any = local.generate
    expected = generate(prompt(), attention_mask=torch.ones(1, 5), max_new_tokens=6, do_sample=False, **options)
    for step in range(12):
        world = World(stages, before_step=DieAt(step))
        model = connect(monkeypatch, directory, world)
        found = model.generate(prompt(), max_new_tokens=6, do_sample=False, **options)
        model.close()
        assert torch.equal(found, expected)
        assert len(world.dead) == 1
        assert world.caches_held == 0


def test_failures_one_after_the_other(model: DistributedModel, stages: list[Stage], world: World) -> None:
    """Also while the history is being replayed."""
    hidden = randn(1, 6)
    last_step = {"server0": 3, "server1": 3, "server3": 1}
    taken: Counter[str] = Counter()

    async def die_at_the_last(hop: FakeHop, number: int) -> None:
        taken[hop.hop.peer_id] += 1
        if taken[hop.hop.peer_id] == last_step.get(hop.hop.peer_id):
            raise world.die(hop.hop)

    world.before_step = die_at_the_last
    with model.inference_session(max_length=6) as session:
        outputs = [session.step(piece) for piece in hidden.split(2, dim=1)]
    assert len(world.dead) == 3
    assert close_to(torch.cat(outputs, dim=1), all_blocks(stages, hidden))


def test_a_server_that_is_gone_when_a_session_starts_is_avoided(
    model: DistributedModel, stages: list[Stage], world: World
) -> None:
    world.dead.add("server1")
    with model.inference_session(max_length=4) as session:
        assert close_to(session.step(randn(1, 4)), all_blocks(stages, randn(1, 4)))
        assert "server1" not in {hop.peer_id for hop in session.route}
    assert world.caches_held == 0


def test_when_nobody_is_left_the_missing_blocks_are_named(model: DistributedModel, world: World) -> None:
    with model.inference_session(max_length=4) as session:
        session.step(randn(1, 1))
        world.dead.update(f"server{number}" for number in range(5))
        with pytest.raises(NoChain, match="blocks"):
            session.step(randn(1, 1))
        assert world.caches_held == 0


def test_a_session_that_failed_can_go_on_when_servers_come_back(
    model: DistributedModel, stages: list[Stage], world: World
) -> None:
    hidden = randn(1, 3)
    with model.inference_session(max_length=4) as session:
        first = session.step(hidden[:, :2])
        world.dead.update(f"server{number}" for number in range(5))
        with pytest.raises(SwarmFailure):
            session.step(hidden[:, 2:])
        world.dead.clear()
        model.swarm.avoided.clear()  # type: ignore[attr-defined]
        rest = session.step(hidden[:, 2:])
    assert close_to(torch.cat([first, rest], dim=1), all_blocks(stages, hidden))


def test_retries_end(monkeypatch: pytest.MonkeyPatch, directory: Path, world: World) -> None:
    model = connect(monkeypatch, directory, world, max_retries=1)
    world.before_step = DieAt(*range(100))
    with model.inference_session(max_length=4) as session, pytest.raises(ServerGone):
        session.step(randn(1, 1))
    assert world.steps == 2
    assert world.caches_held == 0
    model.close()


def test_a_refusal_is_not_tried_again(model: DistributedModel, world: World) -> None:
    async def refuse(hop: FakeHop, number: int) -> None:
        raise ServerRefused("the server refused the request.")

    world.before_step = refuse
    with model.inference_session(max_length=4) as session, pytest.raises(ServerRefused):
        session.step(randn(1, 1))
    assert world.steps == 1
    assert world.caches_held == 0


def test_a_full_swarm_is_waited_for(model: DistributedModel, stages: list[Stage], world: World) -> None:
    world.full_opens = 5
    with model.inference_session(max_length=4) as session:
        assert close_to(session.step(randn(1, 2)), all_blocks(stages, randn(1, 2)))
    assert not world.dead
    assert world.caches_held == 0


def test_a_swarm_that_stays_full_is_called_full(monkeypatch: pytest.MonkeyPatch, directory: Path, world: World) -> None:
    model = connect(monkeypatch, directory, world, full_timeout=0.05)
    world.full_opens = 10**6
    with model.inference_session(max_length=4) as session, pytest.raises(ServerFull):
        session.step(randn(1, 2))
    assert world.caches_held == 0
    model.close()


# Interruption


def press_ctrl_c() -> None:
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGINT)


async def interrupt(hop: FakeHop, number: int) -> None:
    if number == 3:
        press_ctrl_c()
        await forever()


def test_after_an_interrupted_step_the_session_goes_on_exactly(
    model: DistributedModel, stages: list[Stage], world: World
) -> None:
    hidden = randn(1, 4)
    world.before_step = interrupt
    with model.inference_session(max_length=4) as session:
        first = session.step(hidden[:, :2])
        with pytest.raises(KeyboardInterrupt):
            session.step(hidden[:, 2:3])
        rest = [session.step(hidden[:, token : token + 1]) for token in (2, 3)]
    assert close_to(torch.cat([first, *rest], dim=1), all_blocks(stages, hidden))
    assert world.caches_held == 0


def test_interrupted_while_it_opens_a_session_keeps_no_cache(model: DistributedModel, world: World) -> None:
    async def wait_for_ever_on_the_second(hop: Hop) -> None:
        if hop.start > 0:
            press_ctrl_c()
            await forever()

    world.before_open = wait_for_ever_on_the_second
    session = InferenceSession(model.swarm, 4)
    with pytest.raises(KeyboardInterrupt):
        session.open(1)
    session.close()
    wait_until_free(model, world)


def wait_until_free(model: DistributedModel, world: World) -> None:
    """A cancelled coroutine needs some turns of its loop to put things in order."""
    for _ in range(50):
        model.swarm.run(asyncio.sleep(0))
    assert world.caches_held == 0


# Limits and ends


def test_open_reserves_and_the_first_step_uses_it(model: DistributedModel, world: World) -> None:
    with model.inference_session(max_length=4) as session:
        session.open(2)
        assert world.caches_held == 2
        assert len(session.route) == 2
        session.step(randn(2, 1))
        assert sum(world.opened.values()) == 2


def test_a_step_over_the_length_is_refused_before_it_is_sent(model: DistributedModel, world: World) -> None:
    with model.inference_session(max_length=4) as session:
        session.step(randn(1, 3))
        steps = world.steps
        with pytest.raises(UnsupportedInput, match="3 tokens and 2 more exceed the session's max_length of 4"):
            session.step(randn(1, 2))
        assert world.steps == steps
        session.step(randn(1, 1))


def test_another_batch_is_refused(model: DistributedModel) -> None:
    with model.inference_session(max_length=4) as session:
        session.step(randn(2, 1))
        with pytest.raises(UnsupportedInput, match="a batch of 2, got 1"):
            session.step(randn(1, 1))


@pytest.mark.parametrize("length", [0, -5])
def test_a_session_has_room_for_a_token(model: DistributedModel, length: int) -> None:
    with pytest.raises(UnsupportedInput, match="max_length"), model.inference_session(max_length=length):
        pass


def test_a_closed_session_stays_closed(model: DistributedModel, world: World) -> None:
    session = InferenceSession(model.swarm, 4)
    session.step(randn(1, 1))
    session.close()
    session.close()
    with pytest.raises(UnsupportedInput, match="closed"):
        session.step(randn(1, 1))
    with pytest.raises(UnsupportedInput, match="closed"):
        session.open(1)
    assert world.caches_held == 0


def test_closing_after_the_swarm_was_left_is_quiet(model: DistributedModel) -> None:
    session = InferenceSession(model.swarm, 4)
    session.step(randn(1, 1))
    model.close()
    session.close()


def test_a_forgotten_session_is_dropped_by_the_garbage_collector(model: DistributedModel, world: World) -> None:
    session = InferenceSession(model.swarm, 4)
    session.step(randn(1, 1))
    del session
    gc.collect()
    wait_until_free(model, world)


# With a coordinator


class Coordinated:
    """Stands for the coordinator: admits sessions to a chain, whether it is the cheapest or not."""

    standby = b"standby"

    def __init__(self, *chain: tuple[str, int, int]) -> None:
        self.chain = tuple(ChainHop(*hop) for hop in chain)
        self.asked: list[Open] = []
        self.ended: list[Close] = []
        self.extended: list[int] = []
        self.error: SwarmFailure | None = None

    async def admit(self, lease: Lease, asked: Open) -> tuple[bytes, tuple[ChainHop, ...]]:
        self.asked.append(asked)
        if self.error is not None:
            raise self.error
        return b"ticket", self.chain

    async def extend(self, session_id: str, max_length: int) -> bytes:
        self.extended.append(max_length)
        return f"ticket for {max_length}".encode()

    def end(self, close: Close) -> None:
        self.ended.append(close)

    async def close(self) -> None:
        return None


@pytest.fixture
def coordinator(model: DistributedModel) -> Coordinated:
    found = Coordinated(("server2", 0, 4), ("server3", 4, 6))
    model.swarm.coordination = found  # type: ignore[assignment]
    return found


def test_the_advised_chain_is_taken_and_the_ticket_shown(
    model: DistributedModel, world: World, coordinator: Coordinated
) -> None:
    tokens = model.generate(prompt(), max_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, 9)
    assert [(hop.peer_id, hop.start, hop.end) for hop, _ in world.openings] == [tuple(hop) for hop in coordinator.chain]
    assert {(opening.credential, opening.recovery) for _, opening in world.openings} == {(b"ticket", False)}
    (asked,) = coordinator.asked
    assert (asked.batch, asked.max_length, asked.prompt_tokens, asked.output_tokens) == (1, 9, 5, 4)
    wait_until_free(model, world)
    (closed,) = coordinator.ended
    assert (closed.session_id, closed.measured.tokens, closed.measured.failovers) == (asked.session_id, 4, 0)


@pytest.mark.parametrize(
    "chain", [(("server0", 0, 3),), (("server0", 0, 3), ("server1", 2, 6)), (("server0", 0, 10**9),), ()]
)
def test_advice_that_is_no_chain_is_not_taken(
    model: DistributedModel, world: World, coordinator: Coordinated, chain: tuple[tuple[str, int, int], ...]
) -> None:
    coordinator.chain = tuple(ChainHop(*hop) for hop in chain)
    with model.inference_session(max_length=4) as session:
        session.step(randn(1, 2))
        assert [(hop.start, hop.end) for hop in session.route] == [(0, 3), (3, 6)]


def test_a_server_that_the_client_blocks_is_not_advised_to_it(
    monkeypatch: pytest.MonkeyPatch, directory: Path, world: World
) -> None:
    model = connect(monkeypatch, directory, world, blocked_servers=("server2",))
    model.swarm.coordination = Coordinated(("server2", 0, 4), ("server3", 4, 6))  # type: ignore[assignment]
    with model.inference_session(max_length=4) as session:
        session.step(randn(1, 2))
        assert "server2" not in {hop.peer_id for hop in session.route}
    model.close()


def test_recovery_goes_elsewhere_with_the_same_ticket(
    model: DistributedModel, stages: list[Stage], world: World, coordinator: Coordinated
) -> None:
    world.before_step = DieAt(2)
    hidden = randn(1, 4)
    with model.inference_session(max_length=4) as session:
        outputs = [session.step(piece) for piece in hidden.split(2, dim=1)]
        assert close_to(torch.cat(outputs, dim=1), all_blocks(stages, hidden))
    assert len(world.dead) == len(coordinator.asked) == 1
    assert [opening.recovery for _, opening in world.openings] == [False, False, True, True]
    assert {opening.credential for _, opening in world.openings} == {b"ticket"}
    assert coordinator.ended[0].measured.failovers == 1


def test_a_server_that_moves_is_left_without_waiting(
    model: DistributedModel, stages: list[Stage], world: World, coordinator: Coordinated
) -> None:
    async def move(hop: FakeHop, number: int) -> None:
        if number == 2:
            world.dead.add(hop.hop.peer_id)
            model.swarm.avoided.add(hop.hop.peer_id)  # type: ignore[attr-defined]
            raise ServerMoving("the server gives up its blocks.")

    world.before_step = move
    hidden = randn(1, 4)
    with model.inference_session(max_length=4) as session:
        outputs = [session.step(piece) for piece in hidden.split(2, dim=1)]
    assert close_to(torch.cat(outputs, dim=1), all_blocks(stages, hidden))


def test_a_session_that_outgrows_its_ticket_shows_another(
    model: DistributedModel,
    stages: list[Stage],
    world: World,
    coordinator: Coordinated,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Chain, "can_grow", True)
    hidden = randn(1, 5)
    with model.inference_session(max_length=2) as session:
        first = session.step(hidden[:, :2])
        assert not world.shown
        rest = [session.step(hidden[:, 2:4]), session.step(hidden[:, 4:])]
    assert close_to(torch.cat([first, *rest], dim=1), all_blocks(stages, hidden))
    assert coordinator.extended == [4 + 256]
    assert world.shown == [b"ticket for 260"] * 2


def test_a_session_that_was_given_up_asks_again_when_it_needs_a_chain(
    model: DistributedModel, stages: list[Stage], world: World, coordinator: Coordinated
) -> None:
    hidden = randn(1, 6)
    with model.inference_session(max_length=6) as session:
        outputs = [session.step(hidden[:, :2])]
        session._lease.lose()
        outputs.append(session.step(hidden[:, 2:4]))
        assert len(coordinator.asked) == 1
        world.before_step = DieAt(world.steps)
        coordinator.chain = (ChainHop("server4", 0, 6),)
        outputs.append(session.step(hidden[:, 4:]))
        assert [hop.peer_id for hop in session.route] == ["server4"]
        assert len({asked.session_id for asked in coordinator.asked}) == 2
    assert close_to(torch.cat(outputs, dim=1), all_blocks(stages, hidden))


def test_a_session_that_waits_for_cache_in_its_midst_says_so(
    monkeypatch: pytest.MonkeyPatch, directory: Path, stages: list[Stage], world: World
) -> None:
    seen: list[Waiting] = []
    model = connect(monkeypatch, directory, world, on_wait=seen.append, full_timeout=5.0, recovery_timeout=5.0)
    hidden = randn(1, 4)
    with model.inference_session(max_length=4) as session:
        outputs = [session.step(hidden[:, :2])]
        world.before_step, world.full_opens = DieAt(world.steps), 3
        outputs.append(session.step(hidden[:, 2:]))
        assert session.waiting is None
    model.close()
    assert close_to(torch.cat(outputs, dim=1), all_blocks(stages, hidden))
    assert {str(waiting) for waiting in seen} == {"waiting for attention cache"}


def test_without_a_coordinator_the_way_is_found_alone(
    model: DistributedModel, world: World, coordinator: Coordinated
) -> None:
    coordinator.error = ControlLost("nobody is there.")
    with model.inference_session(max_length=4) as session:
        session.step(randn(1, 2))
    assert [hop.peer_id for hop, _ in world.openings] == ["server0", "server1"]
    assert {(opening.credential, opening.recovery) for _, opening in world.openings} == {(b"standby", False)}
    assert coordinator.ended == []


def test_busy_is_told_at_once_and_may_be_tried_again(
    model: DistributedModel, world: World, coordinator: Coordinated
) -> None:
    coordinator.error = Busy("the queue is full.", retry_after_s=3.0)
    with model.inference_session(max_length=4) as session:
        with pytest.raises(Busy) as caught:
            session.step(randn(1, 2))
        assert caught.value.retry_after_s == 3.0
        assert not world.openings
        coordinator.error = None
        session.step(randn(1, 2))
    assert len({asked.session_id for asked in coordinator.asked}) == 2


def test_padded_prompts_share_one_place(model: DistributedModel, world: World, coordinator: Coordinated) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    model.generate(prompt(3), attention_mask=mask, max_new_tokens=3, do_sample=False)
    (asked,) = coordinator.asked
    assert (asked.batch, asked.max_length) == (3, 8)
    assert len(world.openings) == 4
    wait_until_free(model, world)
    assert len(coordinator.ended) == 1


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
def test_all_rows_of_a_prompt_are_asked_for(
    model: DistributedModel, coordinator: Coordinated, options: dict[str, Any]
) -> None:
    model.generate(prompt(), max_new_tokens=3, **options)
    assert coordinator.asked[0].batch == options.get("num_beams", 2)
