"""IPv4 packets as the TUN devices give them: addresses, ports, and how to change both.

In front of each packet stands a `struct virtio_net_hdr` of 10 bytes. Its flag NEEDS_CSUM says that the transport
checksum holds the sum of the pseudo header only, not complemented, and is to be completed where the packet leaves the
emulated network: it then changes with addresses, but not with ports (as in the kernel's inet_proto_csum_replace4).
"""

from typing import NamedTuple

HEADER = 10
SOURCE = slice(HEADER + 12, HEADER + 16)
TARGET = slice(HEADER + 16, HEADER + 20)
ICMP, TCP, UDP = 1, 6, 17
_NEEDS_CSUM = 1
_CHECKSUM_AT = {TCP: 16, UDP: 6}
_ECHO = (0, 8)
_SMALLEST = {ICMP: 8, TCP: 20, UDP: 8}


class Ports(NamedTuple):
    """Of ICMP echoes, the identifier is both."""

    protocol: int
    source: int
    target: int


def is_ipv4(packet: bytes) -> bool:
    return len(packet) >= HEADER + 20 and packet[HEADER] >> 4 == 4


def ports(packet: bytes) -> Ports | None:
    """None where there are none: other protocols, ICMP errors, fragments after the first."""
    at = _payload(packet)
    protocol = packet[HEADER + 9]
    if packet[HEADER + 6] & 0x1F or packet[HEADER + 7] or len(packet) < at + _SMALLEST.get(protocol, 1 << 16):
        return None
    if protocol == ICMP:
        identifier = int.from_bytes(packet[at + 4 : at + 6])
        return Ports(ICMP, identifier, identifier) if packet[at] in _ECHO else None
    return Ports(protocol, int.from_bytes(packet[at : at + 2]), int.from_bytes(packet[at + 2 : at + 4]))


def with_source(packet: bytes, address: bytes, port: int) -> bytes:
    """The packet as if sent from there; ICMP keeps its identifier."""
    return _changed(packet, SOURCE, address, 0, port)


def with_target(packet: bytes, address: bytes, port: int) -> bytes:
    """The packet as if sent to there; ICMP keeps its identifier."""
    return _changed(packet, TARGET, address, 2, port)


def _payload(packet: bytes) -> int:
    return HEADER + (packet[HEADER] & 0xF) * 4


def _changed(packet: bytes, where: slice, address: bytes, port_at: int, port: int) -> bytes:
    changed = bytearray(packet)
    old_address, start = packet[where], _payload(packet)
    changed[where] = address
    _update(changed, HEADER + 10, old_address, address)
    checksum_at = _CHECKSUM_AT.get(packet[HEADER + 9])
    if checksum_at is None:
        return bytes(changed)
    old_port, new_port = packet[start + port_at : start + port_at + 2], port.to_bytes(2)
    changed[start + port_at : start + port_at + 2] = new_port
    if packet[0] & _NEEDS_CSUM:
        _update(changed, start + checksum_at, old_address, address, complemented=False)
    elif checksum_at != 6 or any(packet[start + 6 : start + 8]):  # UDP may go without
        _update(changed, start + checksum_at, old_address + old_port, address + new_port)
    return bytes(changed)


def _update(packet: bytearray, at: int, old: bytes, new: bytes, *, complemented: bool = True) -> None:
    """RFC 1624: HC' = ~(~HC + ~m + m')."""
    mask = 0xFFFF if complemented else 0
    total = int.from_bytes(packet[at : at + 2]) ^ mask
    for index in range(0, len(old), 2):
        total += int.from_bytes(old[index : index + 2]) ^ 0xFFFF
        total += int.from_bytes(new[index : index + 2])
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    packet[at : at + 2] = (total ^ mask).to_bytes(2)
