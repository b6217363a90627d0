"""One swarm with two GeoPETALS servers and two stock ones: every chain of two can be chosen."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hivemind.p2p import PeerID
from hivemind.proto import runtime_pb2
from hivemind.utils.serializer import MSGPackSerializer

from geopetals.client.runtime import LoopThread
from geopetals.join_token import JoinToken
from geopetals.swarm.local import LocalSwarm
from geopetals.swarm.network import Network, NetworkConfig
from geopetals.swarm.records import ServerRecord, read_servers
from geopetals.swarm.wire import HANDLER
from tests.interop.checkpoints import NUM_BLOCKS
from tests.interop.stock_processes import StockServer, wait_for

SPANS = [(0, 3), (3, NUM_BLOCKS)]
OURS, STOCK = "ours", "stock"
KV_CACHE_TOKENS = 8192
_ONLINE_TIMEOUT_S = 120.0
_FREED_TIMEOUT_S = 10.0


class Observer:
    """A peer of the swarm that only looks."""

    def __init__(self, peers: tuple[str, ...], prefix: str) -> None:
        self._prefix = prefix
        self._loop = LoopThread()
        self._network = self._loop.run(Network.start(NetworkConfig(initial_peers=peers, client_only=True)))

    def servers(self) -> list[ServerRecord]:
        return self._loop.run(read_servers(self._network.node, self._prefix, NUM_BLOCKS))

    def all_online(self, count: int) -> bool | None:
        return sum(server.is_online for server in self.servers()) == count or None

    def free_cache(self, peer_id: str) -> int:
        """Tokens that one block of a server still has room for, all blocks taken together."""
        return int(self._loop.run(self._info(peer_id))["cache_tokens_available"])

    def wait_for_free_cache(self, peer_id: str, tokens: int) -> None:
        what = f"{tokens} tokens of free cache on {peer_id}"
        wait_for(lambda: self.free_cache(peer_id) == tokens or None, what, _FREED_TIMEOUT_S)

    async def _info(self, peer_id: str) -> dict[str, Any]:
        answer = await self._network.p2p.call_protobuf_handler(
            PeerID.from_base58(peer_id), f"{HANDLER}.rpc_info", runtime_pb2.ExpertUID(), runtime_pb2.ExpertInfo
        )
        info: dict[str, Any] = MSGPackSerializer.loads(answer.serialized_info)
        return info

    def close(self) -> None:
        self._loop.run(self._network.stop())
        self._loop.stop()


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedSwarm:
    """`peer_ids` of the two servers of each kind, in the order of their blocks; so are the logs of the stock ones."""

    model: Path
    prefix: str
    peers: tuple[str, ...]
    peer_ids: dict[str, tuple[str, str]]
    stock_logs: tuple[Path, Path]
    observer: Observer

    def chain(self, kinds: tuple[str, str]) -> tuple[str, str]:
        """Peer ids of a chain: the first server is of the first kind, the second of the second."""
        return self.peer_ids[kinds[0]][0], self.peer_ids[kinds[1]][1]

    def client_options(self, kinds: tuple[str, str]) -> dict[str, Any]:
        """What from_pretrained() of either client library must be told to take this chain."""
        return {"initial_peers": self.peers, "dht_prefix": self.prefix, "allowed_servers": self.chain(kinds)}

    def stock_model(self, kinds: tuple[str, str], **options: Any) -> dict[str, Any]:
        """How the stock client names its model on this chain; `options` are more of PETALS' options."""
        return {"directory": str(self.model), "max_retries": 3, **self.client_options(kinds), **options}


@contextlib.contextmanager
def mixed_swarm(model: Path, *, prefix: str, founder: str, folder: Path, sockets: Path) -> Iterator[MixedSwarm]:
    """`founder` is the kind of the server that is there first and lets the others in."""
    with contextlib.ExitStack() as stack:

        def start_stock(number: int, peers: tuple[str, ...]) -> StockServer:
            server = StockServer(
                model, SPANS[number], prefix=prefix, peers=peers, folder=folder / f"server{number}", sockets=sockets
            )
            stack.callback(server.stop)
            return server

        def start_ours(**options: Any) -> LocalSwarm:
            local = LocalSwarm(str(model), swarm=prefix, kv_cache_tokens=KV_CACHE_TOKENS, **options)
            return stack.enter_context(local).start(spans=SPANS)

        peers: tuple[str, ...]
        if founder == OURS:
            ours = start_ours()
            peers = JoinToken.decode(ours.token).peers
            stock = [start_stock(0, peers), start_stock(1, peers)]
        else:
            first = start_stock(0, ())
            peers = (first.wait_address(),)
            stock = [first, start_stock(1, peers)]
            ours = start_ours(initial_peers=list(peers))
        for server in stock:
            server.wait_address()
        observer = Observer(peers, prefix)
        stack.callback(observer.close)
        wait_for(lambda: observer.all_online(4), "four servers online", _ONLINE_TIMEOUT_S)
        yield MixedSwarm(
            model=model,
            prefix=prefix,
            peers=peers,
            peer_ids={
                OURS: (ours.servers[0].peer_id, ours.servers[1].peer_id),
                STOCK: (stock[0].peer_id, stock[1].peer_id),
            },
            stock_logs=(stock[0].log, stock[1].log),
            observer=observer,
        )
