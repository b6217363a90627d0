"""A coordinator without a network: its parts on a temporary folder, and members that reach it over loopback TCP."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from geopetals.coordinator import messages as m
from geopetals.coordinator.admin import Admin, View
from geopetals.coordinator.core import Core, ModelFacts, Settings
from geopetals.coordinator.desk import Desk
from geopetals.coordinator.engine import Engine
from geopetals.coordinator.entrance import Entrance, SwarmFacts
from geopetals.coordinator.members import Members
from geopetals.coordinator.service import Service
from geopetals.coordinator.store import Store
from geopetals.credentials import ledger
from geopetals.credentials.authority import Authority
from geopetals.credentials.certificate import Role
from geopetals.credentials.keys import SigningKey
from geopetals.credentials.peer_ids import peer_of_key
from geopetals.swarm.control import ControlChannel
from geopetals.swarm.identity import ModelIdentity

BLOCKS = 8
IDENTITY = ModelIdentity(model="tiny", config_hash="0" * 64, revision=None, fingerprint="1" * 64)
FACTS = ModelFacts(
    name="tiny",
    num_blocks=BLOCKS,
    hidden_size=64,
    block_bytes=1000,
    kv_bytes_per_token=4,
    hidden_bytes_per_token=128,
    max_tokens=2048,
)
SETTINGS = Settings(plan_inline=False, settle_s=0.2, settle_most_s=1.0, search_steps=50)
COORDINATOR = peer_of_key(SigningKey(b"\x01" * 32).public)
ADDRESS = f"/ip4/127.0.0.1/tcp/1/p2p/{COORDINATOR}"


def peer(number: int) -> str:
    """A peer id."""
    return peer_of_key(SigningKey(bytes([2]) * 28 + number.to_bytes(4, "big")).public)


def register(
    *, held: m.Span | None = None, epoch: int = 0, step_s: float = 0.001, memory_bytes: int = 200_000, name: str = "s"
) -> m.Register:
    """A server with room for all blocks, of which one takes `step_s` per decode step."""
    profile = m.Profile(
        device="cpu",
        dtype="float32",
        quantization=None,
        block_bytes=FACTS.block_bytes,
        kv_bytes_per_token=FACTS.kv_bytes_per_token,
        memory_bytes=memory_bytes,
        decode=(m.DecodeSample(1, 16, step_s), m.DecodeSample(8, 16, 2 * step_s)),
        prefill=(m.PrefillSample(16, 4 * step_s), m.PrefillSample(128, 20 * step_s)),
        overhead_s=0.001,
        load_bytes_s=1e8,
    )
    limits = m.Limits(memory_bytes=memory_bytes)
    return m.Register(
        profile=profile, limits=limits, held=held, epoch=epoch, name=name, addresses=(), relayed=False, wire=1
    )


class Rig:
    """One run of a coordinator. Use as an async context manager."""

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.time, settings: Settings = SETTINGS) -> None:
        self._folder, self._clock, self._settings = folder, clock, settings
        self._channels: list[ControlChannel] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Rig":
        self.authority = Authority(self._folder)
        facts = ledger.SwarmFacts(
            swarm="swarm",
            model="tiny",
            identity=IDENTITY.to_dict(),
            coordinator_peer_id=COORDINATOR,
            addresses=(ADDRESS,),
        )
        self.authority.describe_swarm(facts)
        swarm = SwarmFacts(swarm="swarm", model="tiny", identity=IDENTITY, num_blocks=BLOCKS, is_open=False)
        self.store, self._journal = (Store(self._folder / "coordinator.db") for _ in range(2))
        self.members = Members()
        self.engine = Engine(Core(FACTS, self._settings), self._journal, clock=self._clock)
        self.entrance = Entrance(self.authority, swarm, clock=time.time)
        self.desk = Desk(self.engine, self.entrance, self.members)
        self.engine.perform = self.desk.perform
        self.replayed = self.engine.recover()
        self.view = View(self.engine, self.entrance, self.members, self.store, COORDINATOR)
        admin = Admin(self.view, self.engine, self.entrance, self.desk.expel_revoked)
        self.service = Service(self.engine, self.entrance, self.members, self.desk, admin)
        self.engine.restarted()
        self._tasks.append(asyncio.create_task(self.engine.run()))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.end()
        await self.engine.close()
        self.store.close()
        self._journal.close()

    async def end(self) -> None:
        """As a process that is killed: no more snapshot."""
        for channel in self._channels:
            channel.close()
        await asyncio.sleep(0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def token(self, role: Role) -> str:
        return self.authority.create_token(role).encode()

    async def connect(self, peer_id: str, on_call: Any = None, on_notify: Any = None) -> ControlChannel:
        """A member's end of a channel, before hello."""
        accepted: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]]
        accepted = asyncio.get_running_loop().create_future()
        server = await asyncio.start_server(lambda r, w: accepted.set_result((r, w)), "127.0.0.1", 0)
        async with server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            theirs = ControlChannel(*await accepted, peer_id, on_call=_nothing, on_notify=_ignore)
            self._tasks.append(asyncio.create_task(self.service.serve(theirs)))
        ours = ControlChannel(reader, writer, COORDINATOR, on_call=on_call or _nothing, on_notify=on_notify or _ignore)
        ours.start()
        self._channels.append(ours)
        return ours


async def _nothing(method: str, body: dict[str, Any]) -> dict[str, Any]:
    raise ValueError(f"{method} is not answered here")


def _ignore(method: str, body: dict[str, Any]) -> None:
    """Notifications that a test does not look at."""
