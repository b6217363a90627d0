"""What a client remembers of servers: distances, failures, records that the DHT has lost."""

import asyncio
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from geopetals.client.avoidance import Avoidance
from geopetals.client.config import ClientConfig
from geopetals.client.distances import Distances
from geopetals.client.known_servers import KnownServers
from geopetals.client.swarm import SwarmClient
from geopetals.coordinator.messages import ChainHop
from geopetals.errors import ServerFull, ServerGone, ServerMoving
from geopetals.plan import Span
from geopetals.swarm.identity import ModelIdentity
from geopetals.swarm.records import EXPIRATION_S, ServerRecord
from geopetals.swarm.stack import ServerState

PEER = "12D3KooWEGt4iyapbtz3ExpyUY8hz7brYYK7aDry54yQHJfZKaVN"


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def record(peer_id: str, state: ServerState = ServerState.ONLINE, end: int = 3) -> ServerRecord:
    return ServerRecord(peer_id=peer_id, start=0, end=end, state=state, throughput=1.0)


@given(st.floats(0.001, 1.0), st.floats(0.001, 1.0), st.floats(0.001, 1.0))
def test_one_sample_does_not_change_what_two_say(first: float, second: float, third: float) -> None:
    distances = Distances()
    for rtt_s in (first, second, third):
        distances.add("a", rtt_s)
    assert distances.rtt_s("a") == sorted((first, second, third))[1]
    distances.add("a", third)
    assert distances.rtt_s("a") == third


def test_old_samples_do_not_count_beside_new_ones() -> None:
    clock = Clock()
    distances = Distances(clock=clock)
    distances.add("a", 0.1)
    distances.add("a", 0.1)
    clock.now += 61.0
    assert distances.known() == {"a": 0.1}
    distances.add("a", 0.5)
    assert distances.known() == {"a": 0.5}


def test_who_does_not_answer_is_forgotten() -> None:
    class Nobody:
        async def call_protobuf_handler(self, *_: Any) -> None:
            raise ConnectionError("nobody is there")

    p2p: Any = Nobody()
    distances = Distances()
    distances.add(PEER, 0.1)
    asyncio.run(distances.call(p2p, [PEER], lambda _: 1.0))
    assert PEER not in distances
    distances.add(PEER, 0.1)
    asyncio.run(distances.ping(p2p, [PEER]))
    assert PEER not in distances


def test_failures_pass() -> None:
    clock = Clock()
    avoidance = Avoidance(ban_s=15.0, clock=clock)
    avoidance.add("gone", ServerGone("it is gone."))
    avoidance.add("full", ServerFull("it is full.", free_in_s=3.0))
    avoidance.add("moving", ServerMoving("it moves."))
    avoidance.add_link("full", "moving")
    prices = {peer: avoidance.penalty_s(peer) for peer in ("gone", "full", "moving", "well")}
    assert prices["gone"] == float("inf") > prices["full"] == prices["moving"] > prices["well"] == 0.0
    assert [avoidance.is_banned(peer) for peer in prices] == [True, False, False, False]
    assert avoidance.bad_links() == [("full", "moving")]
    assert prices["full"] < avoidance.penalty_s("gone", answered_at=clock.now + 1.0) < float("inf")
    clock.now += 3.0
    assert avoidance.penalty_s("full") == 0.0
    clock.now += 12.0
    assert avoidance.penalty_s("gone") == 0.0
    clock.now += 60.0
    assert avoidance.bad_links() == []


def test_records_that_the_dht_lost_are_kept_for_a_while() -> None:
    clock = Clock()
    known = KnownServers(clock=clock)
    assert {server.peer_id for server in known.update([record("a"), record("b")])} == {"a", "b"}
    assert {server.peer_id for server in known.update([record("a", end=5)])} == {"a", "b"}
    assert [server.end for server in known.update([])] == [5, 3]
    clock.now += 300.0
    assert [server.peer_id for server in known.update([record("a", ServerState.OFFLINE)])] == ["b"]
    clock.now += 301.0
    assert known.update([]) == []


def spans(servers: list[ServerRecord]) -> dict[str, tuple[int, int]]:
    return {server.peer_id: (server.start, server.end) for server in servers}


def test_the_coordinators_chain_says_what_the_dht_has_not_heard_of() -> None:
    known = KnownServers()
    known.update([record("a"), record("b", end=6)])
    learned = known.learn((ChainHop("a", 3, 6), ChainHop("b", 1, 6), ChainHop("new", 6, 8)))
    expected = {"a": (3, 6), "b": (0, 6), "new": (6, 8)}
    assert spans(learned) == expected
    assert spans(known.update([])) == expected
    assert spans(known.update([record("a"), record("a", ServerState.OFFLINE)])) == expected  # of before the move


def test_newer_records_count_for_more_than_a_chain_of_before() -> None:
    clock = Clock()
    known = KnownServers(clock=clock)
    known.update([record("a"), record("b")])
    known.learn((ChainHop("a", 3, 6), ChainHop("b", 3, 6), ChainHop("new", 6, 8)))
    moved = [record("a", end=4), record("new", ServerState.OFFLINE)]
    assert spans(known.update(moved)) == {"a": (0, 4), "b": (3, 6)}
    clock.now += EXPIRATION_S + 1.0
    assert spans(known.update([record("b")])) == {"a": (0, 4), "b": (0, 3)}


def test_who_was_away_serves_again_by_a_chain() -> None:
    known = KnownServers()
    known.update([record("a", ServerState.OFFLINE, end=6)])
    assert spans(known.learn([ChainHop("a", 2, 6)])) == {"a": (2, 6)}
    assert spans(known.update([record("a", ServerState.OFFLINE, end=6)])) == {"a": (2, 6)}
    assert spans(known.update([record("a", end=6)])) == {"a": (0, 6)}


def test_a_client_finds_its_way_by_the_chains_that_it_was_given() -> None:
    """The coordinator has gone since, and the DHT has lost the records."""
    identity = ModelIdentity(model="tiny", config_hash="0" * 64, revision=None, fingerprint=None)
    config = ClientConfig(blocked_servers=("evil",))
    swarm = SwarmClient(peers=(), swarm="tiny", num_blocks=6, hidden_size=8, identity=identity, config=config)
    try:
        assert swarm.hops_of((ChainHop("evil", 0, 6),)) == ()
        route = swarm.hops_of((ChainHop("a", 0, 4), ChainHop("b", 4, 6)))
        for peer_id in ("a", "b"):
            swarm._distances.add(peer_id, 0.01)
        assert spans(swarm.servers) == {"a": (0, 4), "b": (4, 6)}
        assert swarm._shortest_chain(Span(0, 6)) == route
        assert swarm._is_outdated()
    finally:
        swarm.close()
