"""Relays and what they grant, on loopback; servers behind emulated NATs are in tests/live/test_relay.py."""

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError

from geopetals.errors import NetworkError
from geopetals.progress import Silent
from geopetals.swarm import relay_records
from geopetals.swarm.address_book import AddressBook
from geopetals.swarm.circuits import drop, links
from geopetals.swarm.network import Network, NetworkConfig, lone_p2pd
from geopetals.swarm.p2pd_options import RelayLimits
from geopetals.swarm.reachability import Lost, wait_lost
from geopetals.swarm.relay import ReadyRelay, Relay
from geopetals.swarm.relay_check import granting
from geopetals.swarm.relay_protocol import Granted, _fields, ask_limits, can_reach, ping
from tests.swarm.test_network import UNKNOWN_PEER

LIMITS = RelayLimits(data_bytes=3_000_000, seconds=77)
DEADLINE_S = 60.0
# hivemind does not close its connections to a p2pd that has died.
left_open = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@asynccontextmanager
async def relay() -> AsyncIterator["asyncio.Queue[ReadyRelay]"]:
    """A running relay, and what it says each time that it is ready."""
    ready: asyncio.Queue[ReadyRelay] = asyncio.Queue()
    stop = asyncio.Event()
    config = NetworkConfig(relay_limits=LIMITS)
    running = asyncio.create_task(Relay(config, Silent(), ready.put_nowait).run(stop))
    try:
        yield ready
    finally:
        stop.set()
        await running


def test_a_relay_grants_what_it_was_told_to_and_is_known_in_the_dht() -> None:
    async def scenario() -> None:
        async with asyncio.timeout(DEADLINE_S), relay() as ready:
            said = await ready.get()
            assert said.limits == LIMITS
            client = await Network.start(NetworkConfig(initial_peers=said.addresses, client_only=True))
            try:
                granted = await ask_limits(client.p2p, said.peer_id, timeout_s=5)
                assert granted == Granted(data_bytes=3_000_000, seconds=77)
                assert await ping(client.p2p, said.peer_id, timeout_s=5)
                assert await links(client.p2p) == {said.peer_id: False}
                assert await relay_records.read(client.node, random.Random(0)) == said.addresses
            finally:
                await client.stop()

    asyncio.run(scenario())


@left_open
def test_a_relay_whose_p2pd_dies_is_there_again() -> None:
    async def scenario() -> None:
        async with asyncio.timeout(DEADLINE_S), relay() as ready:
            before = await ready.get()
            os.kill(before.p2pd_pid, signal.SIGKILL)
            after = await ready.get()
            assert (after.peer_id, after.addresses) == (before.peer_id, before.addresses)
            assert after.p2pd_pid != before.p2pd_pid

    asyncio.run(scenario())


def test_a_peer_that_is_not_there_does_not_answer() -> None:
    async def scenario() -> None:
        async with lone_p2pd(NetworkConfig()) as one, lone_p2pd(NetworkConfig()) as other:
            name = other.peer_id.to_base58()
            assert not await ping(one, name, timeout_s=2)
            with pytest.raises(NetworkError, match="cannot be asked"):
                await ask_limits(one, name, timeout_s=2)
            (address, *_) = await other.get_visible_maddrs()
            await one.connect(str(address))
            assert await ping(one, name, timeout_s=5)
            await drop(one, name)
            assert await links(one) == {}

    asyncio.run(scenario())


@left_open
def test_a_network_is_lost_when_its_p2pd_is() -> None:
    async def scenario() -> None:
        network = await Network.start(NetworkConfig())
        try:
            waiting = asyncio.create_task(wait_lost(network))
            os.kill(network.p2p.daemon_pid, signal.SIGKILL)
            async with asyncio.timeout(DEADLINE_S):
                assert await waiting is Lost.DAEMON
        finally:
            await network.stop()

    asyncio.run(scenario())


@pytest.mark.parametrize("data", [b"\x0a", b"\x0a\x05abc", b"\x0d1234", b"\x80"])
def test_an_answer_that_is_no_protobuf_is_refused(data: bytes) -> None:
    with pytest.raises(IndexError):
        list(_fields(data))


def test_fields_of_an_answer() -> None:
    assert list(_fields(b"\x08\x02\x22\x03\x08\xac\x02\x28\x64")) == [(1, 2), (4, b"\x08\xac\x02"), (5, 100)]


@asynccontextmanager
async def silent_peer() -> AsyncIterator[str]:
    """The address of one that takes connections and says nothing."""
    writers: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(lambda reader, writer: writers.append(writer), "127.0.0.1", 0)
    try:
        yield f"/ip4/127.0.0.1/tcp/{server.sockets[0].getsockname()[1]}/p2p/{UNKNOWN_PEER}"
    finally:
        server.close()
        for writer in writers:
            writer.close()


def test_only_who_grants_reservations_is_a_relay() -> None:
    """One of the others in p2pd's list would keep it from using the relay for three minutes."""

    async def scenario() -> None:
        async with asyncio.timeout(DEADLINE_S), relay() as ready:
            said = await ready.get()
            (address, *_) = said.addresses
            other_key = address.replace(said.peer_id, UNKNOWN_PEER)
            plain = await Network.start(NetworkConfig())
            try:
                async with silent_peer() as silent:
                    no_relays = [other_key, silent, "/ip4/127.0.0.1/tcp/1/p2p/x", "", *await plain.addresses()]
                    assert await granting([*no_relays, address, address]) == (address,)
                    assert await granting(no_relays) == ()
            finally:
                await plain.stop()

    asyncio.run(scenario())


def test_a_server_behind_nat_starts_with_a_silent_peer_and_a_relay() -> None:
    """p2pd's own bootstrap ends p2pd then, if autorelay was faster."""

    async def scenario() -> None:
        async with asyncio.timeout(DEADLINE_S), relay() as ready, silent_peer() as silent:
            said = await ready.get()
            network = await Network.start(NetworkConfig(initial_peers=(silent, *said.addresses), relays=said.addresses))
            try:
                assert await ping(network.p2p, said.peer_id, timeout_s=5)
            finally:
                await network.stop()

    asyncio.run(scenario())


def test_a_relay_knows_whom_it_reaches() -> None:
    async def scenario() -> None:
        async with asyncio.timeout(DEADLINE_S), relay() as ready:
            said = await ready.get()
            behind = NetworkConfig(initial_peers=said.addresses, relays=said.addresses)
            async with lone_p2pd(NetworkConfig(initial_peers=said.addresses, client_only=True)) as asking:
                assert not await can_reach(asking, said.peer_id, UNKNOWN_PEER, timeout_s=5)
                async with lone_p2pd(behind) as server:
                    name = server.peer_id.to_base58()
                    while True:  # until it has its reservation
                        if await can_reach(asking, said.peer_id, name, timeout_s=5):
                            break
                        await asyncio.sleep(0.05)
                    assert not await can_reach(asking, name, said.peer_id, timeout_s=1)
                    (address, *_) = said.addresses
                    book = AddressBook(asking, None, ())
                    assert not await book._dial(UNKNOWN_PEER, (f"{address}/p2p-circuit/p2p/{UNKNOWN_PEER}",))
                    assert await book._dial(name, (f"{address}/p2p-circuit/p2p/{name}",))
                    assert name in await links(asking)
                async with lone_p2pd(NetworkConfig(client_only=True)) as other:
                    with pytest.raises(P2PDaemonError, match="circuit"):  # it has gone, but the address was read
                        await other.connect(f"{address}/p2p-circuit/p2p/{name}")

    asyncio.run(scenario())
