"""Servers that answer plausibly and wrongly are found out by their replicas, and honest ones never accused."""

import asyncio
import random
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from geopetals.client.routing import Candidate, Hop
from geopetals.client.spot_check import Mismatch, SpotChecks
from geopetals.errors import ServerGone
from tests.client import fake_swarm
from tests.client.fake_swarm import FakeHop, FakeSwarm, World, connect, load_stages
from tests.models import save_llama

ROUTE = (Hop(peer_id="a", start=0, end=2), Hop(peer_id="b", start=2, end=4), Hop(peer_id="c", start=4, end=6))
INPUTS = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


class Servers:
    """Each block multiplies by a matrix of its own. `liars` answer passes wrongly; nobody replaces those in `lone`."""

    def __init__(self, *, liars: frozenset[str] = frozenset(), lone: frozenset[str] = frozenset()) -> None:
        self._liars, self._lone = liars, lone
        generator = torch.Generator().manual_seed(1)
        self._blocks = [torch.randn(8, 8, generator=generator) for _ in range(6)]
        self.asked: list[str] = []
        self.gone: set[str] = set()

    def compute(self, hop: Hop, hidden: Tensor, prompts: Tensor | None = None) -> Tensor:
        for index, block in enumerate(self._blocks[hop.start : hop.end]):
            if prompts is not None:
                hidden = hidden + prompts[index]
            hidden = torch.tanh(hidden @ block)
        return hidden

    async def forward_on(self, hop: Hop, hidden: Tensor, prompts: Tensor | None) -> Tensor:
        self.asked.append(hop.peer_id)
        if hop.peer_id in self.gone:
            raise ServerGone("no answer")
        answer = self.compute(hop, hidden, prompts)
        return -answer if hop.peer_id in self._liars else answer

    def replicas_of(self, hop: Hop) -> tuple[Hop, ...]:
        if hop.peer_id in self._lone:
            return ()
        middle = hop.start + 1
        return (
            Hop(peer_id=f"{hop.peer_id}1", start=hop.start, end=middle),
            Hop(peer_id=f"{hop.peer_id}2", start=middle, end=hop.end),
        )


def check(servers: Servers, output: Tensor, *, prompts: Tensor | None = None, times: int = 20) -> SpotChecks:
    async def main() -> SpotChecks:
        checks = SpotChecks(servers, rate=1.0, rng=random.Random(0))
        for _ in range(times):
            checks.consider(ROUTE, INPUTS, output, prompts)
            await asyncio.gather(*checks._running)
        return checks

    return asyncio.run(main())


def truth(servers: Servers, prompts: Tensor | None = None) -> Tensor:
    hidden = INPUTS
    for hop in ROUTE:
        hidden = servers.compute(hop, hidden, None if prompts is None else prompts[hop.start : hop.end])
    return hidden


@pytest.mark.parametrize("with_prompts", [False, True])
def test_honest_servers_agree(with_prompts: bool) -> None:
    servers = Servers()
    prompts = torch.ones(6, 1, 5, 8) if with_prompts else None
    checks = check(servers, truth(servers, prompts)[:, -1:], prompts=prompts)
    assert (checks.done, checks.found) == (20, [])
    assert {"a1", "b1", "c1"} <= set(servers.asked)


def test_a_server_that_is_wrong_is_named() -> None:
    servers = Servers(liars=frozenset({"b"}))
    wrong = servers.compute(ROUTE[2], -servers.compute(ROUTE[1], servers.compute(ROUTE[0], INPUTS)))
    checks = check(servers, wrong)
    accused = {mismatch.server for mismatch in checks.found if mismatch.is_its_own}
    assert accused == {"b"}
    assert any(mismatch.replicas == ("b1", "b2") and mismatch.span == (2, 4) for mismatch in checks.found)


def test_a_server_that_lies_to_sessions_alone_is_noticed_but_not_named() -> None:
    servers = Servers()
    checks = check(servers, torch.full((2, 1, 8), float("nan")), times=3)
    assert [mismatch.is_its_own for mismatch in checks.found] == [False] * 3
    assert all(mismatch.error == float("inf") for mismatch in checks.found)


def test_without_a_replica_nothing_is_asked() -> None:
    servers = Servers(lone=frozenset("abc"))
    checks = check(servers, truth(servers)[:, -1:])
    assert (checks.done, servers.asked) == (0, [])


def test_servers_that_do_not_answer_are_not_accused() -> None:
    servers = Servers()
    servers.gone = {"a", "a1"}
    checks = check(servers, truth(servers)[:, -1:])
    assert checks.found == []


def test_the_rate_is_kept() -> None:
    async def main() -> int:
        servers = Servers()
        checks = SpotChecks(servers, rate=0.2, rng=random.Random(0))
        for _ in range(200):
            checks.consider(ROUTE, INPUTS, truth(servers), None)
            await asyncio.gather(*checks._running)
        return checks.done

    assert 20 < asyncio.run(main()) < 60


def test_a_generation_is_checked_as_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With real blocks: sessions with caches and passes without one agree, and a liar among them does not."""
    directory = save_llama(tmp_path)
    world = World(load_stages(directory))

    class Liar(FakeHop):
        def compute(self, *arguments: Tensor | None) -> Tensor:  # type: ignore[override]
            answer = super().compute(*arguments)  # type: ignore[arg-type]
            return answer.flip(-1) if self.hop.peer_id == "server1" else answer

    def candidates(self: FakeSwarm, **_: bool) -> list[Candidate]:
        return self.world.candidates()

    monkeypatch.setattr(FakeSwarm, "_candidates", candidates)
    for hop_class in (FakeHop, Liar):
        monkeypatch.setattr(fake_swarm, "FakeHop", hop_class)
        model = connect(monkeypatch, directory, world, spot_check_rate=1.0)
        try:
            model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=6, do_sample=False)
            found = wait_for_checks(model.swarm.spot_checks)
        finally:
            model.close()
        assert bool(found) == (hop_class is Liar)


def wait_for_checks(checks: SpotChecks) -> list[Mismatch]:
    deadline = time.monotonic() + 30
    while checks._running or not checks.done:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return checks.found
