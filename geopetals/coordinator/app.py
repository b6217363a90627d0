"""The coordinator's process: state, network, core and HTTP put together, from start to stop."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from geopetals.coordinator.admin import Admin, View
from geopetals.coordinator.core import Core, Settings
from geopetals.coordinator.core.events import ClientLost, ServerLost
from geopetals.coordinator.core.members import Server
from geopetals.coordinator.desk import Desk
from geopetals.coordinator.engine import Engine
from geopetals.coordinator.entrance import Entrance, SwarmFacts
from geopetals.coordinator.http import HttpServer, make_app
from geopetals.coordinator.members import Members
from geopetals.coordinator.model import ServedModel
from geopetals.coordinator.pace import keep_pace
from geopetals.coordinator.place import Place
from geopetals.coordinator.recorded import note_core
from geopetals.coordinator.service import Service
from geopetals.coordinator.state import check_same_swarm, only_one
from geopetals.coordinator.store import Store
from geopetals.coordinator.tokens import standing_tokens
from geopetals.credentials import ledger
from geopetals.credentials.authority import PEERS_PER_TOKEN, Authority
from geopetals.errors import ControlLost, SwarmFailure
from geopetals.progress import Reporter, Silent
from geopetals.swarm.network import NetworkConfig, load_identity
from geopetals.swarm.redial import connect

log = logging.getLogger(__name__)

RETURN_S = 15.0
"""After a start, members that were there before it have this long to come back."""
_CALL_BACK_S = 3.0
_MAX_CALLED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorConfig:
    """`http` None: no HTTP. `port` 0: the port of last time, or any free one. `settings` are the core's."""

    model: ServedModel
    state: Path
    swarm: str
    host: str = "127.0.0.1"
    port: int = 0
    public_ip: str | None = None
    is_open: bool = False
    relays: tuple[str, ...] = ()
    http: tuple[str, int] | None = None
    http_token: str | None = None
    settings: Settings = field(default_factory=Settings)
    peers_per_token: int = PEERS_PER_TOKEN


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """What a started coordinator tells. `tokens` are join tokens by role."""

    peer_id: str
    addresses: tuple[str, ...]
    tokens: dict[str, str]
    http: str | None
    events: int
    replayed: int


class Coordinator:
    """Use once: `run` until `stop` is set."""

    def __init__(
        self, config: CoordinatorConfig, on_ready: Callable[[Running], None], *, reporter: Reporter | None = None
    ) -> None:
        self._config, self._on_ready = config, on_ready
        self._reporter = reporter or Silent()

    async def run(self, stop: asyncio.Event) -> None:
        """Raises StoreError, TokenError, NetworkError, or SwarmFailure when the disk takes no more."""
        config = self._config
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(only_one(config.state))
            path = config.state / "coordinator.db"
            store, journal = (stack.enter_context(contextlib.closing(Store(path))) for _ in range(2))
            check_same_swarm(store, config.swarm, config.model.identity, config.state)
            note_core(store, config.model.facts, config.settings)
            engine = Engine(Core(config.model.facts, config.settings), journal, clock=steady_unix_time())
            stack.push_async_callback(engine.close)
            replayed = engine.recover()
            place = Place(
                store,
                Authority(config.state, peers_per_token=config.peers_per_token),
                self._network_config(),
                self._token_facts(),
            )
            await place.enter()
            stack.push_async_callback(place.leave)
            keep_pace()
            await self._serve(store, engine, place, replayed, stop)

    def _network_config(self) -> NetworkConfig:
        config = self._config
        identity = load_identity(config.state / "identity")
        return NetworkConfig(host=config.host, port=config.port, public_ip=config.public_ip, identity=identity)

    def _token_facts(self) -> ledger.SwarmFacts:
        config = self._config
        return ledger.SwarmFacts(
            swarm=config.swarm,
            model=config.model.name,
            identity=config.model.identity.to_dict(),
            coordinator_peer_id="",
            addresses=(),
            relays=config.relays,
            open=config.is_open,
        )

    async def _serve(self, store: Store, engine: Engine, place: Place, replayed: int, stop: asyncio.Event) -> None:
        config = self._config
        facts = SwarmFacts(
            swarm=config.swarm,
            model=config.model.name,
            identity=config.model.identity,
            num_blocks=config.model.facts.num_blocks,
            is_open=config.is_open,
        )
        members, entrance = Members(), Entrance(place.authority, facts, clock=time.time)
        desk = Desk(engine, entrance, members)
        engine.perform = desk.perform
        view = View(engine, entrance, members, store, place.network.peer_id)
        service = Service(engine, entrance, members, desk, Admin(view, engine, entrance, desk.expel_revoked))
        async with self._http(view) as address:
            running = Running(
                peer_id=place.network.peer_id,
                addresses=await place.network.addresses(),
                tokens=standing_tokens(place.authority, config.state),
                http=address,
                events=engine.events,
                replayed=replayed,
            )
            self._on_ready(running)
            returned = asyncio.Event()

            def on_return() -> None:
                engine.restarted()
                returned.set()

            works = (
                engine.run(),
                view.bound.run(),
                service.housekeeping(),
                place.keep(service.serve, self._reporter, on_return),
                _lose_the_lost(engine, members),
                call_back(engine, members, place, returned),
            )
            engine.restarted()
            try:
                await _until_end(stop, engine.failed, works)
            finally:
                desk.stop()

    @contextlib.asynccontextmanager
    async def _http(self, view: View) -> AsyncIterator[str | None]:
        if self._config.http is None:
            yield None
            return
        host, port = self._config.http
        server = HttpServer(make_app(view, token=self._config.http_token), host=host, port=port)
        try:
            yield await server.start()
        finally:
            await server.stop()


def steady_unix_time() -> Callable[[], float]:
    """A clock that agrees with the machine's now, and does not jump when that is set."""
    anchor = time.time() - time.monotonic()
    return lambda: anchor + time.monotonic()


async def _until_end(
    stop: asyncio.Event, failed: "asyncio.Future[None]", endless: Sequence[Coroutine[Any, Any, None]]
) -> None:
    """Until we are told to stop, or something fails."""
    tasks = [asyncio.create_task(work) for work in endless]
    stopped = asyncio.create_task(stop.wait())
    try:
        ends: set[asyncio.Future[Any]] = {stopped, failed, *tasks}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if failed.done():
            raise SwarmFailure(f"the coordinator's state cannot be written ({failed.exception()}): look at its disk.")
        for task in tasks:
            if task.done():
                task.result()
    finally:
        stopped.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(stopped, *tasks, return_exceptions=True)


async def call_back(engine: Engine, members: Members, place: Place, returned: asyncio.Event) -> None:
    """Connect to the servers that were there before a start, or before p2pd was `returned`: after a long outage their
    p2pd hardly dials any more, and a connection is good both ways. Never ends.
    """
    while True:
        end = time.monotonic() + RETURN_S
        while time.monotonic() < end:
            for server in list(engine.core.servers.values()):
                if members.get(server.peer) is None:
                    with contextlib.suppress(ControlLost):
                        await connect(place.network.p2p, _addresses_of(server))
            await asyncio.sleep(_CALL_BACK_S)
        await returned.wait()
        returned.clear()


def _addresses_of(server: Server) -> list[str]:
    """What it said of itself, as far as it is about itself."""
    return [each for each in server.register.addresses if each.endswith(f"/p2p/{server.peer}")][:_MAX_CALLED]


async def _lose_the_lost(engine: Engine, members: Members) -> None:
    """Whoever the core remembers and has not come back some time after the start is lost. Never ends."""
    servers, clients = list(engine.core.servers), list(engine.core.clients)
    await asyncio.sleep(RETURN_S)
    for peer in servers:
        if members.get(peer) is None:
            engine.apply(ServerLost(peer=peer))
    for client in clients:
        if members.get(client) is None:
            engine.apply(ClientLost(client=client))
    await asyncio.Event().wait()
