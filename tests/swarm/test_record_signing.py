"""Records of closed swarms: what their DHT stores, what readers take, and what is refused from strangers and cheats."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord
from hivemind.utils.serializer import MSGPackSerializer
from hivemind.utils.timed_storage import get_dht_time

from geopetals.credentials.certificate import Role
from geopetals.credentials.peer_ids import peer_of_key
from geopetals.credentials.refusal import Refusal
from geopetals.credentials.trust import TrustSource
from geopetals.errors import NotAdmitted
from geopetals.swarm.network import Network, NetworkConfig, new_identity
from geopetals.swarm.record_signing import (
    MAX_LIFE_S,
    MAX_RECORD_BYTES,
    TRUST_LIFE_S,
    SignedRecords,
    _signing_key,
    trust_key,
)
from geopetals.swarm.records import announce, block_uids, read_servers
from geopetals.swarm.stack import ServerInfo, ServerState
from geopetals.swarm.trust_exchange import exchange_trust
from tests.issuing import BLOCKS, IDENTITY, NOW, SWARM, Clock, Issuer

KEY = DHTID.generate(source=f"{SWARM}.0").to_bytes()
TRUST = DHTID.generate(source=trust_key(SWARM)).to_bytes()
PAYLOAD = MSGPackSerializer.dumps({"state": 2})


class Writer:
    """A member's end of the DHT, or a cheat's, without a network."""

    def __init__(self, issuer: Issuer, trust: TrustSource, role: Role = Role.SERVER) -> None:
        identity = new_identity()
        key = _signing_key(identity)
        assert key is not None
        self.peer_id = peer_of_key(key.public)
        self.records = SignedRecords(trust, identity=identity, clock=issuer.clock)
        self.member = issuer.member(role, peer_id=self.peer_id)
        self.records.certificate = self.member.signed

    def record(self, **change: Any) -> DHTRecord:
        fields = {
            "key": KEY,
            "subkey": MSGPackSerializer.dumps(self.peer_id),
            "value": PAYLOAD,
            "expiration_time": NOW + 90,
        }
        record = DHTRecord(**{**fields, **change})
        return replace(record, value=self.records.sign_value(record))


class Scene:
    def __init__(self, folder: Path) -> None:
        self.issuer = Issuer(folder / "own")
        self.trust = self.issuer.trust_source()
        self.reader = SignedRecords(self.trust, clock=self.issuer.clock)
        self.writer = Writer(self.issuer, self.trust)
        stranger = Issuer(folder / "stranger")
        self.stranger = Writer(stranger, stranger.trust_source())

    def other(self, role: Role = Role.SERVER) -> Writer:
        return Writer(self.issuer, self.trust, role)

    def trust_record(self, data: bytes | None = None, **change: Any) -> DHTRecord:
        value = MSGPackSerializer.dumps(self.issuer.authority.signed_trust() if data is None else data)
        fields = {"key": TRUST, "subkey": DHTProtocol.IS_REGULAR_VALUE, "value": value}
        return DHTRecord(**{**fields, "expiration_time": NOW + TRUST_LIFE_S, **change})


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_a_members_own_record_is_taken_and_read_as_it_was_written(scene: Scene) -> None:
    record = scene.writer.record()
    assert not scene.reader.is_member(scene.writer.peer_id)
    assert scene.reader.validate(record)
    assert scene.reader.strip_value(record) == PAYLOAD
    assert scene.reader.is_member(scene.writer.peer_id)
    assert len(record.value) < len(PAYLOAD) + 300


ATTEMPTS: dict[str, tuple[Callable[[Scene], DHTRecord], Refusal]] = {
    "a plain record, as in stock PETALS": (
        lambda scene: replace(scene.writer.record(), value=PAYLOAD),
        Refusal.MISSING,
    ),
    "one value in the place of all records": (
        lambda scene: scene.writer.record(subkey=DHTProtocol.IS_REGULAR_VALUE),
        Refusal.MALFORMED,
    ),
    "under no peer's name": (
        lambda scene: scene.writer.record(subkey=MSGPackSerializer.dumps(17)),
        Refusal.MALFORMED,
    ),
    "under the name of an RSA key": (
        lambda scene: scene.writer.record(
            subkey=MSGPackSerializer.dumps("QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N")
        ),
        Refusal.MALFORMED,
    ),
    "under another member's name": (
        lambda scene: scene.writer.record(subkey=MSGPackSerializer.dumps(scene.other().peer_id)),
        Refusal.FORGED,
    ),
    "another's record with its writer's name": (
        lambda scene: replace(scene.other().record(), subkey=scene.writer.record().subkey),
        Refusal.FORGED,
    ),
    "under another key": (
        lambda scene: replace(scene.writer.record(), key=DHTID.generate(source="tiny.1").to_bytes()),
        Refusal.FORGED,
    ),
    "kept alive for longer": (
        lambda scene: replace(scene.writer.record(), expiration_time=NOW + 91),
        Refusal.FORGED,
    ),
    "of the year 5000": (lambda scene: scene.writer.record(expiration_time=NOW * 3), Refusal.NOT_YET),
    "huge": (lambda scene: scene.writer.record(value=b"\xc4\xff" + b"0" * MAX_RECORD_BYTES), Refusal.MALFORMED),
    "a payload that readers hang on": (lambda scene: scene.writer.record(value=b"\xc1"), Refusal.MALFORMED),
    "a payload of an unknown extension": (lambda scene: scene.writer.record(value=b"\xc7\x00\x40"), Refusal.MALFORMED),
    "another payload": (lambda scene: with_payload(scene.writer.record(), b"\x01"), Refusal.FORGED),
    "a stranger's": (lambda scene: scene.stranger.record(), Refusal.UNKNOWN_KEY),
    "with another's certificate": (lambda scene: with_certificate_of_other(scene), Refusal.FOREIGN_PEER),
    "a client's": (lambda scene: scene.other(Role.CLIENT).record(), Refusal.WRONG_ROLE),
    "of a revoked member": (lambda scene: after(scene, revoke), Refusal.REVOKED),
    "of an expired membership": (lambda scene: after(scene, wait_a_month), Refusal.EXPIRED),
    "a trust list of nobody": (lambda scene: scene.trust_record(b"\x90"), Refusal.MALFORMED),
    "a trust list that is no list": (
        lambda scene: scene.trust_record(value=MSGPackSerializer.dumps([1])),
        Refusal.MALFORMED,
    ),
    "a stranger's trust list": (
        lambda scene: scene.trust_record(scene.stranger.member.issuer.authority.signed_trust()),
        Refusal.UNKNOWN_KEY,
    ),
    "a trust list kept alive": (
        lambda scene: scene.trust_record(expiration_time=NOW + 2 * TRUST_LIFE_S),
        Refusal.NOT_YET,
    ),
    "a trust list under a name": (
        lambda scene: scene.trust_record(subkey=MSGPackSerializer.dumps(scene.writer.peer_id)),
        Refusal.MALFORMED,
    ),
}


def with_payload(record: DHTRecord, payload: bytes) -> DHTRecord:
    return replace(record, value=msgpack.packb([payload, *msgpack.unpackb(record.value)[1:]]))


def with_certificate_of_other(scene: Scene) -> DHTRecord:
    scene.writer.records.certificate = scene.other().member.signed
    return scene.writer.record()


def after(scene: Scene, what: Callable[[Scene], None]) -> DHTRecord:
    what(scene)
    return scene.writer.record(expiration_time=scene.issuer.clock.now + 90)


def revoke(scene: Scene) -> None:
    scene.issuer.authority.revoke(scene.writer.member.token_id)
    scene.trust.offer(scene.issuer.authority.signed_trust())


def wait_a_month(scene: Scene) -> None:
    scene.issuer.clock.now += 31 * 86400


@pytest.mark.parametrize(("make", "refusal"), ATTEMPTS.values(), ids=ATTEMPTS.keys())
def test_what_may_not_stand_in_the_dht(scene: Scene, make: Callable[[Scene], DHTRecord], refusal: Refusal) -> None:
    record = make(scene)
    with pytest.raises(NotAdmitted) as caught:
        scene.reader.check(record)
    assert caught.value.reason == refusal
    assert not scene.reader.validate(record)


def test_a_member_that_is_revoked_is_none_even_before_its_record_expires(scene: Scene) -> None:
    assert scene.reader.validate(scene.writer.record())
    revoke(scene)
    assert not scene.reader.is_member(scene.writer.peer_id)


def test_the_trust_list_is_taken_from_anybody(scene: Scene) -> None:
    assert scene.reader.validate(scene.trust_record())


class Swarm:
    """A coordinator's, a server's and a reader's DHT nodes on loopback, all in this process."""

    def __init__(self, folder: Path) -> None:
        self.issuer = Issuer(folder, clock=Clock(get_dht_time()))
        self.networks: list[Network] = []

    async def join(self, role: Role | None = None, **config: Any) -> tuple[Network, SignedRecords]:
        identity, trust = new_identity(), self.issuer.trust_source()
        records = SignedRecords(trust, identity=identity)
        peers = tuple([address for network in self.networks[:1] for address in await network.addresses()])
        network = await Network.start(
            NetworkConfig(initial_peers=peers, identity=identity, **{"validator": records, **config})
        )
        self.networks.append(network)
        if role is not None:
            records.certificate = self.issuer.member(role, peer_id=network.peer_id).signed
        return network, records

    async def stop(self) -> None:
        for network in reversed(self.networks):
            await network.stop()


def in_swarm(folder: Path, scenario: Callable[[Swarm], Awaitable[None]]) -> None:
    async def main() -> None:
        swarm = Swarm(folder)
        try:
            async with asyncio.timeout(60):
                await scenario(swarm)
        finally:
            await swarm.stop()

    asyncio.run(main())


async def publish(network: Network, **change: Any) -> None:
    info = ServerInfo(**{"state": ServerState.ONLINE, "throughput": 1.0, "start_block": 1, "end_block": 3, **change})
    hashes = {1: "a" * 64, 2: "a" * 64}
    await announce(network.node, SWARM, info, identity=IDENTITY, block_hashes=hashes, num_blocks=BLOCKS)


async def read(network: Network) -> dict[str, bool]:
    return {server.peer_id: server.is_online for server in await read_servers(network.node, SWARM, BLOCKS)}


def test_members_see_each_other_and_nobody_else(tmp_path: Path) -> None:
    async def scenario(swarm: Swarm) -> None:
        first, _ = await swarm.join()
        server, _ = await swarm.join(Role.SERVER)
        client, _ = await swarm.join(client_only=True)
        waiting, waiting_records = await swarm.join()
        await publish(server)
        await publish(waiting)  # has no certificate yet
        stock, _ = await swarm.join(validator=None)
        await publish(stock)
        cheat, cheat_records = await swarm.join()
        cheat_records.certificate = swarm.issuer.member(Role.SERVER).signed  # another's
        await publish(cheat)
        assert await read(client) == await read(first) == {server.peer_id: True}
        models = await first.node.get("_petals.models")
        assert models is None  # a closed swarm is on nobody's list
        waiting_records.certificate = swarm.issuer.member(Role.SERVER, peer_id=waiting.peer_id).signed
        await publish(waiting)
        await publish(server, state=ServerState.OFFLINE)
        assert await read(client) == {server.peer_id: False, waiting.peer_id: True}

    in_swarm(tmp_path, scenario)


def test_records_that_do_not_say_what_is_served_are_ignored(tmp_path: Path) -> None:
    async def scenario(swarm: Swarm) -> None:
        server, _ = await swarm.join(Role.SERVER)
        state, throughput, extra = ServerInfo(
            state=ServerState.ONLINE, throughput=1.0, start_block=0, end_block=1
        ).to_tuple()
        for additions in ({}, {"identity": IDENTITY.to_dict()}, {"weights_sha256": "a" * 64}):
            value = (state, throughput, {**extra, "geopetals": additions})
            expiration = get_dht_time() + MAX_LIFE_S / 2
            (uid,) = block_uids(SWARM, 0, 1)
            assert await server.node.store(uid, value, expiration, subkey=server.peer_id)
            assert await read(server) == {}

    in_swarm(tmp_path, scenario)


def test_a_revocation_passes_from_member_to_member_without_the_coordinator(tmp_path: Path) -> None:
    async def scenario(swarm: Swarm) -> None:
        one, one_records = await swarm.join(Role.SERVER)
        other, other_records = await swarm.join(Role.SERVER)
        bad, _ = await swarm.join(Role.SERVER)
        await publish(bad)
        assert bad.peer_id in await read(other)
        token = next(entry for entry in swarm.issuer.authority.tokens() if entry.id == last_server(swarm))
        swarm.issuer.authority.revoke(token.id)
        one_records.trust.offer(swarm.issuer.authority.signed_trust())
        await exchange_trust(one.node, one_records.trust)  # as keep_trust_current does now and then
        await exchange_trust(other.node, other_records.trust)
        assert token.id in other_records.trust.current.revoked
        assert bad.peer_id not in await read(other)

    in_swarm(tmp_path, scenario)


def last_server(swarm: Swarm) -> str:
    return [entry.id for entry in swarm.issuer.authority.tokens() if entry.role is Role.SERVER][-1]
