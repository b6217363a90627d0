"""A server that moves to other blocks: its sessions go on elsewhere with the same tokens, or end where they are."""

import asyncio
import gc
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from geopetals.client.model import DistributedModel
from geopetals.swarm.checkpoint import Checkpoint
from geopetals.swarm.holding import Holding
from geopetals.swarm.service import Service
from geopetals.swarm.stage import Stage, load_stage
from tests.models import VOCABULARY, save_llama
from tests.ring_swarm import Net, RingSwarm, ring_model

SPANS = {"a": (0, 2), "b": (2, 4), "c": (4, 6), "b2": (2, 4)}
KV_TOKENS, NEW_TOKENS, DEADLINE_S = 256, 12, 20.0


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("service") / "llama")


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


@pytest.fixture
def service(model: DistributedModel, net: Net) -> Iterator[Service]:
    """Of the server `b`, in the place of its handler."""
    peer = net["b"]

    async def start() -> Service:
        started = Service(peer.compute, swarm=net.swarm)
        network: Any = SimpleNamespace(p2p=peer.p2p)
        await started.move_to(network)
        await started.serve(holding(peer.stage))
        return started

    started: Service = swarm_of(model).run(start())
    yield started
    swarm_of(model).run(started.close())


def holding(stage: Stage) -> Holding:
    return Holding(stage=stage, block_hashes={}, kv_tokens=KV_TOKENS, load_s=0.1)


def swarm_of(model: DistributedModel) -> RingSwarm:
    assert isinstance(model.swarm, RingSwarm)
    return model.swarm


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class At(StoppingCriteria):
    """Does something after so many new tokens."""

    def __init__(self, tokens: int, act: Callable[[], object]) -> None:
        self._left, self._act = tokens, act

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self._left -= 1
        if self._left == 0:
            self._act()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def generate(model: Any, *criteria: StoppingCriteria) -> Tensor:
    ids = torch.randint(3, VOCABULARY, (1, 5), generator=torch.Generator().manual_seed(0))
    tokens: Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList(list(criteria)),
    )
    return tokens


def test_sessions_are_told_apart_and_counted(model: DistributedModel, service: Service) -> None:
    seen: list[Any] = []
    generate(model, At(4, lambda: seen.append((service.cache(), service.sessions()))))
    cache, (held,) = seen[0]
    assert (cache["total"], cache["running"]) == (2 * KV_TOKENS, 1)
    assert held.block_tokens == cache["total"] - cache["free"] >= 2 * (5 + NEW_TOKENS)
    assert 5 < held.tokens <= 5 + NEW_TOKENS
    wait_for(lambda: service.cache()["free"] == 2 * KV_TOKENS)


def test_a_session_that_must_leave_goes_on_elsewhere_with_the_same_tokens(
    model: DistributedModel, net: Net, service: Service, local: PreTrainedModel
) -> None:
    async def move() -> None:
        await service.drain("the server moves", 0.0)
        assert service.cache()["running"] == 0
        await service.stop("the server moves")

    with model.inference_session(max_length=40) as session:
        found = generate(model, At(5, lambda: swarm_of(model).run(move())))
        names = swarm_of(model).names(session)
    assert torch.equal(found, generate(local))
    assert names == ["a", "b2", "c"]
    assert service.holding is None
    assert service.cache() == {"total": 0, "free": 0, "running": 0, "waiting": 0}


def test_a_session_that_ends_in_time_is_not_disturbed_and_nobody_else_comes_in(
    model: DistributedModel, net: Net, service: Service, local: PreTrainedModel
) -> None:
    drained: list[asyncio.Task[None]] = []

    async def begin() -> None:
        drained.append(asyncio.create_task(service.drain("the server moves", DEADLINE_S)))
        await asyncio.sleep(0)

    with model.inference_session(max_length=40) as session:
        found = generate(model, At(5, lambda: swarm_of(model).run(begin())))
        assert swarm_of(model).names(session) == ["a", "b", "c"]
        assert not drained[0].done()
        with model.inference_session(max_length=40) as other:
            assert torch.equal(generate(model), generate(local))
            assert swarm_of(model).names(other) == ["a", "b2", "c"]
    assert torch.equal(found, generate(local))
    wait_for(lambda: drained[0].done())
    assert service.cache()["running"] == 0


def test_after_a_move_it_serves_again(
    model: DistributedModel, net: Net, service: Service, local: PreTrainedModel
) -> None:
    async def move_away_and_back() -> None:
        await service.drain("the server moves", 0.0)
        await service.stop("the server moves")
        await service.serve(holding(net["b"].stage))

    swarm_of(model).run(move_away_and_back())
    with model.inference_session(max_length=40) as session:
        assert torch.equal(generate(model), generate(local))
        assert swarm_of(model).names(session) == ["a", "b", "c"]


def test_blocks_that_were_left_are_out_of_memory(model: DistributedModel, service: Service, directory: Path) -> None:
    async def serve_and_stop(stage: Stage) -> None:
        await service.serve(holding(stage))
        await service.drain("the server moves", 0.0)
        await service.stop("the server moves")

    checkpoint = Checkpoint.open(str(directory))
    stage = load_stage(checkpoint, 2, 4, dtype=torch.float32, device=torch.device("cpu"))
    left = weakref.ref(stage)
    swarm_of(model).run(serve_and_stop(stage))
    del stage
    gc.collect()
    assert left() is None
