"""A block server: one process that loads some blocks of a model and serves them to a swarm.

Everything but computing runs on one event loop. p2pd is supervised: when it dies the server takes its place in the
swarm again, with the same identity and port and with its blocks still loaded.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any

import torch

from geopetals.errors import NetworkError, SwarmMismatch
from geopetals.join_token import JoinToken, check_swarm_name, swarm_name_for
from geopetals.progress import Reporter
from geopetals.swarm import devices, profile
from geopetals.swarm.blocks import choose_blocks, default_kv_tokens, measured_block_bytes
from geopetals.swarm.checkpoint import Checkpoint
from geopetals.swarm.compute import ComputeThread, Priority
from geopetals.swarm.emulated_stage import emulate
from geopetals.swarm.emulation import DeviceSpec, EmulatedDevice
from geopetals.swarm.handler import BlockHandler
from geopetals.swarm.kv_budget import KVBudget
from geopetals.swarm.network import Network, NetworkConfig, new_identity
from geopetals.swarm.quantization import stored_quantization
from geopetals.swarm.records import UPDATE_PERIOD_S, announce, check_same_model, read_servers, require_same_weights
from geopetals.swarm.stack import PETALS_VERSION, ServerInfo, ServerState
from geopetals.swarm.stage import Stage, load_stage

log = logging.getLogger(__name__)

_RESTART_DELAY_S = 1.0
_MAX_RESTARTS_IN_A_ROW = 5
_FAREWELL_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """What an operator decides; None is decided by the server.

    `blocks` is the half-open span to serve, `count` how many blocks wherever they are needed. `memory_bytes` limits
    weights and attention cache together. `kv_cache_tokens` is how many tokens every block can hold over all sessions.
    `emulate`, for benchmarks: steps take the time of that device, and its memory is the limit if no other is given.
    """

    model: str
    revision: str | None = None
    token: JoinToken | None = None
    initial_peers: tuple[str, ...] = ()
    swarm: str | None = None
    blocks: tuple[int, int] | None = None
    count: int | None = None
    device: str | None = None
    dtype: str | None = None
    quantization: str | None = None
    memory_bytes: int | None = None
    kv_cache_tokens: int | None = None
    host: str = "127.0.0.1"
    port: int = 0
    public_ip: str | None = None
    name: str | None = None
    identity: bytes | None = None
    threads: int | None = None
    emulate: DeviceSpec | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadyServer:
    """A server that answers: what it holds and how to join its swarm. Sizes in bytes."""

    peer_id: str
    p2pd_pid: int
    start: int
    end: int
    num_blocks: int
    weights_bytes: int
    kv_bytes: int
    process_bytes: int
    token: str
    emulated: dict[str, Any] | None = None


class BlockServer:
    """One run of a server; `run()` returns when `stop` is set."""

    def __init__(self, config: ServerConfig, reporter: Reporter, on_ready: Callable[[ReadyServer], None]) -> None:
        self._config, self._reporter, self._on_ready = config, reporter, on_ready
        peers = config.token.peers if config.token is not None else config.initial_peers
        self._network_config = NetworkConfig(
            initial_peers=peers,
            host=config.host,
            port=config.port,
            public_ip=config.public_ip,
            identity=config.identity or new_identity(),
        )
        if config.swarm is not None:
            self.swarm = check_swarm_name(config.swarm)
        else:
            self.swarm = config.token.swarm if config.token is not None else swarm_name_for(config.model)
        self._block_hashes: dict[int, str] = {}
        self._network: Network | None = None
        self._info: Any = None  # ServerInfo, once the blocks are chosen
        self._emulated = EmulatedDevice(config.emulate) if config.emulate is not None else None

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop`; raises GeoPetalsError when the server cannot start."""
        if self._config.threads is not None:
            torch.set_num_threads(self._config.threads)
        self._compute = ComputeThread(asyncio.get_running_loop())
        try:
            if await _unless(stop, self._prepare()):
                while not stop.is_set():
                    await self._serve(stop)
        finally:
            if self._network is not None:
                await self._leave(self._network)
            self._compute.stop()

    def close(self) -> bool:
        """Wait a little for the compute thread; False if it still computes."""
        return self._compute.join(timeout_s=1.0)

    # -- loading -------------------------------------------------------------------------------------------------------

    async def _prepare(self) -> None:
        self._checkpoint = await self._compute.run(self._open_checkpoint)
        self._network = await Network.start(self._network_config)
        await self._load(self._network)

    def _open_checkpoint(self) -> Checkpoint:
        checkpoint = Checkpoint.open(self._config.model, revision=self._config.revision, reporter=self._reporter)
        self._identity = checkpoint.identity()
        if self._config.token is not None:
            check_token(self._config.token, checkpoint)
        self._device = devices.choose_device(self._config.device)
        self._dtype = devices.choose_dtype(self._config.dtype, self._device, getattr(checkpoint.config, "dtype", None))
        return checkpoint

    async def _load(self, network: Network) -> None:
        checkpoint = self._checkpoint
        servers = await read_servers(network.node, self.swarm, checkpoint.num_blocks)
        servers = check_same_model(self._identity, servers)
        self._kv_tokens = self._config.kv_cache_tokens or default_kv_tokens(checkpoint.config)
        memory_bytes = self._config.memory_bytes or self._usable_memory()
        block_bytes = await self._compute.run(
            lambda: measured_block_bytes(
                checkpoint, dtype=self._dtype, device=self._device, quantization=self._config.quantization
            )
        )
        self._start, self._end = choose_blocks(
            checkpoint,
            servers,
            block_bytes=block_bytes,
            wanted=self._config.blocks,
            count=self._config.count,
            dtype=self._dtype,
            memory_bytes=memory_bytes,
            kv_tokens=self._kv_tokens,
        )
        self._info = ServerInfo(
            state=ServerState.JOINING,
            throughput=0.0,
            start_block=self._start,
            end_block=self._end,
            public_name=self._config.name,
            version=PETALS_VERSION,
            torch_dtype=str(self._dtype).removeprefix("torch."),
            quant_type=self._config.quantization or stored_quantization(checkpoint.config) or "none",
            using_relay=False,
        )
        await self._announce(network)
        self._stage = await self._compute.run(self._load_stage, Priority.BATCH)
        servers = await read_servers(network.node, self.swarm, checkpoint.num_blocks)
        others = [server for server in servers if server.peer_id != network.peer_id]
        check_same_model(self._identity, others)
        require_same_weights(others, self._block_hashes)
        devices.check_fit(
            memory_bytes=memory_bytes,
            num_blocks=self._end - self._start,
            block_bytes=self._stage.memory_bytes // (self._end - self._start),
            kv_bytes_per_block=self._kv_tokens * self._stage.kv_bytes_per_token(),
        )
        speed = await self._compute.run(lambda: profile.measure(self._stage))
        self._info.throughput = speed.of_server(self._end - self._start)
        self._info.inference_rps, self._info.forward_rps = speed.inference_rps, speed.forward_rps
        self._budget = KVBudget(self._kv_tokens * (self._end - self._start))

    def _usable_memory(self) -> int:
        emulated = self._config.emulate.memory_bytes if self._config.emulate is not None else None
        return emulated or devices.usable_memory(self._device)

    def _load_stage(self) -> Stage:
        stage = load_stage(
            self._checkpoint,
            self._start,
            self._end,
            dtype=self._dtype,
            device=self._device,
            quantization=self._config.quantization,
            reporter=self._reporter,
        )
        size = self._checkpoint.block_bytes(self._dtype) * (self._end - self._start)
        with self._reporter.task(f"weights {self._start}:{self._end} hashed", total=size) as advance:
            for block in range(self._start, self._end):
                self._block_hashes[block] = self._checkpoint.block_hash(block)
                advance(size // (self._end - self._start))
        return emulate(stage, self._emulated) if self._emulated is not None else stage

    # -- serving -------------------------------------------------------------------------------------------------------

    async def _serve(self, stop: asyncio.Event) -> None:
        """Serve until `stop`, or until p2pd dies and another takes its place."""
        network = self._network
        assert network is not None
        handler = BlockHandler(self._stage, self._compute, self._budget, swarm=self.swarm, length_limit=self._kv_tokens)
        await handler.attach(network.p2p)
        self._info.state = ServerState.ONLINE
        await self._announce(network)
        addresses = await network.addresses()
        self._on_ready(self._ready(network, addresses))
        daemon = asyncio.create_task(network.p2p.wait_daemon())
        announcer = asyncio.create_task(self._keep_announcing(network))
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({daemon, stopped}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (daemon, announcer, stopped):
                task.cancel()
            await handler.close()
        if not stop.is_set():
            log.warning("p2pd.died server=%s", network.peer_id)
            self._reporter.line("p2pd died: joining the swarm again")
            self._network = None
            await network.stop()
            await _unless(stop, self._rejoin(addresses))

    async def _rejoin(self, addresses: tuple[str, ...]) -> None:
        self._network = await self._restart(addresses)

    async def _restart(self, addresses: tuple[str, ...]) -> Network:
        port = int(addresses[0].split("/tcp/")[1].split("/")[0])
        config = replace(self._network_config, port=port)
        for attempt in range(_MAX_RESTARTS_IN_A_ROW):
            try:
                return await Network.start(config)
            except NetworkError as error:
                log.warning("p2pd.restart_failed attempt=%d reason=%s", attempt, error)
                await asyncio.sleep(_RESTART_DELAY_S * 2**attempt)
        return await Network.start(replace(config, initial_peers=()))

    async def _keep_announcing(self, network: Network) -> None:
        while True:
            await asyncio.sleep(UPDATE_PERIOD_S)
            try:
                await self._announce(network)
            except Exception as error:  # noqa: BLE001 - the next round may succeed; a dead p2pd is noticed elsewhere
                log.warning("announce.failed reason=%r", error)

    async def _announce(self, network: Network) -> None:
        if self._info.state is ServerState.ONLINE:
            self._info.cache_tokens_left = 2 * self._budget.left  # PETALS counts keys and values of each block
        await announce(
            network.node,
            self.swarm,
            self._info,
            identity=self._identity,
            block_hashes=self._block_hashes,
            num_blocks=self._checkpoint.num_blocks,
            emulated=self._emulated.status() if self._emulated is not None else None,
        )

    async def _leave(self, network: Network) -> None:
        """Tell the swarm, so that nobody routes here until the record expires, and stop."""
        try:
            if self._info is not None:
                self._info.state = ServerState.OFFLINE
                async with asyncio.timeout(_FAREWELL_TIMEOUT_S):
                    await self._announce(network)
        except Exception as error:  # noqa: BLE001 - the record expires by itself; leaving goes on
            log.info("farewell.failed reason=%r", error)
        finally:
            await network.stop()

    def _ready(self, network: Network, addresses: tuple[str, ...]) -> ReadyServer:
        blocks = self._end - self._start
        return ReadyServer(
            peer_id=network.peer_id,
            p2pd_pid=network.p2p.daemon_pid,
            start=self._start,
            end=self._end,
            num_blocks=self._checkpoint.num_blocks,
            weights_bytes=self._stage.memory_bytes,
            kv_bytes=self._stage.kv_bytes_per_token() * self._kv_tokens * blocks,
            process_bytes=devices.process_memory_bytes(),
            token=self._join_token(addresses).encode(),
            emulated=self._config.emulate.to_dict() if self._config.emulate is not None else None,
        )

    def _join_token(self, addresses: tuple[str, ...]) -> JoinToken:
        peers = tuple(dict.fromkeys((*addresses, *self._network_config.initial_peers)))[:8]
        model = self._config.token.model if self._config.token is not None else self._config.model
        return JoinToken(swarm=self.swarm, model=model, identity=self._identity, peers=peers)


def check_token(token: JoinToken, checkpoint: Checkpoint) -> None:
    """Raises SwarmMismatch if the token's swarm serves another model than this checkpoint."""
    conflict = checkpoint.identity().conflict(token.identity)
    if conflict is not None:
        raise SwarmMismatch(f"the token is for a swarm of another model: {conflict}")


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Run `work` to its end (True), or drop it when `stop` is set first (False)."""
    task = asyncio.create_task(work)
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            return True
        return False
    finally:
        stopped.cancel()
        task.cancel()
        await asyncio.gather(task, stopped, return_exceptions=True)
