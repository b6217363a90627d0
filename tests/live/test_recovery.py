"""A server dies in mid-generation: the same tokens where another holds its blocks, a clear error where none does."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from geopetals.errors import NoChain, ServerGone, SwarmFailure
from geopetals.swarm.local import LocalServer, LocalSwarm
from tests.live.commands import wait_for, wait_gone
from tests.live.conftest import Connect
from tests.models import VOCABULARY

pytestmark = pytest.mark.live

NEW_TOKENS = 24
KILL_AT = 8
GREEDY = {"do_sample": False}
SAMPLING = {"do_sample": True, "temperature": 1.5, "top_k": 0, "top_p": 0.95}
IMPATIENT = {
    "max_retries": 2,
    "min_backoff": 0.05,
    "connect_timeout": 2.0,
    "request_timeout": 5.0,
    "ping_timeout": 1.0,
    "recovery_timeout": 3.0,
}


def prompts(batch: int = 1, length: int = 9) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def lasting(llama: Path) -> Iterator[LocalSwarm]:
    """A swarm whose first server, which the token names, is never killed."""
    with LocalSwarm(str(llama)) as swarm:
        yield swarm.start(spans=[(0, 3)])


@pytest.fixture
def swarm(lasting: LocalSwarm) -> Iterator[LocalSwarm]:
    """Two stages; what a test added or left of the second one is gone after the test."""
    lasting.add((3, 6))
    yield lasting
    for server in lasting.servers[1:]:
        lasting.kill(server, signal.SIGTERM)
        wait_gone({server.pid, server.p2pd_pid}, timeout_s=15)
    wait_for(lambda: len(lasting.servers) == 1, timeout_s=5, what="notice of the servers' end")


class At(StoppingCriteria):
    """Does something once, after so many tokens."""

    def __init__(self, length: int, action: Callable[[], None]) -> None:
        self._length, self._action, self.done = length, action, False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if not self.done and input_ids.shape[1] >= self._length:
            self.done = True
            self._action()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def generate(model: Any, ids: torch.Tensor, *actions: At, **options: Any) -> torch.Tensor:
    torch.manual_seed(7)
    criteria = StoppingCriteriaList(list(actions))
    tokens: torch.Tensor = model.generate(ids, max_new_tokens=NEW_TOKENS, stopping_criteria=criteria, **options)
    return tokens


def used_by(session: Any, swarm: LocalSwarm, block: int) -> LocalServer:
    """The server of the session's chain that computes this block."""
    peer = next(hop.peer_id for hop in session.route if hop.start <= block < hop.end)
    return next(server for server in swarm.servers if server.peer_id == peer)


def kill(swarm: LocalSwarm, server: LocalServer) -> None:
    swarm.kill(server)
    wait_gone({server.pid}, timeout_s=5)


@pytest.mark.parametrize(
    ("batch", "options"),
    [
        pytest.param(1, GREEDY, id="greedy"),
        pytest.param(3, SAMPLING, id="sampling"),
        pytest.param(1, {**GREEDY, "num_beams": 4}, id="beams"),
    ],
)
def test_the_same_tokens_after_sigkill(
    swarm: LocalSwarm, llama: Path, local: PreTrainedModel, connect: Connect, batch: int, options: dict[str, Any]
) -> None:
    swarm.add((3, 6))
    model = connect(llama, join=swarm.token, **IMPATIENT)
    ids = prompts(batch)
    with model.inference_session(max_length=60) as session:
        killing = At(ids.shape[1] + KILL_AT, lambda: kill(swarm, used_by(session, swarm, 3)))
        found = generate(model, ids, killing, **options)
        assert killing.done
        assert used_by(session, swarm, 3) in swarm.servers
    assert torch.equal(found, generate(local, ids, **options))


def test_a_chain_of_other_spans_takes_over(
    swarm: LocalSwarm, llama: Path, local: PreTrainedModel, connect: Connect
) -> None:
    """One server of blocks 3:6 dies; its replacement is two, the first entered at block 3 of its span 1:5."""
    swarm.add((1, 5))
    swarm.add((5, 6))
    model = connect(llama, join=swarm.token, **IMPATIENT)
    ids = prompts()
    with model.inference_session(max_length=60) as session:
        victim = next(server for server in swarm.servers if (server.start, server.end) == (3, 6))
        found = generate(model, ids, At(ids.shape[1] + KILL_AT, lambda: kill(swarm, victim)), **SAMPLING)
        assert [(hop.start, hop.end) for hop in session.route][-1] == (5, 6)
    assert torch.equal(found, generate(local, ids, **SAMPLING))


def test_between_the_turns_of_a_session(
    swarm: LocalSwarm, llama: Path, local: PreTrainedModel, connect: Connect
) -> None:
    """The server dies while nobody waits for it; its successor joins only then."""
    model = connect(llama, join=swarm.token, **IMPATIENT)
    with model.inference_session(max_length=60) as session:
        first = generate(model, prompts(), **SAMPLING)
        victim = used_by(session, swarm, 3)
        kill(swarm, victim)
        replacement = swarm.add((2, 6))
        second = model.generate(None, max_new_tokens=5, **GREEDY)
        assert session.route[-1].peer_id == replacement.peer_id
    assert torch.equal(first, generate(local, prompts(), **SAMPLING))
    everything = torch.ones_like(first)
    expected = local.generate(first, attention_mask=everything, max_new_tokens=5, **GREEDY)
    assert torch.equal(torch.cat([first, second], dim=1), expected)


def test_a_server_that_leaves_in_order(
    swarm: LocalSwarm, llama: Path, local: PreTrainedModel, connect: Connect
) -> None:
    """SIGTERM in mid-generation: its sessions go on elsewhere."""
    swarm.add((3, 6))
    model = connect(llama, join=swarm.token, **IMPATIENT)
    ids = prompts()

    def leave() -> None:
        server = used_by(session, swarm, 3)
        swarm.kill(server, signal.SIGTERM)
        wait_gone({server.pid, server.p2pd_pid}, timeout_s=15)

    with model.inference_session(max_length=60) as session:
        found = generate(model, ids, At(ids.shape[1] + KILL_AT, leave), **SAMPLING)
    assert torch.equal(found, generate(local, ids, **SAMPLING))


def test_a_server_that_hangs(swarm: LocalSwarm, llama: Path, local: PreTrainedModel, connect: Connect) -> None:
    """SIGSTOP: its connections stay open and nothing comes, no heartbeat either."""
    swarm.add((3, 6))
    model = connect(llama, join=swarm.token, **{**IMPATIENT, "request_timeout": 180.0})
    ids = prompts()
    stopped: list[LocalServer] = []

    def stop() -> None:
        stopped.append(used_by(session, swarm, 3))
        swarm.kill(stopped[0], signal.SIGSTOP)

    try:
        with model.inference_session(max_length=60) as session:
            found = generate(model, ids, At(ids.shape[1] + KILL_AT, stop), **SAMPLING)
    finally:
        for server in stopped:
            swarm.kill(server, signal.SIGKILL)
    assert torch.equal(found, generate(local, ids, **SAMPLING))


@pytest.mark.parametrize("failure", ["sigkill", "p2pd"])
def test_an_error_in_time_where_nobody_has_the_blocks(
    swarm: LocalSwarm, llama: Path, connect: Connect, failure: str
) -> None:
    model = connect(llama, join=swarm.token, **IMPATIENT)
    ids = prompts()

    def kill_last() -> None:
        server = used_by(session, swarm, 3)
        if failure == "p2pd":
            swarm.kill(server, signal.SIGSTOP)  # so that it cannot come back within this test
            os.kill(server.p2pd_pid, signal.SIGKILL)
        else:
            kill(swarm, server)
        killed.append(server)

    killed: list[LocalServer] = []
    try:
        with model.inference_session(max_length=60) as session:
            killing = At(ids.shape[1] + KILL_AT, kill_last)
            began = time.monotonic()
            with pytest.raises(SwarmFailure) as caught:
                generate(model, ids, killing, **GREEDY)
            took_s = time.monotonic() - began
    finally:
        for server in killed:
            if failure == "p2pd":
                swarm.kill(server, signal.SIGKILL)
    assert killed
    assert isinstance(caught.value, NoChain | ServerGone)
    assert "\n" not in str(caught.value)
    if isinstance(caught.value, NoChain):
        assert "blocks 3:6" in str(caught.value)
    attempts_s = (IMPATIENT["max_retries"] + 1) * (IMPATIENT["request_timeout"] + IMPATIENT["connect_timeout"])
    limit_s = IMPATIENT["recovery_timeout"] + attempts_s
    assert took_s < limit_s


def test_no_session_where_blocks_are_missing(swarm: LocalSwarm, llama: Path, connect: Connect) -> None:
    victim = swarm.servers[-1]
    model = connect(llama, join=swarm.token, **IMPATIENT)
    kill(swarm, victim)
    wait_gone({victim.p2pd_pid}, timeout_s=5)
    with pytest.raises((NoChain, ServerGone), match=r"\.$"):
        model.generate(prompts(), max_new_tokens=3, **GREEDY)
    late = connect(llama, join=swarm.token, **IMPATIENT)
    with pytest.raises(NoChain, match="blocks 3:6 of 6 have no server"):
        late.generate(prompts(), max_new_tokens=3, **GREEDY)
    with pytest.raises(NoChain, match="blocks 3:6 of 6 have no server"), torch.no_grad():
        late(prompts())


def test_forward_without_a_session_goes_around_a_dead_server(
    swarm: LocalSwarm, llama: Path, local: PreTrainedModel, connect: Connect
) -> None:
    swarm.add((3, 6))
    model = connect(llama, join=swarm.token, **IMPATIENT)
    with model.inference_session(max_length=4) as session:
        session.open(1)
        victim = used_by(session, swarm, 3)
    with torch.no_grad():
        expected = local(prompts()).logits
        assert torch.allclose(model(prompts()).logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
        kill(swarm, victim)
        assert torch.allclose(model(prompts()).logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
