"""A block server: one process that loads some blocks of a model and serves them to a swarm.

Everything but computing runs on one event loop. p2pd is supervised: when it dies the server takes its place in the
swarm again, with the same identity and port and with its blocks still loaded. Which blocks: its own choice, made once,
or whatever its coordinator says at any time.
"""

import asyncio
import gc
from collections.abc import Callable, Coroutine
from typing import Any

import torch

from geopetals.errors import SwarmMismatch
from geopetals.join_token import JoinToken, check_swarm_name, swarm_name_for
from geopetals.progress import Reporter
from geopetals.swarm import devices
from geopetals.swarm.blocks import default_kv_tokens
from geopetals.swarm.checkpoint import Checkpoint
from geopetals.swarm.compute import ComputeThread
from geopetals.swarm.coordinated_server import CoordinatedServer
from geopetals.swarm.emulation import EmulatedDevice
from geopetals.swarm.entering import Entrance, Nat
from geopetals.swarm.gate import Gate
from geopetals.swarm.holding import Loader
from geopetals.swarm.listing import Listing
from geopetals.swarm.lone_server import serve_alone
from geopetals.swarm.membership import Membership
from geopetals.swarm.network import NetworkConfig, new_identity
from geopetals.swarm.place import Place
from geopetals.swarm.self_measurement import find_or_measure
from geopetals.swarm.server_config import ReadyServer, ServerConfig
from geopetals.swarm.server_parts import ServerParts
from geopetals.swarm.service import Service


class BlockServer:
    """One run of a server; `run()` returns when `stop` is set."""

    def __init__(self, config: ServerConfig, reporter: Reporter, on_ready: Callable[[ReadyServer], None]) -> None:
        self._config, self._reporter, self._on_ready = config, reporter, on_ready
        token, identity = config.token, config.identity or new_identity()
        self._membership: Membership | None = None
        if token is not None and token.coordinator is not None:
            self._membership = Membership(token, identity=identity)
        network = NetworkConfig(
            initial_peers=token.peers if token is not None else config.initial_peers,
            host=config.host,
            port=config.port,
            public_ip=config.public_ip,
            identity=identity,
            validator=self._membership.records if self._membership is not None else None,
        )
        relays = config.relays or (token.relays if token is not None else ())
        entrance = Entrance(config=network, nat=Nat(config.nat), relays=relays)
        self._place = Place(entrance, reporter)
        self.swarm = _swarm_name(config)
        self._service: Service | None = None
        self._listing: Listing | None = None
        self._coordinated: CoordinatedServer | None = None

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop`; raises GeoPetalsError when the server cannot start."""
        if self._config.threads is not None:
            torch.set_num_threads(self._config.threads)
        gc.freeze()  # to look at all that was imported takes a third of a second, in which no session gets on
        self._compute = ComputeThread(asyncio.get_running_loop())
        try:
            await self._until(stop, self._live())
        finally:
            if self._service is not None:
                await self._service.close()
            await self._place.leave()
            self._compute.stop()

    def close(self) -> bool:
        """Wait a little for the compute thread; False if it still computes."""
        return self._compute.join(timeout_s=1.0)

    async def _until(self, stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
        """Do `work` until `stop` is set; others hear of the end before it comes."""
        task = asyncio.create_task(work)
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
            await self._say_goodbye()
        finally:
            for pending in (task, stopped):
                pending.cancel()
            await asyncio.gather(task, stopped, return_exceptions=True)

    async def _say_goodbye(self) -> None:
        if self._coordinated is not None:
            await self._coordinated.leave()
        if self._listing is not None:
            await self._listing.offline()

    async def _live(self) -> None:
        checkpoint = await self._compute.run(self._open_checkpoint)
        loader, membership = self._loader(checkpoint), self._membership
        if membership is None:
            await serve_alone(await self._enter(loader))
            return
        profile = await find_or_measure(loader, self._identity, anew=self._config.reprofile)
        parts = await self._enter(loader, gate=membership.make_gate())
        self._coordinated = CoordinatedServer(parts, membership, profile)
        await self._coordinated.run()

    def _open_checkpoint(self) -> Checkpoint:
        checkpoint = Checkpoint.open(self._config.model, revision=self._config.revision, reporter=self._reporter)
        self._identity = checkpoint.identity()
        if self._config.token is not None:
            check_token(self._config.token, checkpoint)
        if self._config.blocks is not None:
            checkpoint.check_span(*self._config.blocks)
        return checkpoint

    def _loader(self, checkpoint: Checkpoint) -> Loader:
        config = self._config
        device = devices.choose_device(config.device)
        emulated = EmulatedDevice(config.emulate) if config.emulate is not None else None
        default = None if config.is_coordinated else default_kv_tokens(checkpoint.config)
        emulated_bytes = config.emulate.memory_bytes if config.emulate is not None else None
        return Loader(
            checkpoint=checkpoint,
            compute=self._compute,
            reporter=self._reporter,
            device=device,
            dtype=devices.choose_dtype(config.dtype, device, getattr(checkpoint.config, "dtype", None)),
            quantization=config.quantization,
            memory_bytes=config.memory_bytes or emulated_bytes or devices.usable_memory(device),
            kv_tokens=config.kv_cache_tokens or default,
            emulated=emulated,
        )

    async def _enter(self, loader: Loader, *, gate: Gate | None = None) -> ServerParts:
        """Take a place in the network, where nothing is served yet."""
        await self._place.take()
        self._service = Service(self._compute, swarm=self.swarm, gate=gate)
        await self._service.move_to(self._place.network)
        self._listing = Listing(loader, self._identity, self._place.network, swarm=self.swarm, name=self._config.name)
        return ServerParts(
            config=self._config,
            swarm=self.swarm,
            identity=self._identity,
            loader=loader,
            place=self._place,
            service=self._service,
            listing=self._listing,
            reporter=self._reporter,
            on_ready=self._on_ready,
        )


def check_token(token: JoinToken, checkpoint: Checkpoint) -> None:
    """Raises SwarmMismatch if the token's swarm serves another model than this checkpoint."""
    conflict = checkpoint.identity().conflict(token.identity)
    if conflict is not None:
        raise SwarmMismatch(f"the token is for a swarm of another model: {conflict}")


def _swarm_name(config: ServerConfig) -> str:
    if config.swarm is not None:
        return check_swarm_name(config.swarm)
    return config.token.swarm if config.token is not None else swarm_name_for(config.model)
