"""Hostile peers talk to live servers for a while: the servers live on as before, and others do not notice."""

import asyncio
import contextlib
import os
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hivemind.p2p import PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError, P2PHandlerError
from hivemind.proto import runtime_pb2
from transformers import PreTrainedModel

from geopetals import metrics
from geopetals.client.connection import UNREACHABLE
from geopetals.client.hop import HopSession
from geopetals.errors import GeoPetalsError
from geopetals.join_token import JoinToken
from geopetals.swarm.local import LocalServer, LocalSwarm
from geopetals.swarm.network import Network, NetworkConfig
from geopetals.swarm.wire import HANDLER, WireError, read_message
from tests.live.commands import is_alive, wait_for
from tests.live.conftest import Connect
from tests.live.free_cache import wait_all_free
from tests.live.hostile import Conversation, Hostile, ends
from tests.models import VOCABULARY

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]

SEED, MESSAGES, PEERS, AT_ONCE = 7, 2400, 3, 4
DEADLINE_S = 30.0
GROWTH_BYTES = 96 * 2**20  # what allocators keep after messages of megabytes
SPANS = [(0, 3), (3, 6)]


@pytest.fixture
def target(llama: Path, tmp_path: Path) -> Iterator[tuple[LocalSwarm, Path]]:
    """Two servers, and the file of all that they complain about."""
    complaints = tmp_path / "stderr"
    ours = os.dup(2)
    with contextlib.ExitStack() as stack:
        with complaints.open("w") as file:
            os.dup2(file.fileno(), 2)
            try:
                swarm = stack.enter_context(LocalSwarm(str(llama)))
            finally:
                os.dup2(ours, 2)
                os.close(ours)
        yield swarm.start(spans=SPANS), complaints


class GoodSession:
    """Generates again and again, in a thread, and keeps what differs from the local model's tokens."""

    def __init__(self, model: Any, local: PreTrainedModel) -> None:
        self._model = model
        self._ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
        self._options: dict[str, Any] = {"max_new_tokens": 60, "min_new_tokens": 60, "do_sample": False}
        self._expected = local.generate(self._ids, attention_mask=torch.ones_like(self._ids), **self._options)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.answers = 0
        self.wrong: list[Any] = []
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join(DEADLINE_S * 2)
        assert not self._thread.is_alive(), "the good session hangs"

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                found = self._model.generate(self._ids, attention_mask=torch.ones_like(self._ids), **self._options)
                if not torch.equal(found, self._expected):
                    self.wrong.append(found)
            except Exception as error:  # noqa: BLE001 - told by the test
                self.wrong.append(error)
            self.answers += 1


class Attack:
    """Peers that say what they should not. `told` is what the servers answered."""

    def __init__(self, token: str, servers: list[LocalServer], names: list[str]) -> None:
        self._token, self._servers = JoinToken.decode(token), servers
        self._names = names
        self.sent = 0
        self.told: Counter[str] = Counter()

    async def run(self) -> None:
        config = NetworkConfig(initial_peers=self._token.peers, client_only=True)
        networks = [await Network.start(config) for _ in range(PEERS)]
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(PEERS * AT_ONCE):
                    group.create_task(self._talk(networks[number % PEERS], SEED * 1000 + number))
        finally:
            for network in networks:
                await network.stop()

    async def _talk(self, network: Network, seed: int) -> None:
        server = self._servers[seed % len(self._servers)]
        peer_ids = [network.peer_id, *(each.peer_id for each in self._servers), "12D3KooWnobody"]
        blocks = range(server.start, server.end)
        hostile = Hostile(seed, swarm=self._token.swarm, blocks=blocks, hidden=64, names=self._names, peers=peer_ids)
        peer = PeerID.from_base58(server.peer_id)
        while self.sent < MESSAGES:
            async with asyncio.timeout(DEADLINE_S):
                if hostile.random.random() < 0.35:
                    await self._call(network, peer, *hostile.call(), cancel=hostile.random.random() < 0.1)
                else:
                    await self._converse(network, peer, hostile.conversation())

    async def _call(self, network: Network, peer: PeerID, name: str, data: bytes, *, cancel: bool) -> None:
        self.sent += 1
        call = asyncio.create_task(network.p2p._client.call_unary_handler(peer, f"{HANDLER}.{name}", data))
        if cancel:
            await asyncio.sleep(0.002)
            call.cancel()
        try:
            await call
            self.told["an answer"] += 1
        except (P2PHandlerError, P2PDaemonError) as error:
            self.told[str(error)] += 1
        except asyncio.CancelledError:
            self.told["cancelled"] += 1

    async def _converse(self, network: Network, peer: PeerID, conversation: Conversation) -> None:
        _, reader, writer = await network.p2p.call_binary_stream_handler(peer, conversation.stream)
        try:
            for message in conversation.messages:
                self.sent += 1
                writer.write(message)
                await writer.drain()
            if conversation.waits:
                writer.write(b"".join(ends()))
                while await read_message(reader, runtime_pb2.ExpertResponse, peer="server") is not None:
                    self.told["an answer"] += 1
        except UNREACHABLE:
            self.told["the end"] += 1
        except (WireError, GeoPetalsError) as error:
            self.told[f"{type(error).__name__}: {error}"] += 1
        finally:
            writer.close()


def footprint(servers: list[LocalServer]) -> list[tuple[int, int, int]]:
    """Descriptors, threads and processes of each server."""
    found = []
    for server in servers:
        process = psutil.Process(server.pid)
        found.append((process.num_fds(), process.num_threads(), len(process.children(recursive=True))))
    return found


def wait_no_more(servers: list[LocalServer], before: list[tuple[int, int, int]], *, timeout_s: float) -> None:
    """Until no server has more of anything than `before`."""

    def no_more() -> bool:
        pairs = zip(footprint(servers), before, strict=True)
        return all(now <= was for each in pairs for now, was in zip(*each, strict=True))

    wait_for(no_more, timeout_s=timeout_s, what=lambda: f"{before} at most, there is {footprint(servers)}")


def memory(servers: list[LocalServer]) -> list[int]:
    return [psutil.Process(server.pid).memory_info().rss for server in servers]


def failovers() -> float:
    return sum(
        sample.value for sample in next(iter(metrics.FAILOVERS.collect())).samples if sample.name.endswith("_total")
    )


def test_nobody_notices_hostile_peers(
    target: tuple[LocalSwarm, Path],
    llama: Path,
    local: PreTrainedModel,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    swarm, complaints = target
    servers = swarm.servers
    model = connect(llama, join=swarm.token)
    names: list[str] = []
    open_hop = HopSession.open

    async def note_name(*arguments: Any, session_id: str, **options: Any) -> HopSession:
        names.append(session_id)
        return await open_hop(*arguments, session_id=session_id, **options)

    monkeypatch.setattr(HopSession, "open", note_name)
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2)
    wait_all_free(model, servers, timeout_s=30)
    before, memory_before, failed = footprint(servers), memory(servers), failovers()
    good, attack = GoodSession(model, local), Attack(swarm.token, servers, names)
    try:
        asyncio.run(attack.run())
    finally:
        good.stop()
    assert len(attack.told) > 50, attack.told
    assert attack.sent >= 2000
    assert good.answers > 0
    assert not good.wrong
    assert failovers() == failed, "the good session was disturbed"
    assert [server.number for server in swarm.servers] == [server.number for server in servers]
    assert all(is_alive(pid) for server in servers for pid in (server.pid, server.p2pd_pid))
    assert not [text for text in attack.told if "internal error" in text or "dial" in text]
    assert "Traceback" not in complaints.read_text(), complaints.read_text()[-5000:]
    wait_all_free(model, servers, timeout_s=30)
    wait_no_more(servers, before, timeout_s=30)
    growth = [after - was for after, was in zip(memory(servers), memory_before, strict=True)]
    assert max(growth) < GROWTH_BYTES, growth
