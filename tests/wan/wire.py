"""Packets as a TUN device gives them, with checksums computed from scratch."""

import socket
import struct

from geopetals.wan import packets

NOT_COMPUTED = b"\x01" + bytes(9)
"""NEEDS_CSUM: the transport checksum holds the sum of the pseudo header only."""
COMPUTED = bytes(10)


def folded(data: bytes) -> int:
    even = data + bytes(len(data) % 2)
    total = sum(struct.unpack(f"!{len(even) // 2}H", even))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def packet(
    source: str,
    target: str,
    *,
    protocol: int = packets.UDP,
    ports: tuple[int, int] = (1000, 2000),
    data: bytes = b"data",
    partial: bool = False,
) -> bytes:
    body = transport(source, target, protocol, ports, data, partial=partial)
    header = struct.pack(
        "!BBHHHBBH4s4s",
        0x45,
        0,
        20 + len(body),
        1,
        0,
        64,
        protocol,
        0,
        socket.inet_aton(source),
        socket.inet_aton(target),
    )
    header = header[:10] + (~folded(header) & 0xFFFF).to_bytes(2) + header[12:]
    return (NOT_COMPUTED if partial else COMPUTED) + header + body


def transport(source: str, target: str, protocol: int, ports: tuple[int, int], data: bytes, *, partial: bool) -> bytes:
    if protocol == packets.ICMP:
        body = struct.pack("!BBHHH", 8, 0, 0, ports[0], 1) + data
        return body[:2] + (~folded(body) & 0xFFFF).to_bytes(2) + body[4:]
    if protocol == packets.TCP:
        body, at = struct.pack("!HHIIBBHHH", *ports, 1, 2, 0x50, 0x10, 100, 0, 0) + data, 16
    else:
        body, at = struct.pack("!HHHH", *ports, 8 + len(data), 0) + data, 6
    pseudo = socket.inet_aton(source) + socket.inet_aton(target) + struct.pack("!HH", protocol, len(body))
    checksum = folded(pseudo) if partial else ~folded(pseudo + body) & 0xFFFF
    return body[:at] + checksum.to_bytes(2) + body[at + 2 :]
