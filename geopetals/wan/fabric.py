"""What happens to packets between hosts, without sockets and without a clock: lines, delays, losses, NATs, cuts.

A packet passes the sender's uplink, the pair's own bottleneck, the delay, and the receiver's downlink. Lines are
fluid: the next one passes a packet's first bits on while the last are still on their way, as a chain of routers does
with the segments that the kernel hands over as one packet. So 1 MB takes 1 MB over the slowest line, once.
"""

import heapq
import math
import random
from collections.abc import Mapping
from typing import NamedTuple

from geopetals.wan import packets
from geopetals.wan.addresses import Addresses
from geopetals.wan.changes import Change, Target
from geopetals.wan.nat import NatTable
from geopetals.wan.spec import HostSpec, LinkSpec, Pair, WanSpec

QUEUE_S = 0.2
"""A line drops what would wait longer than this to be sent (undilated)."""


class Line:
    """A queue in front of a fixed rate; rate 0 never limits."""

    __slots__ = ("bit_per_s", "dilation", "free", "seconds_per_byte")

    def __init__(self, bit_per_s: float | None, dilation: float) -> None:
        self.free, self.dilation = -math.inf, dilation
        self.set_rate(bit_per_s)

    def set_rate(self, bit_per_s: float | None) -> None:
        self.bit_per_s = bit_per_s
        self.seconds_per_byte = 8 * self.dilation / bit_per_s if bit_per_s else 0.0

    def send(self, first: float, last: float, size: int) -> tuple[float, float] | None:
        """When the first and the last bit leave, having arrived at these times; None if the queue is full."""
        if not self.seconds_per_byte:
            return first, last
        begin = max(first, self.free)
        if begin - first > QUEUE_S * self.dilation:
            return None
        self.free = max(begin + size * self.seconds_per_byte, last)
        return begin, self.free


class Port:
    """A host's end: its access line, its NAT, and its links by the address that they lead to."""

    __slots__ = ("cut", "down", "links", "name", "nat", "spec", "up")

    def __init__(self, spec: HostSpec, nat: NatTable | None, dilation: float) -> None:
        self.name, self.spec, self.nat = spec.name, spec, nat
        self.up, self.down = Line(spec.up_bit_per_s, dilation), Line(spec.down_bit_per_s, dilation)
        self.links: dict[bytes, Link] = {}
        self.cut = False


class Link:
    """One direction of a pair, as it is now."""

    __slots__ = ("cut", "delay_s", "jitter_rate", "latest", "line", "loss", "packets", "source", "spec", "target")

    def __init__(self, source: Port, target: Port, spec: LinkSpec, dilation: float) -> None:
        self.source, self.target = source, target
        self.line = Line(None, dilation)
        self.latest = -math.inf
        self.cut = False
        self.packets = 0
        self.configure(spec, dilation)

    def configure(self, spec: LinkSpec, dilation: float) -> None:
        self.spec = spec
        self.delay_s = spec.rtt_s / 2 * dilation
        self.jitter_rate = 1 / (spec.jitter_s * dilation) if spec.jitter_s else 0.0
        self.loss = spec.loss
        self.line.set_rate(spec.bandwidth_bit_per_s)

    @property
    def closed(self) -> bool:
        return self.cut or self.source.cut or self.target.cut or self.delay_s == math.inf


class Delivery(NamedTuple):
    """A packet for a host, and when it was due."""

    due: float
    port: Port
    packet: bytes


_InFlight = tuple[float, int, bool, Link, bytes, float]
"""Time of the next event, a number that keeps the order, whether the downlink is passed, link, packet, last bit."""


class Fabric:
    """All ports and links, and the packets on their way. Times are seconds of any clock that does not run backwards."""

    def __init__(self, spec: WanSpec, addresses: Mapping[str, Addresses]) -> None:
        self.spec = spec
        self._rng = random.Random(spec.seed)
        self.ports = {
            host.name: Port(host, self._nat(host, addresses[host.name]), spec.dilation) for host in spec.hosts
        }
        self.links: dict[Pair, Link] = {}
        none = LinkSpec(rtt_s=math.inf)
        for start, source in self.ports.items():
            for end, target in self.ports.items():
                if start != end:
                    link = Link(source, target, spec.links.get((start, end), none), spec.dilation)
                    self.links[start, end] = source.links[addresses[end].public_bytes] = link
        self._heap: list[_InFlight] = []
        self._number = 0
        self.reset_counts()

    def reset_counts(self) -> None:
        """Of packets that were not delivered, by reason, and of those that each link was given."""
        self.lost = self.overflowed = self.cut = self.filtered = self.unroutable = 0
        for link in self.links.values():
            link.packets = 0

    @property
    def in_flight(self) -> int:
        return len(self._heap)

    def next_event(self) -> float:
        """When `pop` is to be called again; infinite if nothing is on its way."""
        return self._heap[0][0] if self._heap else math.inf

    def admit(self, port: Port, packet: bytes, now: float) -> None:
        """A packet that a host sends."""
        if not packets.is_ipv4(packet):
            return  # IPv6 looks for routers on every new interface
        if port.nat is not None:
            translated = port.nat.outbound(packet, now)
            if translated is None:
                self.filtered += 1
                return
            packet = translated
        link = port.links.get(packet[packets.TARGET])
        if link is None:
            self.unroutable += 1
        elif link.closed:
            self.cut += 1
        elif link.loss and self._rng.random() < link.loss:
            self.lost += 1
        else:
            self._send(link, packet, now)

    def pop(self, now: float) -> Delivery | None:
        """The next packet that is due; None if there is none. Packets of a link never overtake each other."""
        while self._heap and self._heap[0][0] <= now:
            due, number, received, link, packet, last = heapq.heappop(self._heap)
            target = link.target
            if link.closed:
                self.cut += 1
                continue
            if not received:
                passed = target.down.send(due, last, len(packet) - packets.HEADER)
                if passed is None:
                    self.overflowed += 1
                else:
                    heapq.heappush(self._heap, (passed[1], number, True, link, packet, last))
                continue
            if target.nat is not None:
                translated = target.nat.inbound(packet, now)
                if translated is None:
                    self.filtered += 1
                    continue
                packet = translated
            return Delivery(due, target, packet)
        return None

    def change(self, target: Target, change: Change) -> None:
        """For packets that are sent from now on."""
        for name in target.hosts:
            port = self.ports[name]
            if change.up_bit_per_s is not None:
                port.up.set_rate(change.up_bit_per_s or None)
            if change.down_bit_per_s is not None:
                port.down.set_rate(change.down_bit_per_s or None)
        for pair in target.pairs:
            link = self.links[pair]
            link.configure(_changed(link.spec, change), self.spec.dilation)

    def set_cut(self, target: Target, cut: bool) -> None:
        """Cut or heal the hosts, or the pairs if no whole hosts are meant; what is on its way is lost."""
        for name in target.hosts:
            self.ports[name].cut = cut
        for pair in () if target.hosts else target.pairs:
            self.links[pair].cut = cut

    def heal(self) -> None:
        """Undo every cut."""
        for port in self.ports.values():
            port.cut = False
        for link in self.links.values():
            link.cut = False

    def loses_packets(self, port: Port) -> bool:
        return any(link.loss for link in port.links.values())

    def _nat(self, host: HostSpec, address: Addresses) -> NatTable | None:
        if host.nat is None:
            return None
        return NatTable(host.nat, private=address.own_bytes, public=address.public_bytes, rng=self._rng)

    def _send(self, link: Link, packet: bytes, now: float) -> None:
        link.packets += 1
        size = len(packet) - packets.HEADER
        sent = link.source.up.send(now, now, size)
        sent = sent and link.line.send(*sent, size)
        if sent is None:
            self.overflowed += 1
            return
        delay_s = link.delay_s
        if link.jitter_rate:
            delay_s += self._rng.expovariate(link.jitter_rate)
        first, last = sent[0] + delay_s, sent[1] + delay_s
        self._number += 1
        limited = link.target.down.seconds_per_byte > 0
        event = link.latest = max(first if limited else last, link.latest)
        heapq.heappush(self._heap, (event, self._number, not limited, link, packet, max(last, event)))


def _changed(spec: LinkSpec, change: Change) -> LinkSpec:
    def value(new: float | None, old: float) -> float:
        return old if new is None else new

    return LinkSpec(
        rtt_s=value(change.rtt_s, spec.rtt_s),
        jitter_s=value(change.jitter_s, spec.jitter_s),
        loss=value(change.loss, spec.loss),
        bandwidth_bit_per_s=spec.bandwidth_bit_per_s
        if change.bandwidth_bit_per_s is None
        else change.bandwidth_bit_per_s or None,
    )
