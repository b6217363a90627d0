import asyncio
import dataclasses
import math
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hivemind.dht import DHTNode
from hivemind.utils.timed_storage import get_dht_time

from geopetals.errors import SwarmMismatch
from geopetals.swarm.identity import ModelIdentity
from geopetals.swarm.network import Network, NetworkConfig
from geopetals.swarm.records import (
    ServerRecord,
    announce,
    block_uids,
    check_same_model,
    read_servers,
    require_same_weights,
)
from geopetals.swarm.ring_messages import VERSION
from geopetals.swarm.stack import ServerInfo, ServerState

SWARM, NUM_BLOCKS = "tiny", 6
HASH, OTHER = "a" * 64, "b" * 64
STRANGER = "12D3KooWAkxmPQg8FgoTvy7Wi2hWbjBJYuFBQ1q2JX7oxEkXb4jD"


def identity(**change: Any) -> ModelIdentity:
    fields = {"model": "tiny", "config_hash": HASH, "revision": None, "fingerprint": HASH}
    return ModelIdentity(**{**fields, **change})


def info(start: int = 1, end: int = 4, **change: Any) -> ServerInfo:
    fields = {"state": ServerState.ONLINE, "throughput": 12.5, "start_block": start, "end_block": end}
    return ServerInfo(**{**fields, **change})


def record(peer_id: str = STRANGER, **change: Any) -> ServerRecord:
    fields = {"peer_id": peer_id, "start": 0, "end": 3, "state": ServerState.ONLINE, "throughput": 1.0}
    return ServerRecord(**{**fields, **change})


def in_dht(scenario: Callable[[Network], Awaitable[None]]) -> None:
    async def main() -> None:
        network = await Network.start(NetworkConfig())
        try:
            await scenario(network)
        finally:
            await network.stop()

    asyncio.run(main())


async def publish(network: Network, server: ServerInfo, hashes: dict[int, str] | None = None) -> None:
    await announce(network.node, SWARM, server, identity=identity(), block_hashes=hashes or {}, num_blocks=NUM_BLOCKS)


async def store(node: DHTNode, block: int, subkey: object, value: object) -> None:
    expiration = get_dht_time() + 60
    assert await node.store(f"{SWARM}.{block}", subkey=subkey, value=value, expiration_time=expiration)


async def read(network: Network) -> list[ServerRecord]:
    async with asyncio.timeout(5):
        return await read_servers(network.node, SWARM, NUM_BLOCKS)


def test_what_is_announced_can_be_read() -> None:
    async def scenario(network: Network) -> None:
        hashes = {1: HASH, 2: OTHER, 5: HASH}
        await publish(
            network, info(public_name="me", version="1", inference_rps=30.0, cache_tokens_left=2 * 3 * 100), hashes
        )
        (found,) = await read(network)
        assert found == ServerRecord(
            peer_id=network.peer_id,
            start=1,
            end=4,
            state=ServerState.ONLINE,
            throughput=12.5,
            name="me",
            version="1",
            inference_rps=30.0,
            cache_tokens_left=100,
            identity=identity(),
            block_hashes={1: HASH, 2: OTHER},
            protocol=VERSION,
        )
        assert found.is_online

    in_dht(scenario)


def test_a_later_announcement_replaces_the_earlier_one() -> None:
    async def scenario(network: Network) -> None:
        await publish(network, info(state=ServerState.JOINING))
        (joining,) = await read(network)
        assert not joining.is_online
        await publish(network, info())
        (online,) = await read(network)
        assert online.is_online
        await publish(network, info(state=ServerState.OFFLINE))
        (offline,) = await read(network)
        assert not offline.is_online

    in_dht(scenario)


@pytest.mark.parametrize("spans", [((0, 3), (2, 5)), ((3, 6), (1, 4)), ((0, 2), (4, 6))])
def test_a_server_that_has_moved_is_where_it_is_now(spans: tuple[tuple[int, int], tuple[int, int]]) -> None:
    async def scenario(network: Network) -> None:
        before, after = spans
        await publish(network, info(*before), dict.fromkeys(range(*before), HASH))
        await publish(network, info(*before, state=ServerState.OFFLINE))
        await publish(network, info(*after), dict.fromkeys(range(*after), OTHER))
        (found,) = await read(network)
        assert ((found.start, found.end), found.state) == (after, ServerState.ONLINE)
        assert found.block_hashes == dict.fromkeys(range(*after), OTHER)

    in_dht(scenario)


def test_stock_petals_reads_our_records() -> None:
    async def scenario(network: Network) -> None:
        await publish(network, info(inference_rps=30.0), {1: HASH})
        found = await network.node.get_many(block_uids(SWARM, 1, 4), sufficient_expiration_time=math.inf)
        for entry in found.values():
            (value,) = entry.value.values()
            stock = ServerInfo.from_tuple(value.value)
            assert (stock.start_block, stock.end_block, stock.inference_rps) == (1, 4, 30.0)
        models = await network.node.get("_petals.models")
        assert models.value[SWARM].value["num_blocks"] == NUM_BLOCKS

    in_dht(scenario)


def test_we_read_records_of_stock_petals() -> None:
    async def scenario(network: Network) -> None:
        for block in range(2, 5):
            await store(network.node, block, STRANGER, info(2, 5).to_tuple())
        (found,) = await read(network)
        assert (found.peer_id, found.start, found.end, found.identity, found.block_hashes) == (STRANGER, 2, 5, None, {})

    in_dht(scenario)


def test_a_span_without_bounds_is_where_its_records_are() -> None:
    async def scenario(network: Network) -> None:
        for block in (2, 3):
            await store(network.node, block, STRANGER, (2, 1.0))
        (found,) = await read(network)
        assert (found.start, found.end) == (2, 4)

    in_dht(scenario)


def test_a_span_is_cut_to_the_model() -> None:
    async def scenario(network: Network) -> None:
        await store(network.node, 3, STRANGER, info(3, 10**9).to_tuple())
        (found,) = await read(network)
        assert (found.start, found.end) == (3, NUM_BLOCKS)

    in_dht(scenario)


GOOD = info(0, 2).to_tuple()
HOSTILE: dict[str, object] = {
    "nothing": None,
    "a number": 7,
    "text": "online",
    "bytes": b"\x80\x04.",
    "a map": {"state": 2},
    "too short": [2],
    "an unknown state": (9, 1.0),
    "a state of a wrong kind": ([], 1.0),
    "a negative throughput": (2, -1.0),
    "no throughput": (2, math.nan),
    "an infinite throughput": (2, math.inf),
    "additions that are no map": (2, 1.0, [1, 2]),
    "additions that are text": (2, 1.0, "abc"),
    "keys that are no text": (2, 1.0, {1: 2}),
    "a repeated field": (2, 1.0, {"state": 2}),
    "a span of text": (2, 1.0, {"start_block": "0", "end_block": "2"}),
    "a negative span": (2, 1.0, {"start_block": -1, "end_block": 2}),
    "a span backwards": (2, 1.0, {"start_block": 4, "end_block": 1}),
    "an empty span": (2, 1.0, {"start_block": 0, "end_block": 0}),
    "a span outside": (2, 1.0, {"start_block": 600, "end_block": 700}),
    "a negative speed": (2, 1.0, {**GOOD[2], "inference_rps": -1.0}),
}


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_malformed_record_hides_no_honest_one(value: object) -> None:
    async def scenario(network: Network) -> None:
        await publish(network, info(0, 2))
        await store(network.node, 0, STRANGER, value)
        assert [server.peer_id for server in await read(network)] == [network.peer_id]

    in_dht(scenario)


@pytest.mark.parametrize("subkey", ["0OIl", "", "é", 7, b"12D3"])
def test_who_is_no_peer_is_no_server(subkey: object) -> None:
    async def scenario(network: Network) -> None:
        await publish(network, info(0, 2))
        await store(network.node, 0, subkey, GOOD)
        assert [server.peer_id for server in await read(network)] == [network.peer_id]

    in_dht(scenario)


@pytest.mark.parametrize(
    "additions",
    [
        None,
        [],
        "text",
        {},
        {"identity": None},
        {"identity": {"model": "tiny"}},
        {"identity": {**identity().to_dict(), "config_hash": "x"}},
        {"identity": identity().to_dict() | {"extra": 1}},
        {"weights_sha256": 7},
        {"weights_sha256": {"a": 1}},
    ],
)
def test_additions_that_make_no_sense_are_passed_over(additions: object) -> None:
    async def scenario(network: Network) -> None:
        await store(network.node, 0, STRANGER, (2, 1.0, {"start_block": 0, "end_block": 2, "geopetals": additions}))
        (found,) = await read(network)
        assert (found.start, found.end, found.identity, found.block_hashes) == (0, 2, None, {})

    in_dht(scenario)


def test_unknown_keys_of_later_versions_are_passed_over() -> None:
    async def scenario(network: Network) -> None:
        additions = {"identity": identity().to_dict(), "version": "9", "load": {"cpu": 0.5}}
        await store(network.node, 0, STRANGER, (2, 1.0, {"future": [1], "geopetals": additions}))
        (found,) = await read(network)
        assert found.identity == identity()

    in_dht(scenario)


def test_a_plain_value_in_place_of_the_servers_is_passed_over() -> None:
    async def scenario(network: Network) -> None:
        await publish(network, info(1, 4))
        await network.node.store(f"{SWARM}.0", value="taken", expiration_time=get_dht_time() + 60)
        assert [server.start for server in await read(network)] == [1]

    in_dht(scenario)


def test_an_empty_swarm_has_no_servers() -> None:
    async def scenario(network: Network) -> None:
        assert await read(network) == []

    in_dht(scenario)


def test_the_same_model_is_no_mismatch() -> None:
    servers = [record(identity=identity(), block_hashes={0: HASH}), record(identity=None)]
    assert check_same_model(identity(), servers) == servers
    require_same_weights(servers, {0: HASH, 1: OTHER})


def test_single_strangers_are_passed_over() -> None:
    ours = record(identity=identity())
    stranger = dataclasses.replace(record(identity=identity(model="big", config_hash=OTHER)), peer_id="another")
    assert check_same_model(identity(), [stranger, ours]) == [ours]


def test_another_model_is_named_with_its_server() -> None:
    servers = [record(identity=identity(model="big", config_hash=OTHER))]
    with pytest.raises(SwarmMismatch, match=rf"{STRANGER[-6:]}.*big"):
        check_same_model(identity(), servers)


def test_other_weights_of_a_block_are_named() -> None:
    unknown = identity(fingerprint=None)
    servers = [record(identity=unknown), record(identity=unknown, block_hashes={2: HASH})]
    with pytest.raises(SwarmMismatch, match=r"block 2 has other weights .*load the same revision"):
        require_same_weights(servers, {2: OTHER})
    require_same_weights(servers, {1: OTHER})
