import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geopetals.wan import packets
from geopetals.wan.packets import ICMP, TCP, UDP, Ports
from tests.wan.wire import packet

ADDRESSES = st.ip_addresses(v=4).map(str)
PORTS = st.integers(1, 65535)


def same_checksum(one: bytes, other: bytes) -> bool:
    """Equal, but that 0x0000 and 0xffff stand for the same sum."""
    if len(one) != len(other):
        return False
    pairs = [(one[at : at + 2], other[at : at + 2]) for at in range(0, len(one), 2)]
    return all(a == b or {a, b} == {b"\0\0", b"\xff\xff"} for a, b in pairs)


@given(
    source=ADDRESSES,
    target=ADDRESSES,
    new=ADDRESSES,
    ports=st.tuples(PORTS, PORTS),
    port=PORTS,
    protocol=st.sampled_from([TCP, UDP]),
    data=st.binary(max_size=9),
    partial=st.booleans(),
)
def test_changed_packets_have_the_checksums_of_packets_made_so(
    source: str,
    target: str,
    new: str,
    ports: tuple[int, int],
    port: int,
    protocol: int,
    data: bytes,
    partial: bool,
) -> None:
    before = packet(source, target, protocol=protocol, ports=ports, data=data, partial=partial)
    sent = packet(new, target, protocol=protocol, ports=(port, ports[1]), data=data, partial=partial)
    received = packet(source, new, protocol=protocol, ports=(ports[0], port), data=data, partial=partial)
    assert same_checksum(packets.with_source(before, socket.inet_aton(new), port), sent)
    assert same_checksum(packets.with_target(before, socket.inet_aton(new), port), received)


def test_udp_without_a_checksum_stays_without() -> None:
    bare = bytearray(packet("11.0.0.1", "11.0.0.2"))
    bare[packets.HEADER + 26 : packets.HEADER + 28] = b"\0\0"
    changed = packets.with_source(bytes(bare), socket.inet_aton("11.0.0.9"), 5)
    assert changed[packets.HEADER + 26 : packets.HEADER + 28] == b"\0\0"


def test_an_echo_has_its_identifier_for_both_ports_and_keeps_it() -> None:
    echo = packet("11.0.0.1", "11.0.0.2", protocol=ICMP, ports=(77, 0))
    assert packets.ports(echo) == Ports(ICMP, 77, 77)
    assert packets.ports(packets.with_source(echo, socket.inet_aton("11.0.0.9"), 77)) == Ports(ICMP, 77, 77)


def test_later_fragments_errors_and_stumps_have_no_ports() -> None:
    whole = packet("11.0.0.1", "11.0.0.2")
    fragment = bytearray(whole)
    fragment[packets.HEADER + 7] = 1
    error = bytearray(packet("11.0.0.1", "11.0.0.2", protocol=ICMP))
    error[packets.HEADER + 20] = 3
    assert packets.ports(whole) == Ports(UDP, 1000, 2000)
    assert packets.ports(bytes(fragment)) is None
    assert packets.ports(bytes(error)) is None
    assert packets.ports(whole[: packets.HEADER + 24]) is None


@given(st.binary(max_size=64))
def test_any_bytes_are_survived(data: bytes) -> None:
    if packets.is_ipv4(data) and packets.ports(data) is not None:
        assert len(packets.with_source(data, bytes(4), 1)) == len(data)


@pytest.mark.parametrize("data", [b"", bytes(29), bytes(10) + b"\x60" + bytes(50)])
def test_what_is_no_ipv4_is_told_apart(data: bytes) -> None:
    assert not packets.is_ipv4(data)
