"""Failure after failure in one generation: two replicas of every block, servers killed at random and replaced."""

import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from geopetals.swarm.local import LocalSwarm
from tests.live.commands import wait_for, wait_gone
from tests.live.conftest import Connect, load_local
from tests.models import VOCABULARY, save_llama

pytestmark = pytest.mark.live

SPANS = [(0, 3), (3, 6)]
KILLS, TOKENS_BETWEEN = 20, 6
SAMPLING = {"do_sample": True, "temperature": 1.5, "top_k": 0}
PATIENT = {"max_retries": 8, "min_backoff": 0.05, "connect_timeout": 5.0, "ping_timeout": 1.0}


@pytest.fixture(scope="module")
def long_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("long") / "llama", max_position_embeddings=8192)


@pytest.fixture(scope="module")
def long_local(long_llama: Path) -> PreTrainedModel:
    return load_local(long_llama)


@pytest.fixture(scope="module")
def swarm(long_llama: Path) -> Iterator[LocalSwarm]:
    """The first server, which the token names, is spared: it brings new ones in."""
    with LocalSwarm(str(long_llama)) as swarm:
        yield swarm.start(spans=[*SPANS, *SPANS])


class EachToken(StoppingCriteria):
    """Calls with the number of new tokens."""

    def __init__(self, act: Callable[[int], object]) -> None:
        self._act, self._tokens = act, 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self._tokens += 1
        self._act(self._tokens)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def prompts(tokens: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(0))


def generate(model: Any, ids: torch.Tensor, tokens: int, act: Callable[[int], object]) -> torch.Tensor:
    torch.manual_seed(7)
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, **SAMPLING}
    criteria = StoppingCriteriaList([EachToken(act)])
    found: torch.Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), stopping_criteria=criteria, **options
    )
    return found


@pytest.mark.timeout(600)
def test_twenty_kills_in_one_generation(
    swarm: LocalSwarm, long_llama: Path, long_local: PreTrainedModel, connect: Connect
) -> None:
    """Each time a server that the session uses dies, by SIGKILL or by SIGSTOP; its replacement comes tokens later."""
    model = connect(long_llama, join=swarm.token, **PATIENT)
    chance = random.Random(5)
    spared = min(swarm.servers, key=lambda server: server.number).peer_id
    stopped: list[Any] = []
    dead: list[tuple[int, int]] = []
    kills = 0

    def act(tokens: int) -> None:
        nonlocal kills
        if tokens % TOKENS_BETWEEN == 0 and kills < KILLS:
            used = {hop.peer_id for hop in session.route}
            victims = [server for server in swarm.servers if server.peer_id in used - {spared}]
            victim = chance.choice(victims)
            kills += 1
            dead.append((victim.start, victim.end))
            if kills % 5 == 0:
                swarm.kill(victim, signal.SIGSTOP)
                stopped.append(victim)
            else:
                swarm.kill(victim)
                wait_gone({victim.pid}, timeout_s=5)
        elif tokens % TOKENS_BETWEEN == TOKENS_BETWEEN // 2 and dead:
            while stopped:
                swarm.kill(stopped.pop(), signal.SIGKILL)
            swarm.add(dead.pop())

    total = (KILLS + 1) * TOKENS_BETWEEN
    with model.inference_session(max_length=9 + total) as session:
        found = generate(model, prompts(9), total, act)
    assert kills == KILLS
    assert torch.equal(found, generate(long_local, prompts(9), total, lambda _: None))


def test_a_kill_in_the_middle_of_a_long_prompt(
    swarm: LocalSwarm, long_llama: Path, long_local: PreTrainedModel, connect: Connect
) -> None:
    model = connect(long_llama, join=swarm.token, **PATIENT)
    ids = prompts(4000)
    with model.inference_session(max_length=4010) as session:
        session.open(1)
        chain = session._chain
        assert chain is not None
        last = next(server for server in swarm.servers if server.peer_id == session.route[-1].peer_id)

        def kill_when_it_computes() -> None:
            wait_for(lambda: chain._flights, timeout_s=30, what="the first piece on its way")
            swarm.kill(last)

        killer = threading.Thread(target=kill_when_it_computes)
        killer.start()
        found = generate(model, ids, 3, lambda _: None)
        killer.join()
        assert session._chain is not chain
    swarm.add((last.start, last.end))
    assert torch.equal(found, generate(long_local, ids, 3, lambda _: None))
