"""A swarm in this process: the client's own code, with stages in the place of streams to servers."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from geopetals.client import chain_opening
from geopetals.client import opening as opening_module
from geopetals.client.hop import HopSession, Listener
from geopetals.client.model import AutoDistributedModelForCausalLM, DistributedModel
from geopetals.client.routing import Candidate, Hop, shortest_chain
from geopetals.client.swarm import SwarmClient
from geopetals.errors import ServerFull, ServerGone, SwarmFailure
from geopetals.swarm import block_ops
from geopetals.swarm.block_ops import StepInput
from geopetals.swarm.checkpoint import Checkpoint
from geopetals.swarm.heartbeat import Silence
from geopetals.swarm.ring_messages import Beat, Opening, Step
from geopetals.swarm.stage import Stage, load_stage

SPANS = ((0, 3), (3, 6), (0, 4), (2, 6), (0, 6))
Hook = Callable[["FakeHop", int], Awaitable[None]]


def load_stages(directory: Path) -> list[Stage]:
    checkpoint = Checkpoint.open(str(directory))
    return [load_stage(checkpoint, *span, dtype=torch.float32, device=torch.device("cpu")) for span in SPANS]


@dataclass
class World:
    """Servers by name; earlier ones are cheaper, so that a failure changes the chain and where it is cut."""

    stages: Sequence[Stage]
    dead: set[str] = field(default_factory=set)
    opened: Counter[str] = field(default_factory=Counter)
    held: Counter[str] = field(default_factory=Counter)
    openings: list[tuple[Hop, Opening]] = field(default_factory=list)
    shown: list[bytes] = field(default_factory=list)
    full_opens: int = 0
    steps: int = 0
    before_step: Hook | None = None
    before_open: Callable[[Hop], Awaitable[None]] | None = None

    def candidates(self) -> list[Candidate]:
        return [
            Candidate(peer_id=f"server{number}", start=stage.start, end=stage.end, rtt_s=10.0**number, block_s=0.01)
            for number, stage in enumerate(self.stages)
        ]

    def stage_of(self, hop: Hop) -> Stage:
        return self.stages[int(hop.peer_id.removeprefix("server"))]

    def die(self, hop: Hop) -> ServerGone:
        self.dead.add(hop.peer_id)
        return ServerGone(f"{hop.peer_id} does not answer any more.")

    @property
    def caches_held(self) -> int:
        return sum(self.held.values())


class FakeHop(HopSession):
    """A stage in the place of a stream: steps are computed one after another, their outputs told to the listener."""

    def __init__(self, world: World, hop: Hop, *, batch: int, max_length: int) -> None:
        self.world, self.hop = world, hop
        self.span = range(hop.start, hop.end)
        self.kv = world.stage_of(hop).allocate_kv(hop.start, hop.end, batch=batch, max_length=max_length)
        self.has_heartbeats, self.beat, self.frames, self.silence = False, Beat(), 0, Silence(1.0)
        self._listening = None
        self._steps: asyncio.Queue[tuple[Any, ...]] = asyncio.Queue()
        self._open = True
        world.held[hop.peer_id] += 1

    @classmethod
    async def open(  # type: ignore[override]
        cls, world: World, hop: Hop, swarm: str, opening: Opening, *, batch: int, max_length: int, **_: Any
    ) -> "FakeHop":
        world.opened[hop.peer_id] += 1
        world.openings.append((hop, opening))
        if world.before_open is not None:
            await world.before_open(hop)
        if hop.peer_id in world.dead:
            raise world.die(hop)
        if world.full_opens > 0:
            world.full_opens -= 1
            raise ServerFull("no attention cache is free.")
        return cls(world, hop, batch=batch, max_length=max_length)

    def listen(self, listener: Listener) -> None:
        self._listening = asyncio.create_task(self._work(listener))

    def post(self, step: Step, hidden: Tensor, hypo_ids: Tensor | None, prompts: Tensor | None) -> None:
        self._steps.put_nowait((step, hidden, hypo_ids, prompts))

    def show(self, credential: bytes) -> None:
        self.world.shown.append(credential)

    async def drain(self) -> None:
        return None

    async def _work(self, listener: Listener) -> None:
        try:
            while True:
                step, *arguments = await self._steps.get()
                listener.on_output(self, step, await self.step(*arguments))
        except SwarmFailure as error:
            listener.on_failure(self, error)

    async def step(self, hidden: Tensor, hypo_ids: Tensor | None, prompts: Tensor | None = None) -> Tensor:
        number, self.world.steps = self.world.steps, self.world.steps + 1
        if self.world.before_step is not None:
            await self.world.before_step(self, number)
        if self.hop.peer_id in self.world.dead:
            raise self.world.die(self.hop)
        return self.compute(hidden, hypo_ids, prompts)

    def compute(self, hidden: Tensor, hypo_ids: Tensor | None, prompts: Tensor | None = None) -> Tensor:
        self.kv.grow(max(self.kv.max_length, self.kv.length + hidden.shape[1]))
        step = StepInput(hidden=hidden, prompts=prompts, hypo_ids=hypo_ids)
        return block_ops.infer(self.world.stage_of(self.hop), self.span, self.kv, step)

    async def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        if self._open:
            self._open = False
            if self._listening is not None:
                self._listening.cancel()
            self.world.held[self.hop.peer_id] -= 1


class FakeSwarm(SwarmClient):
    """A SwarmClient that knows the servers of a world."""

    world: World

    def start(self) -> None:
        self.avoided: set[str] = set()

    @property
    def network(self) -> Any:
        return SimpleNamespace(p2p=self.world)

    async def chain_async(self, *, refresh: bool = False, start: int = 0, end: int | None = None) -> tuple[Hop, ...]:
        alive = [candidate for candidate in self.world.candidates() if candidate.peer_id not in self.avoided]
        return shortest_chain(alive, self.num_blocks)

    def avoid(self, peer_id: str, error: SwarmFailure) -> None:
        if isinstance(error, ServerGone):
            self.avoided.add(peer_id)

    async def forward_on(self, hop: Hop, hidden: Tensor, prompts: Tensor | None) -> Tensor:
        stage = self.world.stage_of(hop)
        return block_ops.forward(stage, range(hop.start, hop.end), hidden, prompts)


def connect(monkeypatch: pytest.MonkeyPatch, directory: Path, world: World, **options: Any) -> DistributedModel:
    """`from_pretrained`, with this world for a swarm."""
    swarm_class = type("WorldSwarm", (FakeSwarm,), {"world": world})
    monkeypatch.setattr(opening_module, "SwarmClient", swarm_class)
    monkeypatch.setattr(chain_opening, "HopSession", FakeHop)
    patience = {"min_backoff": 0.001, "max_backoff": 0.001, "recovery_timeout": 0.05}
    defaults = {"initial_peers": ("/ip4/127.0.0.1/tcp/1/p2p/x",), **patience}
    return AutoDistributedModelForCausalLM.from_pretrained(str(directory), **{**defaults, **options})


async def forever(*_: object) -> None:
    await asyncio.Event().wait()
