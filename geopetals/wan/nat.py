"""A home router: one public address for one private host, and nobody comes in who was not written to."""

import random

from geopetals.wan import packets
from geopetals.wan.packets import ICMP, TCP, UDP
from geopetals.wan.spec import Nat

IDLE_S = {TCP: 7440.0, UDP: 120.0, ICMP: 60.0}
"""After this time without a packet a mapping is forgotten: the least that RFC 5382, 4787 and 5508 allow."""
MOST_FLOWS = 20_000
_FIRST_PORT = 1024

_Flow = tuple[int, int, bytes, int]
"""Protocol, port of this side (the host's, or the NAT's), address and port of the peer."""


class NatTable:
    """Address and port translation with address- and port-dependent filtering; see `Nat` for the kinds.

    Fragments and ICMP errors do not get through.
    """

    def __init__(self, kind: Nat, *, private: bytes, public: bytes, rng: random.Random) -> None:
        self._kind, self._private, self._public, self._rng = kind, private, public, rng
        self._port_of: dict[_Flow, int] = {}
        self._inside_of: dict[_Flow, _Flow] = {}
        self._used_s: dict[_Flow, float] = {}

    def __len__(self) -> int:
        return len(self._port_of)

    def outbound(self, packet: bytes, now: float) -> bytes | None:
        """As it leaves the NAT; None if it does not."""
        found = packets.ports(packet)
        if found is None or packet[packets.SOURCE] != self._private:
            return None
        flow = (found.protocol, found.source, packet[packets.TARGET], found.target)
        if flow in self._used_s and now - self._used_s[flow] > IDLE_S[found.protocol]:
            self._forget(flow)
        port = self._port_of.get(flow)
        if port is None:
            port = self._new_port(flow, now)
        self._used_s[flow] = now
        return packets.with_source(packet, self._public, port)

    def inbound(self, packet: bytes, now: float) -> bytes | None:
        """As it reaches the host; None if nobody asked for it."""
        found = packets.ports(packet)
        if found is None:
            return None
        flow = self._inside_of.get((found.protocol, found.target, packet[packets.SOURCE], found.source))
        if flow is None:
            return None
        if now - self._used_s[flow] > IDLE_S[flow[0]]:
            self._forget(flow)
            return None
        self._used_s[flow] = now
        return packets.with_target(packet, self._private, flow[1])

    def _new_port(self, flow: _Flow, now: float) -> int:
        if len(self._port_of) >= MOST_FLOWS:
            self._make_room(now)
        protocol, source, address, target = flow
        port = source
        if self._kind is Nat.SYMMETRIC and protocol != ICMP:
            port = self._rng.randrange(_FIRST_PORT, 1 << 16)
            while (protocol, port, address, target) in self._inside_of:
                port = self._rng.randrange(_FIRST_PORT, 1 << 16)
        self._port_of[flow] = port
        self._inside_of[protocol, port, address, target] = flow
        return port

    def _make_room(self, now: float) -> None:
        idle = [flow for flow, used_s in self._used_s.items() if now - used_s > IDLE_S[flow[0]]]
        oldest = sorted(self._used_s, key=self._used_s.__getitem__)[: MOST_FLOWS // 10]
        for flow in idle or oldest:
            self._forget(flow)

    def _forget(self, flow: _Flow) -> None:
        protocol, _, address, target = flow
        port = self._port_of.pop(flow)
        del self._inside_of[protocol, port, address, target]
        del self._used_s[flow]
