"""Clients of a swarm with a coordinator: sessions wait their turn, grow, and outlive servers and the coordinator."""

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from geopetals.client.lease import Waiting
from tests.live.commands import Command, wait_for
from tests.live.conftest import Connect
from tests.live.coordinated import READY_S, CoordinatedSwarm, coordinated
from tests.models import VOCABULARY

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]

NEW_TOKENS, PROMPT_TOKENS = 24, 8
LENGTH = PROMPT_TOKENS + NEW_TOKENS
AT_ONCE = 4
SESSIONS = 3 * AT_ONCE
SPANS = ("0:3", "3:6")
GREEDY = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}


@pytest.fixture(scope="module")
def swarm(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CoordinatedSwarm]:
    """Two servers for each block, with cache for half of the sessions at once on each."""
    with coordinated(llama, tmp_path_factory.mktemp("clients")) as swarm:
        room = str(AT_ONCE * LENGTH // 2)
        for span in SPANS * 2:
            swarm.add_server("--blocks", span, "--kv-cache-tokens", room)
        swarm.wait_status(lambda status: ready(status) == 4, "four servers that are ready")
        yield swarm


def ready(status: dict[str, Any]) -> int:
    return sum(server["state"] == "ready" for server in status["servers"])


def prompt(seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, seed: int = 0, **options: Any) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(prompt(seed), **{**GREEDY, **options})
    return tokens


def wait_until_idle(swarm: CoordinatedSwarm) -> None:
    swarm.wait_status(lambda status: not status["sessions"] and not status["queue"], "the end of all sessions")


def test_sessions_at_three_times_the_capacity_all_come_to_their_turn(
    swarm: CoordinatedSwarm, llama: Path, local: PreTrainedModel, connect: Connect
) -> None:
    waits: list[Waiting] = []
    clients = [connect(llama, join=swarm.tokens["client"], on_wait=waits.append) for _ in range(3)]
    expected = [generate(local, seed) for seed in range(3)]

    def run(number: int) -> bool:
        return torch.equal(generate(clients[number % 3], number % 3), expected[number % 3])

    with ThreadPoolExecutor(SESSIONS) as pool:
        assert all(pool.map(run, range(SESSIONS)))
    assert any(waiting.position is not None for waiting in waits)
    wait_until_idle(swarm)


def test_who_asks_for_little_does_not_wait_behind_who_asks_for_much(
    swarm: CoordinatedSwarm, llama: Path, connect: Connect
) -> None:
    """The greedy client's sessions hold all cache until the modest one has its place in the queue."""
    waits: list[Waiting] = []
    greedy = connect(llama, join=swarm.tokens["client"])
    modest = connect(llama, join=swarm.tokens["client"], on_wait=waits.append)
    is_queued = threading.Event()
    with ThreadPoolExecutor(SESSIONS) as pool:
        running = [pool.submit(hold, greedy, is_queued) for _ in range(SESSIONS - 1)]
        swarm.wait_status(lambda status: len(status["queue"]) == SESSIONS - 1 - AT_ONCE, "a queue")
        last = pool.submit(generate, modest)
        try:
            wait_for(lambda: waits, timeout_s=READY_S, what="a place in the queue")
        finally:
            is_queued.set()
        assert waits[0].position is not None
        assert waits[0].position < (SESSIONS - 1 - AT_ONCE) // 2
        for work in [*running, last]:
            work.result(READY_S)
    wait_until_idle(swarm)


def hold(model: Any, released: threading.Event) -> None:
    with model.inference_session(max_length=LENGTH, output_tokens=NEW_TOKENS) as session:
        session.open(1)
        assert released.wait(READY_S)


def test_a_session_outgrows_what_it_was_admitted_for(
    swarm: CoordinatedSwarm, llama: Path, local: PreTrainedModel, connect: Connect
) -> None:
    model = connect(llama, join=swarm.tokens["client"])
    with model.inference_session(max_length=PROMPT_TOKENS + 2) as session:
        found = generate(model, session=session)
        assert session.max_length >= LENGTH - 1
    assert torch.equal(found, generate(local))
    wait_until_idle(swarm)


class At(StoppingCriteria):
    """Does something once, after so many tokens."""

    def __init__(self, length: int, action: Any) -> None:
        self._length, self._action = length, action

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if input_ids.shape[1] == self._length:
            self._action()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def kill(command: Command) -> None:
    for pid in (command.pid, *command.daemons()):
        os.kill(pid, signal.SIGKILL)
    command.wait()


def test_without_the_coordinator_sessions_go_on_recover_and_begin(
    swarm: CoordinatedSwarm, llama: Path, local: PreTrainedModel, connect: Connect
) -> None:
    """It is killed in the middle of a session, then a server that the session uses. Comes last: one server less."""
    patience = {"coordinator_timeout": 1.0, "connect_timeout": 5.0}
    model = connect(llama, join=swarm.tokens["client"], **patience)
    expected = generate(local)
    assert swarm.coordinator is not None
    coordinator, by_peer = swarm.coordinator, {peer_of(server): server for server in swarm.commands[1:]}
    with model.inference_session(max_length=LENGTH) as session:
        at_once = [
            At(PROMPT_TOKENS + 6, lambda: kill(coordinator)),
            At(PROMPT_TOKENS + 12, lambda: kill(by_peer[session.route[0].peer_id])),
        ]
        assert torch.equal(generate(model, stopping_criteria=StoppingCriteriaList(at_once)), expected)
    assert torch.equal(generate(model), expected)
    swarm.start_coordinator()
    wait_for(lambda: model.swarm.coordination.is_connected, timeout_s=READY_S, what="the coordinator's return")
    assert torch.equal(generate(model), expected)
    swarm.wait_status(lambda status: ready(status) == 3, "the servers that are left")
    wait_until_idle(swarm)


def peer_of(server: Command) -> str:
    return server.wait_line(r"^peer (\w+)")[1]
