"""A swarm in this process with the real data plane: servers' handlers and the client's sessions, on one event loop.

Only libp2p is replaced, by pairs of sockets with a cable in between that can be cut or go silent.
"""

import asyncio
import contextlib
import hashlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hivemind.p2p import PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError
from hivemind.proto import runtime_pb2

from geopetals.client import opening as opening_module
from geopetals.client.model import AutoDistributedModelForCausalLM, DistributedModel
from geopetals.client.routing import Candidate
from geopetals.client.swarm import SwarmClient
from geopetals.swarm.compute import ComputeThread
from geopetals.swarm.handler import BlockHandler
from geopetals.swarm.kv_budget import KVBudget
from geopetals.swarm.ring_messages import KEY, PUSH_STREAM, VERSION
from geopetals.swarm.stage import Stage
from geopetals.swarm.wire import HANDLER, frame, read_message, read_metadata, write_metadata

KV_TOKENS = 4096
_INFERENCE = f"{HANDLER}.rpc_inference"
_ED25519 = bytes([0, 36, 8, 1, 18, 32])
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Cable:
    """Two ends of a stream. What is sent while it is `silent` never arrives."""

    def __init__(self, source: str, target: str, name: str) -> None:
        self.source, self.target, self.name = source, target, name
        self.silent = False
        self.bytes = 0
        self._pumps: list[asyncio.Task[None]] = []
        self._writers: list[asyncio.StreamWriter] = []

    async def plug(self) -> tuple[Streams, Streams]:
        ends = []
        inner = []
        for _ in range(2):
            ours, theirs = socket.socketpair()
            inner.append(await asyncio.open_unix_connection(sock=ours))
            ends.append(await asyncio.open_unix_connection(sock=theirs))
        self._writers = [writer for _, writer in inner]
        for (reader, _), (_, writer) in (inner, inner[::-1]):
            self._pumps.append(asyncio.create_task(self._pump(reader, writer)))
        return ends[0], ends[1]

    def cut(self) -> None:
        for pump in self._pumps:
            pump.cancel()
        for writer in self._writers:
            writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(2**16):
                if not self.silent:
                    self.bytes += len(data)
                    writer.write(data)
                    await writer.drain()
        writer.close()


class FakeP2P:
    """One peer's libp2p."""

    def __init__(self, net: "Net", name: str) -> None:
        self.net, self.name = net, name
        self.peer_id = PeerID(_ED25519 + hashlib.sha256(name.encode()).digest())
        self.streams: dict[str, Any] = {}

    async def add_binary_stream_handler(self, name: str, function: Any) -> None:
        self.streams[name] = function

    async def add_protobuf_handler(self, name: str, function: Any, kind: Any, **_: Any) -> None:
        return None

    async def call_binary_stream_handler(self, peer_id: PeerID, name: str) -> tuple[Any, Any, Any]:
        target = self.net.peers.get(peer_id.to_base58())
        if target is None or target.name in self.net.down:
            raise P2PDaemonError("failed to dial")
        if name not in target.p2p.streams or (name == PUSH_STREAM and target.name in self.net.without_push):
            raise P2PDaemonError("protocols not supported")
        cable = Cable(self.name, target.name, name)
        self.net.cables.append(cable)
        ours, theirs = await cable.plug()
        info = SimpleNamespace(peer_id=self.peer_id)
        task = asyncio.create_task(target.p2p.streams[name](info, *theirs))
        target.tasks.append(task)
        return info, *ours


class Peer:
    """A server: a stage with its handler."""

    def __init__(self, net: "Net", name: str, stage: Stage, compute: ComputeThread) -> None:
        self.name, self.stage = name, stage
        self.compute = compute
        self.budget = KVBudget(KV_TOKENS * (stage.end - stage.start))
        self.handler = BlockHandler(stage, compute, self.budget, swarm=net.swarm, length_limit=KV_TOKENS)
        self.p2p = FakeP2P(net, name)
        self.tasks: list[asyncio.Task[None]] = []

    @property
    def peer_id(self) -> str:
        return str(self.p2p.peer_id.to_base58())


@dataclass
class Net:
    """Servers by name, earlier ones cheaper.

    Those in `down` cannot be reached, those in `without_push` take no pushes, those in `stock` speak PETALS alone.
    """

    stages: dict[str, Stage]
    swarm: str = "llama"
    down: set[str] = field(default_factory=set)
    without_push: set[str] = field(default_factory=set)
    stock: set[str] = field(default_factory=set)
    peers: dict[str, Peer] = field(default_factory=dict)
    cables: list[Cable] = field(default_factory=list)

    def __getitem__(self, name: str) -> Peer:
        return next(peer for peer in self.peers.values() if peer.name == name)

    async def start(self) -> None:
        for name, stage in self.stages.items():
            peer = Peer(self, name, stage, ComputeThread(asyncio.get_running_loop()))
            await peer.handler.attach(peer.p2p)  # type: ignore[arg-type]
            if name in self.stock:
                peer.p2p.streams = {_INFERENCE: _as_stock(peer.p2p.streams[_INFERENCE])}
            self.peers[peer.peer_id] = peer

    async def stop(self) -> None:
        for peer in self.peers.values():
            await peer.handler.close()
            peer.compute.stop()
            await asyncio.gather(*peer.tasks, return_exceptions=True)
        for cable in self.cables:
            cable.cut()

    def candidates(self) -> list[Candidate]:
        return [
            Candidate(
                peer_id=peer.peer_id,
                start=peer.stage.start,
                end=peer.stage.end,
                rtt_s=10.0**number,
                block_s=0.01,
                protocol=0 if peer.name in self.stock else VERSION,
            )
            for number, peer in enumerate(self.peers.values())
            if peer.name not in self.down
        ]

    def cable(self, source: str, target: str) -> Cable:
        """The latest stream from one to the other; clients are called `client`."""
        return next(cable for cable in reversed(self.cables) if (cable.source, cable.target) == (source, target))

    def kill(self, name: str) -> None:
        """As SIGKILL does: nobody reaches it, its connections are reset."""
        self.down.add(name)
        for cable in self.cables:
            if name in (cable.source, cable.target):
                cable.cut()

    def stop_running(self, name: str) -> None:
        """As SIGSTOP does: its connections stay, nothing comes."""
        for cable in self.cables:
            if name in (cable.source, cable.target):
                cable.silent = True

    def is_free(self) -> bool:
        return all(peer.budget.used == 0 and peer.handler.num_sessions == 0 for peer in self.peers.values())


def _as_stock(serve: Any) -> Any:
    """A server that knows nothing of our extension: it never sees what asks for it."""

    async def serve_stock(info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = await read_message(reader, runtime_pb2.ExpertRequest, peer="")
        assert first is not None
        metadata = read_metadata(first.metadata)
        del metadata[KEY]
        first.metadata = write_metadata(metadata)
        rest = asyncio.StreamReader()
        rest.feed_data(frame(first))

        async def pump() -> None:
            while data := await reader.read(2**16):
                rest.feed_data(data)
            rest.feed_eof()

        pumping = asyncio.create_task(pump())
        try:
            await serve(info, rest, writer)
        finally:
            pumping.cancel()

    return serve_stock


class RingSwarm(SwarmClient):
    """A SwarmClient that knows the servers of a Net, and runs them on its own loop."""

    net: Net

    def start(self) -> None:
        self._refreshed_at = float("inf")
        self.run(self.net.start())
        self._p2p = FakeP2P(self.net, "client")

    def close(self) -> None:
        if self.net.peers:
            for chain in list(self._chains):
                self.call_soon(chain.abort)
            self.run(self.net.stop())
            self.net.peers.clear()
        super().close()

    @property
    def network(self) -> Any:
        return SimpleNamespace(p2p=self._p2p)

    async def refresh_async(self) -> None:
        return None

    def _candidates(self, *, last_resort: bool = False) -> list[Candidate]:
        return [server for server in self.net.candidates() if last_resort or server.peer_id not in self._avoided]

    def names(self, session: Any) -> list[str]:
        """The servers of a session's route."""
        return [self.net.peers[hop.peer_id].name for hop in session.route]


@contextlib.contextmanager
def ring_model(directory: Path, net: Net, **options: Any) -> Iterator[DistributedModel]:
    """`from_pretrained`, with this net for a swarm."""
    patience = {"min_backoff": 0.001, "max_backoff": 0.05, "recovery_timeout": 0.2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening_module, "SwarmClient", type("NetSwarm", (RingSwarm,), {"net": net}))
        defaults = {"initial_peers": ("/ip4/127.0.0.1/tcp/1/p2p/x",), "dht_prefix": net.swarm, **patience}
        model = AutoDistributedModelForCausalLM.from_pretrained(str(directory), **{**defaults, **options})
    try:
        yield model
    finally:
        model.close()
