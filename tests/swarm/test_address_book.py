"""Whom peers dial by what others say of themselves; in a net that libp2p ignores: tests/live/test_reserved_net.py."""

import asyncio
import ipaddress
from typing import Any

import pytest
from hivemind.utils.timed_storage import get_dht_time

from geopetals.swarm import address_book
from geopetals.swarm.address_book import AddressBook, dialable
from geopetals.swarm.circuits import drop
from geopetals.swarm.network import Network, NetworkConfig, lone_p2pd, peer_id_of
from geopetals.swarm.relay_protocol import ping
from geopetals.swarm.relay_records import found_under
from tests.swarm.test_network import UNKNOWN_PEER, network

PEER = f"/p2p/{UNKNOWN_PEER}"
PUBLIC = f"/ip4/20.1.2.3/tcp/31331{PEER}"
RELAYED = f"/ip4/20.1.2.3/tcp/31331{PEER}/p2p-circuit{PEER}"
NOT_FOUND = Exception("Connect failed. msg=routing: not found")


def test_public_addresses_are_dialled_also_over_relays() -> None:
    spoken = [PUBLIC, f"/ip6/2600::1/tcp/1{PEER}", RELAYED]
    assert dialable(spoken, UNKNOWN_PEER) == tuple(spoken)
    assert dialable([PUBLIC] * 9, UNKNOWN_PEER) == (PUBLIC,) * 4


@pytest.mark.parametrize(
    "value",
    [
        None,
        PUBLIC,
        {"a": PUBLIC},
        [None],
        [PUBLIC.encode()],
        [PUBLIC + "\n"],
        [PUBLIC.replace(UNKNOWN_PEER, UNKNOWN_PEER[::-1])],
        [f"/ip4/20.1.2.3/tcp/31331{PEER}/p2p-circuit/p2p/{UNKNOWN_PEER[::-1]}"],
        [RELAYED.removesuffix(PEER)],
        [RELAYED + f"/p2p-circuit{PEER}"],
        [PUBLIC.removesuffix(PEER)],
        [PUBLIC.replace("31331", "65536")],
        [PUBLIC.replace("31331", "0")],
        [PUBLIC.replace("31331", "٣١")],
        [PUBLIC.replace("20.1.2.3", "20.1.2.3.4")],
        [PUBLIC.replace("ip4", "ip6")],
        [PUBLIC.replace("tcp", "udp")],
        [PUBLIC.replace("/tcp/31331", "/tcp/31331/ws")],
        [PUBLIC.replace("ip4/20.1.2.3", "dns4/localhost")],
        [PUBLIC.replace("ip4/20.1.2.3", "unix/tmp.sock")],
        [f"{PUBLIC},{PUBLIC}"],
        ["/" * 10_000],
    ],
)
def test_what_is_no_address_of_the_peer_is_passed_over(value: Any) -> None:
    assert dialable(value, UNKNOWN_PEER) == ()


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "0.0.0.0",
        "10.255.255.1",
        "192.168.255.1",
        "169.254.169.254",
        "100.64.0.1",
        "224.0.0.1",
        "203.0.113.9",
    ],
)
def test_nobody_makes_others_dial_into_their_networks(host: str) -> None:
    for address in (PUBLIC, RELAYED):
        assert dialable([address.replace("20.1.2.3", host)], UNKNOWN_PEER) == ()
    assert dialable([f"/ip6/::ffff:{host}/tcp/1{PEER}"], UNKNOWN_PEER) == ()


@pytest.mark.parametrize("host", ["::", "::1", "fe80::1", "fd00::1234", "ff02::1", "fe80::1%1"])
def test_nor_by_ipv6(host: str) -> None:
    assert dialable([f"/ip6/{host}/tcp/1{PEER}"], UNKNOWN_PEER) == ()


def test_an_address_of_this_machine_is_dialled() -> None:
    assert address_book._is_on_this_machine(ipaddress.ip_address("127.0.0.1"))
    assert not address_book._is_on_this_machine(ipaddress.ip_address("203.0.113.9"))


@pytest.fixture
def loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses on loopback count as good."""
    monkeypatch.setattr(address_book, "_is_for_others", lambda address: True)
    monkeypatch.setattr(address_book, "_is_dialable", lambda address, peer_id: True)


@pytest.mark.usefixtures("loopback")
def test_a_peer_that_p2pd_does_not_find_is_dialled_where_it_says_it_is() -> None:
    async def scenario() -> None:
        async with asyncio.timeout(60), network() as server, lone_p2pd(NetworkConfig(client_only=True)) as asking:
            await _announced(server)
            sought, book = peer_id_of(server.peer_id), AddressBook(asking, server.node, ())
            assert not await ping(asking, server.peer_id, timeout_s=5)
            assert await asyncio.gather(*(book.reconnect(sought, NOT_FOUND) for _ in range(3))) == [True] * 3
            assert await ping(asking, server.peer_id, timeout_s=5)
            await drop(asking, server.peer_id)
            asking.book = AddressBook(asking, server.node, await server.addresses())
            assert await ping(asking, server.peer_id, timeout_s=5)

    asyncio.run(scenario())


async def _announced(peer: Network) -> None:
    while True:
        if await found_under(peer.node, f"_geopetals.addresses.{peer.peer_id}", timeout_s=5):
            return
        await asyncio.sleep(0.05)


def test_other_errors_and_peers_without_a_record_are_left_to_p2pd() -> None:
    async def scenario() -> None:
        async with asyncio.timeout(30), network() as first:
            unknown, book = peer_id_of(UNKNOWN_PEER), first._book
            assert not await book.reconnect(unknown, Exception("protocols not supported"))
            assert not await book.reconnect(unknown, Exception("failed to dial: connection refused"))
            assert book._tried == {}
            assert not await book.reconnect(unknown, NOT_FOUND)
            ((_, trying),) = book._tried.values()
            assert not await book.reconnect(unknown, NOT_FOUND)
            assert [tried for _, tried in book._tried.values()] == [trying]  # not asked again at once

    asyncio.run(scenario())


@pytest.mark.usefixtures("loopback")
def test_a_record_of_another_peer_says_nothing() -> None:
    async def scenario() -> None:
        async with asyncio.timeout(30):
            first = await Network.start(NetworkConfig())
            try:
                key, said = f"_geopetals.addresses.{UNKNOWN_PEER}", list(await first.addresses())
                await first.node.store(key, said, get_dht_time() + 60, subkey="someone else")
                assert not await first._book.reconnect(peer_id_of(UNKNOWN_PEER), NOT_FOUND)
            finally:
                await first.stop()

    asyncio.run(scenario())
