"""Servers that push to each other, as processes of their own: modes of a route, lengths, and who frees what."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from geopetals.swarm.local import LocalSwarm
from tests.live.conftest import Connect, load_local
from tests.live.free_cache import free_cache, wait_all_free
from tests.models import VOCABULARY, save_llama

pytestmark = pytest.mark.live

GREEDY = {"do_sample": False}
SAMPLING = {"do_sample": True, "temperature": 1.5, "top_k": 0}
CLIENT = """
import sys, time, torch
from geopetals import AutoDistributedModelForCausalLM
model = AutoDistributedModelForCausalLM.from_pretrained(sys.argv[1], join=sys.argv[2])
with model.inference_session(max_length=64):
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2)
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def long_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("long") / "llama", max_position_embeddings=4096)


@pytest.fixture(scope="module")
def long_local(long_llama: Path) -> PreTrainedModel:
    return load_local(long_llama)


@pytest.fixture(scope="module")
def ring(long_llama: Path) -> Iterator[LocalSwarm]:
    with LocalSwarm(str(long_llama)) as swarm:
        yield swarm.start(spans=[(0, 2), (1, 4), (4, 6)])


def prompts(batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(0))


def generate(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    torch.manual_seed(7)
    tokens: torch.Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, **options)
    return tokens


@pytest.mark.parametrize("push", [True, False])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (3, 7), (1, 2500)])
def test_tokens_of_the_local_model(
    ring: LocalSwarm,
    long_llama: Path,
    long_local: PreTrainedModel,
    connect: Connect,
    push: bool,
    batch: int,
    tokens: int,
) -> None:
    model = connect(long_llama, join=ring.token, push=push)
    for options in (GREEDY, SAMPLING, {**GREEDY, "num_beams": 3}):
        ids = prompts(batch, tokens)
        rows = batch * options.get("num_beams", 1)
        with model.inference_session(max_length=tokens + 12) as session:
            found = generate(model, ids, **options)
            modes = [hop.mode for hop in session.route]
        assert modes == [*["push" if push else "relay"] * 2, "answer"], rows
        assert torch.equal(found, generate(long_local, ids, **options))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_client_that_is_gone_frees_its_cache(
    ring: LocalSwarm, long_llama: Path, connect: Connect, number: signal.Signals
) -> None:
    watcher = connect(long_llama, join=ring.token)
    wait_all_free(watcher, ring.servers, timeout_s=15)
    before = free_cache(watcher, ring.servers)
    command = [sys.executable, "-c", CLIENT, str(long_llama), ring.token]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as client:
        try:
            assert client.stdout is not None
            assert client.stdout.readline() == "ready\n"
            assert all(left < was for left, was in zip(free_cache(watcher, ring.servers), before, strict=True))
            os.kill(client.pid, number)
            wait_all_free(watcher, ring.servers, timeout_s=15)
        finally:
            client.kill()


def test_a_session_that_outgrew_its_length_frees_all_it_got(
    ring: LocalSwarm, long_llama: Path, long_local: PreTrainedModel, connect: Connect
) -> None:
    """A prompt in two turns, the second of several pieces; then a failure: the new chain is as long as it must be."""
    model = connect(long_llama, join=ring.token)
    ids = prompts(1, 900)
    with model.inference_session(max_length=20) as session:
        first = generate(model, ids[:, :8], **GREEDY)
        assert session._chain is not None
        small = free_cache(model, ring.servers)
        longer = torch.cat([first, ids], dim=1)
        found = torch.cat([first, model.generate(longer[:, first.shape[1] :], max_new_tokens=6, **GREEDY)], dim=1)
        large = free_cache(model, ring.servers)
        assert all(was - left >= 880 for was, left in zip(small, large, strict=True))
        session._abandon()
        last = model.generate(None, max_new_tokens=6, **GREEDY)
    everything = torch.ones_like(longer)
    expected = long_local.generate(longer, attention_mask=everything, max_new_tokens=12, **GREEDY)
    assert torch.equal(torch.cat([found, last], dim=1), expected)
    wait_all_free(model, ring.servers, timeout_s=15)


def test_a_cancelled_generation_frees_its_cache(ring: LocalSwarm, long_llama: Path, connect: Connect) -> None:
    model = connect(long_llama, join=ring.token)

    class Cancelled(Exception):
        pass

    def cancel(*_: Any, **__: Any) -> Any:
        raise Cancelled

    with pytest.raises(Cancelled):
        model.generate(prompts(1, 5), max_new_tokens=50, stopping_criteria=[cancel])
    wait_all_free(model, ring.servers, timeout_s=15)


def test_an_idle_session_lasts(ring: LocalSwarm, long_llama: Path, connect: Connect) -> None:
    """Longer than a server would wait for a client that shows no sign of life."""
    model = connect(long_llama, join=ring.token)
    with model.inference_session(max_length=40) as session:
        generate(model, prompts(1, 5), **GREEDY)
        chain = session._chain
        time.sleep(9)
        model.generate(None, max_new_tokens=2, **GREEDY)
        assert session._chain is chain
