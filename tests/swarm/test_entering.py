"""Where a server takes its place."""

import asyncio
import random

import pytest
from hivemind.utils.timed_storage import get_dht_time

from geopetals.errors import NetworkError
from geopetals.join_token import CoordinatorAddress, JoinToken
from geopetals.swarm import reachability, relay_records
from geopetals.swarm.entering import Entrance, Nat, default_host
from geopetals.swarm.identity import ModelIdentity
from geopetals.swarm.network import Network, NetworkConfig
from geopetals.swarm.reachability import Lost, Reachability, relay_of, verdict, wait_lost
from tests.swarm.test_network import UNKNOWN_PEER

IDENTITY = ModelIdentity(model="m", config_hash="0" * 64, revision=None, fingerprint=None)
RELAY = f"/ip4/198.51.100.7/tcp/31331/p2p/{UNKNOWN_PEER}"


def test_on_loopback_nothing_is_asked() -> None:
    async def scenario() -> None:
        network = await Entrance(config=NetworkConfig()).enter()
        try:
            assert not network.is_relayed
            assert network.config.metrics_port is None
        finally:
            await network.stop()

    asyncio.run(scenario())


def test_p2pd_tells_what_it_knows_of_its_reachability() -> None:
    async def scenario() -> None:
        network = await Network.start(NetworkConfig(metrics_port=0))
        try:
            assert await verdict(network) is Reachability.UNKNOWN
        finally:
            await network.stop()
        assert await verdict(network) is Reachability.UNKNOWN  # nobody answers any more

    asyncio.run(scenario())


def test_behind_nat_without_a_relay_says_what_to_do() -> None:
    async def scenario() -> None:
        first = await Network.start(NetworkConfig())
        try:
            config = NetworkConfig(initial_peers=await first.addresses())
            with pytest.raises(NetworkError, match="geopetals relay"):
                await Entrance(config=config, nat=Nat.YES).enter()
        finally:
            await first.stop()

    asyncio.run(scenario())


def test_a_network_is_entered_again_at_its_port_though_its_first_peers_are_gone() -> None:
    async def scenario() -> None:
        first = await Network.start(NetworkConfig())
        entrance = Entrance(config=NetworkConfig(initial_peers=await first.addresses()))
        network = await entrance.enter()
        before = await network.addresses()
        await network.stop()
        again = await entrance.enter_again(network, Lost.DAEMON)
        try:
            assert [address.split("/p2p/")[0] for address in await again.addresses()] == [
                address.split("/p2p/")[0] for address in before
            ]
        finally:
            await again.stop()
            await first.stop()

    asyncio.run(scenario())


def test_a_server_listens_on_loopback_unless_its_coordinator_is_elsewhere() -> None:
    def token(*addresses: str) -> JoinToken:
        coordinator = CoordinatorAddress(peer_id=UNKNOWN_PEER, addresses=addresses)
        return JoinToken(swarm="s", model="m", identity=IDENTITY, peers=addresses, coordinator=coordinator)

    here, there = (f"/ip4/{host}/tcp/31330/p2p/{UNKNOWN_PEER}" for host in ("127.0.0.1", "198.51.100.7"))
    without = JoinToken(swarm="s", model="m", identity=IDENTITY, peers=(there,))
    assert default_host(None) == default_host(without) == default_host(token(here)) == "127.0.0.1"
    assert default_host(token(there)) == default_host(token(here, there)) == "0.0.0.0"


def test_the_relay_of_an_address() -> None:
    assert relay_of(f"{RELAY}/p2p-circuit/p2p/{UNKNOWN_PEER[::-1]}") == UNKNOWN_PEER
    assert relay_of(f"{RELAY}/p2p-circuit") == UNKNOWN_PEER
    assert relay_of(RELAY) == ""


@pytest.mark.parametrize(
    "value",
    [
        None,
        RELAY,
        [1],
        [f"{RELAY}/p2p-circuit/p2p/{UNKNOWN_PEER}"],
        [RELAY.replace(UNKNOWN_PEER, UNKNOWN_PEER[::-1])],
        [f"/ip4/1.2.3.4/tcp/1,{RELAY}"],
        ["/" + "x" * 400 + RELAY],
    ],
)
def test_malformed_records_of_relays_are_passed_over(value: object) -> None:
    assert relay_records._addresses(UNKNOWN_PEER, value) == []
    assert relay_records._addresses(UNKNOWN_PEER, [RELAY]) == [RELAY]


def test_at_most_four_relays_are_read() -> None:
    async def scenario() -> None:
        network = await Network.start(NetworkConfig())
        try:
            assert await relay_records.read(network.node, random.Random(0)) == ()
            for number in range(6):
                peer = f"peer{number}"
                await network.node.store(
                    relay_records.KEY,
                    subkey=peer,
                    value=[f"/ip4/198.51.100.{number}/tcp/1/p2p/{peer}"],
                    expiration_time=get_dht_time() + 60,
                )
            assert len(await relay_records.read(network.node, random.Random(0))) == 4
        finally:
            await network.stop()

    asyncio.run(scenario())


def test_a_server_that_cannot_be_dialled_goes_behind_a_relay_once_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoNAT needs public addresses: tests/live has them, here its verdict is given."""

    async def private(network: Network) -> Reachability:
        return Reachability.PRIVATE

    monkeypatch.setattr(reachability, "verdict", private)
    monkeypatch.setattr(reachability, "_VERDICT_PERIOD_S", 0.01)

    async def scenario() -> None:
        network = await Network.start(NetworkConfig(metrics_port=0))
        try:
            waiting = asyncio.create_task(wait_lost(network))
            done, _ = await asyncio.wait([waiting], timeout=0.5)
            assert not done
            value = [RELAY]
            await network.node.store(relay_records.KEY, value, get_dht_time() + 60, subkey=UNKNOWN_PEER)
            async with asyncio.timeout(30):
                assert await waiting is Lost.NAT
        finally:
            await network.stop()

    asyncio.run(scenario())
