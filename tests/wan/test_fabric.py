import itertools
import math
import random
from collections.abc import Sequence
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geopetals.wan import packets
from geopetals.wan.addresses import addresses
from geopetals.wan.changes import Change, parse_target
from geopetals.wan.fabric import QUEUE_S, Delivery, Fabric
from geopetals.wan.spec import HostSpec, LinkSpec, Nat, WanSpec
from tests.wan.wire import packet

NAMES = ("a", "b", "c")
SMALL = 1e-9


def network(*hosts: HostSpec, dilation: float = 1, seed: int = 0, link: LinkSpec | None = None) -> WanSpec:
    hosts = hosts or tuple(HostSpec(name=name) for name in NAMES)
    link = link or LinkSpec(rtt_s=0.1)
    pairs = permutations([host.name for host in hosts], 2)
    return WanSpec(hosts=hosts, links=dict.fromkeys(pairs, link), dilation=dilation, seed=seed)


class Network:
    """A fabric, and what has come out of it."""

    def __init__(self, spec: WanSpec) -> None:
        self.addresses = addresses(spec.hosts)
        self.fabric = Fabric(spec, self.addresses)

    def send(self, source: str, target: str, *, now: float = 0.0, size: int = 100, number: int = 0) -> None:
        data = number.to_bytes(4) + bytes(size - 32)
        sent = packet(self.addresses[source].own, self.addresses[target].public, data=data)
        assert len(sent) - packets.HEADER == size
        self.fabric.admit(self.fabric.ports[source], sent, now)

    def drain(self, until: float = math.inf) -> list[Delivery]:
        """All that comes out, the clock standing at each event."""
        found = []
        while (event := self.fabric.next_event()) < min(until, math.inf):
            delivery = self.fabric.pop(event)
            if delivery is not None:
                found.append(delivery)
        return found

    def change(self, target: str, **values: float) -> None:
        self.fabric.change(parse_target(target, list(self.fabric.ports)), Change(**values))

    def cut(self, target: str, cut: bool = True) -> None:
        self.fabric.set_cut(parse_target(target, list(self.fabric.ports)), cut)


def number_of(delivery: Delivery) -> int:
    return int.from_bytes(delivery.packet[packets.HEADER + 28 : packets.HEADER + 32])


def dues(deliveries: Sequence[Delivery]) -> list[float]:
    return [delivery.due for delivery in deliveries]


def test_a_packet_takes_half_the_rtt_and_is_not_changed() -> None:
    net = Network(network())
    net.send("a", "b", now=5.0)
    assert net.fabric.pop(5.0499) is None
    delivery = net.fabric.pop(5.0501)
    assert delivery is not None
    assert delivery.due == pytest.approx(5.05)
    assert delivery.port.name == "b"
    assert delivery.packet == packet("11.77.0.1", "11.77.0.2", data=bytes(72))
    assert net.fabric.next_event() == math.inf


def test_each_direction_has_its_own_delay() -> None:
    spec = WanSpec(
        hosts=tuple(HostSpec(name=name) for name in "ab"),
        links={("a", "b"): LinkSpec(rtt_s=0.02), ("b", "a"): LinkSpec(rtt_s=0.08)},
    )
    net = Network(spec)
    net.send("a", "b")
    net.send("b", "a")
    assert dues(net.drain()) == pytest.approx([0.01, 0.04])


def test_hosts_without_a_link_do_not_reach_each_other() -> None:
    net = Network(WanSpec(hosts=tuple(HostSpec(name=name) for name in "ab")))
    net.send("a", "b")
    assert net.drain() == []
    net.change("a-b", rtt_s=0.1)
    net.send("a", "b")
    assert len(net.drain()) == 1


@given(
    sends=st.lists(st.tuples(st.floats(0, 1), st.integers(60, 1500)), min_size=1, max_size=30),
    up=st.none() | st.floats(1e5, 1e9),
    down=st.none() | st.floats(1e5, 1e9),
    pair=st.none() | st.floats(1e5, 1e9),
    jitter=st.sampled_from([0.0, 0.01]),
    rtt=st.floats(0, 0.3),
)
@settings(max_examples=60, deadline=None)
def test_no_packet_is_early_overtaken_or_faster_than_its_slowest_line(
    sends: list[tuple[float, int]], up: float | None, down: float | None, pair: float | None, jitter: float, rtt: float
) -> None:
    sends.sort()
    link = LinkSpec(rtt_s=rtt, jitter_s=jitter, bandwidth_bit_per_s=pair)
    net = Network(network(HostSpec(name="a", up_bit_per_s=up), HostSpec(name="b", down_bit_per_s=down), link=link))
    for number, (now, size) in enumerate(sends):
        net.send("a", "b", now=now, size=size, number=number)
    found = net.drain()
    numbers, times = [number_of(delivery) for delivery in found], dues(found)
    assert numbers == sorted(numbers)
    assert times == sorted(times)
    assert len(found) == len(sends) - net.fabric.overflowed
    slowest = min(rate or math.inf for rate in (up, down, pair))
    for number, due in zip(numbers, times, strict=True):
        now, size = sends[number]
        assert due >= now + rtt / 2 + size * 8 / slowest - SMALL
    for first, last in itertools.pairwise(range(len(found))):
        assert times[last] - times[first] >= sends[numbers[last]][1] * 8 / (slowest if not jitter else math.inf) - SMALL


def test_a_message_passes_its_slowest_line_once() -> None:
    net = Network(network(HostSpec(name="a", up_bit_per_s=1e7), HostSpec(name="b", down_bit_per_s=1e7)))
    for number in range(50):
        net.send("a", "b", size=1250, number=number)
    assert net.drain()[-1].due == pytest.approx(0.05 + 50 * 0.001)


def test_a_downlink_is_shared_by_all_senders() -> None:
    net = Network(network(*(HostSpec(name=name, down_bit_per_s=1e6) for name in NAMES)))
    for number in range(10):
        net.send("a", "c", size=1250, number=number)
        net.send("b", "c", size=1250, number=number)
    assert net.drain()[-1].due == pytest.approx(0.05 + 20 * 0.01)


def test_a_full_queue_drops_what_would_wait_too_long() -> None:
    net = Network(network(HostSpec(name="a", up_bit_per_s=1e6), HostSpec(name="b")))
    for number in range(100):
        net.send("a", "b", size=1250, number=number)
    found = net.drain()
    assert len(found) + net.fabric.overflowed == 100
    assert QUEUE_S - SMALL < found[-1].due - 0.05 < QUEUE_S + 0.01 + SMALL


def test_dilation_multiplies_every_delay() -> None:
    def times(dilation: float) -> list[float]:
        hosts = (HostSpec(name="a", up_bit_per_s=1e6), HostSpec(name="b", down_bit_per_s=2e6))
        link = LinkSpec(rtt_s=0.1, jitter_s=0.01)
        net = Network(network(*hosts, dilation=dilation, link=link, seed=3))
        for number in range(30):
            net.send("a", "b", now=number * 0.005 * dilation, size=1000, number=number)
        return dues(net.drain())

    assert times(7) == pytest.approx([7 * time for time in times(1)])


def test_jitter_has_the_mean_that_was_asked_for() -> None:
    net = Network(network(link=LinkSpec(rtt_s=0.1, jitter_s=0.01), seed=5))
    for number in range(2000):
        net.send("a", "b", now=float(number), number=number)
    late = [delivery.due - number - 0.05 for number, delivery in enumerate(net.drain())]
    assert min(late) >= 0
    assert 0.008 < sum(late) / len(late) < 0.012


def test_losses_have_the_share_that_was_asked_for() -> None:
    net = Network(network(link=LinkSpec(rtt_s=0.1, loss=0.2), seed=5))
    for number in range(2000):
        net.send("a", "b", now=number / 1000, number=number)
    assert 300 < net.fabric.lost < 500
    assert len(net.drain()) + net.fabric.lost == 2000


def test_a_cut_host_is_cut_and_healed_it_is_back() -> None:
    net = Network(network())
    net.send("a", "b")
    net.cut("a")
    net.send("a", "b", now=0.01)
    net.send("c", "a", now=0.01)
    net.send("b", "c", now=0.01)
    assert [delivery.port.name for delivery in net.drain()] == ["c"]
    assert net.fabric.cut == 3
    net.cut("a", False)
    net.send("a", "b", now=1.0)
    assert len(net.drain()) == 1


def test_a_cut_pair_leaves_the_others_alone() -> None:
    net = Network(network())
    net.cut("a>b")
    for pair in permutations(NAMES, 2):
        net.send(*pair)
    assert len(net.drain()) == 5
    net.cut("all")
    net.fabric.heal()
    for pair in permutations(NAMES, 2):
        net.send(*pair)
    assert len(net.drain()) == 6


def test_changes_hold_for_packets_sent_later_which_overtake_nobody() -> None:
    net = Network(network())
    net.send("a", "b", now=0.0, number=1)
    net.change("a-b", rtt_s=0.01)
    net.send("a", "b", now=0.001, number=2)
    net.send("a", "b", now=1.0, number=3)
    found = net.drain()
    assert [number_of(delivery) for delivery in found] == [1, 2, 3]
    assert dues(found) == pytest.approx([0.05, 0.05, 1.005])


def test_a_limit_is_set_and_taken_away() -> None:
    net = Network(network())
    net.change("a", up_bit_per_s=1e6)
    net.send("a", "b", size=1250)
    net.change("a", up_bit_per_s=0)
    net.send("a", "b", size=1250, now=1.0)
    assert dues(net.drain()) == pytest.approx([0.06, 1.05])


def test_hosts_behind_nats_talk_to_public_ones_and_are_not_called_by_them() -> None:
    net = Network(network(HostSpec(name="a", nat=Nat.PORT_PRESERVING), HostSpec(name="b")))
    net.send("b", "a")
    assert net.drain() == []
    net.send("a", "b", now=1.0)
    (delivery,) = net.drain()
    assert delivery.packet == packet("11.77.0.1", "11.77.0.2", data=bytes(72))
    answer = packet("11.77.0.2", "11.77.0.1", ports=(2000, 1000))
    net.fabric.admit(net.fabric.ports["b"], answer, 2.0)
    (delivery,) = net.drain()
    assert delivery.packet == packet("11.77.0.2", "192.168.1.2", ports=(2000, 1000))


@given(st.lists(st.binary(max_size=80), max_size=20), st.randoms(use_true_random=False))
def test_whatever_a_host_sends_is_survived(sent: list[bytes], rng: random.Random) -> None:
    net = Network(network(HostSpec(name="a", nat=Nat.SYMMETRIC), HostSpec(name="b")))
    good = packet("192.168.1.2", "11.77.0.2")
    for data in sent:
        mixed = bytearray(good)
        mixed[packets.HEADER + rng.randrange(20) :] = data
        for each in (data, bytes(mixed)):
            net.fabric.admit(net.fabric.ports["a"], each, 0.0)
    net.drain()
