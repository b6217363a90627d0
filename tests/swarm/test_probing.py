import socket
from types import SimpleNamespace
from typing import Any

import pytest

from geopetals.errors import ControlLost
from geopetals.swarm import probing, redial
from geopetals.swarm.network import Network, NetworkConfig
from geopetals.swarm.probing import Prober, measure_rtt
from tests.event_loop import in_loop

OWN, NEAR, FAR, GONE = "own", "near", "far", "gone"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def rtts(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Round trips by peer; others do not answer."""
    table = {NEAR: 0.01, FAR: 0.2}

    async def measure(p2p: Any, peer: str) -> float:
        if peer not in table:
            raise ConnectionError("nobody there")
        return table[peer]

    async def links(p2p: Any) -> dict[str, bool]:
        return {NEAR: False, FAR: True}

    monkeypatch.setattr(probing, "measure_rtt", measure)
    monkeypatch.setattr(probing, "links", links)
    monkeypatch.setattr(probing, "_MOST_PER_S", 1e6)
    return table


def make_prober(clock: Clock) -> Prober:
    network: Any = SimpleNamespace(peer_id=OWN, p2p=None)
    return Prober(lambda: network, clock=clock)


@in_loop
async def test_links_are_told_with_their_way(rtts: dict[str, float]) -> None:
    prober = make_prober(Clock())
    prober.want([NEAR, FAR, OWN, GONE])
    await prober.measure_all()
    assert prober.samples() == ((NEAR, 0.01, False), (FAR, 0.2, True))


@in_loop
async def test_one_late_answer_changes_nothing_and_two_do(rtts: dict[str, float]) -> None:
    prober = make_prober(Clock())
    prober.want([NEAR])
    for rtt_s, expected_s in ((0.01, 0.01), (0.01, 0.01), (0.5, 0.01), (0.5, 0.5), (0.01, 0.5), (0.01, 0.01)):
        rtts[NEAR] = rtt_s
        await prober.measure_all()
        ((_, told_s, _),) = prober.samples()
        assert told_s == expected_s


@in_loop
async def test_what_is_old_is_not_told_and_what_nobody_wants_is_not_measured(rtts: dict[str, float]) -> None:
    clock = Clock()
    prober = make_prober(clock)
    prober.want([NEAR, FAR])
    await prober.measure_all()
    del rtts[FAR]
    clock.now = 50.0
    await prober.measure_all()
    assert [sample.peer_id for sample in prober.samples()] == [NEAR]
    prober.want([FAR])
    clock.now = 61.0
    rtts[FAR] = 0.3
    await prober.measure_all()
    assert [sample.peer_id for sample in prober.samples()] == [FAR]


@in_loop
async def test_a_peer_on_this_machine_is_near_and_can_be_dialled_again() -> None:
    first = await Network.start(NetworkConfig())
    try:
        second = await Network.start(NetworkConfig(initial_peers=await first.addresses()))
        try:
            assert 0 < await measure_rtt(second.p2p, first.peer_id) < 1.0
            await redial.connect(second.p2p, await first.addresses())
        finally:
            await second.stop()
    finally:
        await first.stop()


@in_loop
async def test_an_address_where_nobody_listens_is_not_dialled() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nobody: Any = None
    with pytest.raises(ControlLost, match="nobody listens at its address"):
        await redial.connect(
            nobody, [f"/ip4/127.0.0.1/tcp/{port}/p2p/12D3KooWAkxmPQg8FgoTvy7Wi2hWbjBJYuFBQ1q2JX7oxEkXb4jD"]
        )
    with pytest.raises(ControlLost, match="no address"):
        await redial.connect(nobody, [])
