import random
import socket

import pytest

from geopetals.wan import packets
from geopetals.wan.nat import IDLE_S, MOST_FLOWS, NatTable
from geopetals.wan.packets import ICMP, TCP, UDP
from geopetals.wan.spec import Nat
from tests.wan.wire import packet

HOME, PUBLIC = "192.168.1.2", "11.77.0.1"
PEER, OTHER = "11.77.0.2", "11.77.0.3"
BOTH = pytest.mark.parametrize("kind", list(Nat))


def nat(kind: Nat) -> NatTable:
    return NatTable(kind, private=socket.inet_aton(HOME), public=socket.inet_aton(PUBLIC), rng=random.Random(1))


def send(
    table: NatTable, peer: str, *, ports: tuple[int, int] = (1000, 2000), protocol: int = UDP, now: float = 0
) -> int:
    """The port that the peer sees."""
    out = table.outbound(packet(HOME, peer, ports=ports, protocol=protocol), now)
    assert out is not None
    assert out[packets.SOURCE] == socket.inet_aton(PUBLIC)
    assert out[packets.TARGET] == socket.inet_aton(peer)
    found = packets.ports(out)
    assert found is not None
    return found.source


def receive(table: NatTable, peer: str, ports: tuple[int, int], *, protocol: int = UDP, now: float = 0) -> int | None:
    """The host's port that it reaches, if it does."""
    back = table.inbound(packet(peer, PUBLIC, ports=ports, protocol=protocol), now)
    if back is None:
        return None
    assert back[packets.TARGET] == socket.inet_aton(HOME)
    found = packets.ports(back)
    assert found is not None
    return found.target


@BOTH
@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_answers_come_back_to_the_port_that_asked(kind: Nat, protocol: int) -> None:
    table = nat(kind)
    seen = send(table, PEER, protocol=protocol)
    assert receive(table, PEER, (2000, seen), protocol=protocol) == 1000
    assert send(table, PEER, protocol=protocol) == seen


@BOTH
def test_nobody_else_comes_in(kind: Nat) -> None:
    table = nat(kind)
    assert receive(table, PEER, (2000, 1000)) is None
    seen = send(table, PEER)
    assert receive(table, OTHER, (2000, seen)) is None
    assert receive(table, PEER, (2001, seen)) is None
    assert receive(table, PEER, (2000, seen), protocol=TCP) is None


def test_a_port_preserving_nat_shows_every_peer_the_same_port() -> None:
    table = nat(Nat.PORT_PRESERVING)
    assert [send(table, peer) for peer in (PEER, OTHER)] == [1000, 1000]


def test_a_symmetric_nat_shows_every_peer_another_port() -> None:
    table = nat(Nat.SYMMETRIC)
    seen = {send(table, PEER, ports=(1000, port)) for port in range(2000, 2020)}
    assert len(seen) >= 19
    assert 1000 not in seen


@BOTH
def test_a_mapping_is_forgotten_when_it_is_idle(kind: Nat) -> None:
    table = nat(kind)
    seen = send(table, PEER, now=0)
    assert receive(table, PEER, (2000, seen), now=IDLE_S[UDP] - 1) == 1000
    assert receive(table, PEER, (2000, seen), now=2 * IDLE_S[UDP] - 2) == 1000
    assert receive(table, PEER, (2000, seen), now=4 * IDLE_S[UDP]) is None
    assert len(table) == 0


def test_a_host_can_ping_and_cannot_be_pinged() -> None:
    table = nat(Nat.SYMMETRIC)
    assert receive(table, PEER, (9, 9), protocol=ICMP) is None
    assert send(table, PEER, ports=(9, 9), protocol=ICMP) == 9
    assert receive(table, PEER, (9, 9), protocol=ICMP) == 9


def test_packets_with_another_source_are_not_let_out() -> None:
    assert nat(Nat.SYMMETRIC).outbound(packet(OTHER, PEER), 0) is None


@BOTH
def test_it_holds_a_limited_number_of_flows_and_forgets_the_oldest(kind: Nat) -> None:
    table = nat(kind)
    for number in range(MOST_FLOWS + 100):
        table.outbound(packet(HOME, PEER, ports=(1 + number % 65000, 1 + number // 65000)), number / 1e6)
    assert len(table) <= MOST_FLOWS
    assert receive(table, PEER, (1, 1), now=1) is None
