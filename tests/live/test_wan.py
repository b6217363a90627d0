"""Emulated networks: delays, cuts, losses and NATs."""

import dataclasses
import hashlib
import os
import subprocess
import sys
from itertools import permutations

import pytest

from geopetals.wan import HostSpec, LinkSpec, Nat, Wan, WanSpec
from tests.live.wan_programs import AB, ask, echo, running, why_not

if reason := why_not():
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.live


def test_packets_take_the_time_that_was_asked_for() -> None:
    with Wan(AB) as wan, echo(wan, "b"):
        for rtt_s in (0.05, 0.15):
            wan.set("a-b", rtt_s=rtt_s)
            for _, seconds, *_ in ask(wan, "a", "b", count=3):
                assert rtt_s <= seconds < rtt_s + 5
        late = wan.lateness()
        assert late["packets"] == 12
        assert wan.reset()["lateness"] == late
        assert wan.lateness()["packets"] == 0


def test_dilation_makes_delays_longer() -> None:
    with Wan(dataclasses.replace(AB, dilation=4.0)) as wan, echo(wan, "b"):
        ((_, seconds, *_),) = ask(wan, "a", "b")
        assert 0.2 <= seconds < 5
        assert wan.links("a>b")[0]["rtt_s"] == 0.05


def test_a_cut_host_is_cut_and_healed_it_is_back() -> None:
    with Wan(WanSpec.uniform(["a", "b", "c"], rtt_s=0.0)) as wan, echo(wan, "b"), echo(wan, "c"):
        wan.cut("b")
        assert [peer for peer, *_ in ask(wan, "a", "b", "c", timeout_s=2)] == [wan.addresses["c"]]
        wan.heal("b")
        wan.cut("a>c")
        assert [peer for peer, *_ in ask(wan, "a", "b", "c", timeout_s=2)] == [wan.addresses["b"]]
        assert [peer for peer, *_ in ask(wan, "b", "c")] == [wan.addresses["c"]]
        wan.heal()
        assert len(ask(wan, "a", "b", "c")) == 2


def test_nats_show_ports_of_their_kind() -> None:
    hosts = (
        HostSpec(name="kept", nat=Nat.PORT_PRESERVING),
        HostSpec(name="changed", nat=Nat.SYMMETRIC),
        *(HostSpec(name=name) for name in ("x", "y", "z")),
    )
    links = {pair: LinkSpec(rtt_s=0.0) for pair in permutations([host.name for host in hosts], 2)}
    with Wan(WanSpec(hosts=hosts, links=links)) as wan, echo(wan, "x"), echo(wan, "y"), echo(wan, "z"):
        seen = {host: ask(wan, host, "x", "y", "z") for host in ("kept", "changed")}
        for host, answers in seen.items():
            assert [peer for peer, *_ in answers] == [wan.addresses[peer] for peer in "xyz"]
            assert {address for _, _, address, _ in answers} == {wan.addresses[host]}
            assert wan.own_addresses[host].startswith("192.168.")
        assert [port for *_, port in seen["kept"]] == [5555] * 3
        assert len({port for *_, port in seen["changed"]} - {5555}) >= 2
        with echo(wan, "kept"):
            assert ask(wan, "x", "kept", timeout_s=0.3) == []


def test_two_hosts_behind_port_preserving_nats_punch_holes() -> None:
    hosts = tuple(HostSpec(name=name, nat=Nat.PORT_PRESERVING) for name in "ab")
    with Wan(WanSpec(hosts=hosts, links=dict.fromkeys(permutations("ab", 2), LinkSpec(rtt_s=0.02)))) as wan:
        program = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as punch:
    punch.bind(("0.0.0.0", 6000))
    punch.settimeout(0.05)
    heard = None
    for _ in range(200):
        punch.sendto(b"hole", (sys.argv[1], 6000))
        if heard:
            break  # the other side hears this one, too
        try:
            heard = punch.recvfrom(99)[1]
        except TimeoutError:
            pass
print(heard == (sys.argv[1], 6000))
"""
        command = [sys.executable, "-c", program]
        both = [
            wan.popen(host, [*command, wan.addresses[other]], stdout=subprocess.PIPE, text=True)
            for host, other in ("ab", "ba")
        ]
        assert [process.communicate(timeout=60)[0] for process in both] == ["True\n", "True\n"]


def test_losses_are_about_as_many_as_asked_for() -> None:
    with Wan(AB) as wan, echo(wan, "b"):
        wan.set("a>b", loss=0.5, rtt_s=0)
        wan.set("b>a", rtt_s=0)
        answers = len(ask(wan, "a", "b", count=100, timeout_s=0.05))
        run = wan.status()["run"]
        assert answers <= 90
        assert 20 <= run["dropped"]["lost"] <= 80


@pytest.mark.parametrize("behind_nat", [False, True], ids=["public", "nat"])
@pytest.mark.parametrize("change", [{}, {"loss": 0.01}, {"bandwidth_bit_per_s": 200e6}], ids=["plain", "loss", "slow"])
def test_tcp_brings_every_byte(behind_nat: bool, change: dict[str, float]) -> None:
    hosts = (HostSpec(name="a", nat=Nat.SYMMETRIC if behind_nat else None), HostSpec(name="b"))
    data = os.urandom(4_000_000)
    receive = """
import hashlib, socket
with socket.create_server(("0.0.0.0", 4711)) as server:
    print("ready", flush=True)
    connection, _ = server.accept()
    digest = hashlib.sha256()
    while data := connection.recv(1 << 16):
        digest.update(data)
    print(digest.hexdigest(), flush=True)
"""
    send = "import socket, sys; socket.create_connection((sys.argv[1], 4711)).sendall(sys.stdin.buffer.read())"
    spec = WanSpec(hosts=hosts, links=dict.fromkeys(permutations("ab", 2), LinkSpec(rtt_s=0.002)))
    with Wan(spec) as wan, running(wan, "b", receive) as receiver:
        if change:
            wan.set("a-b", **change)
        wan.run("a", [sys.executable, "-c", send, wan.addresses["b"]], input=data, check=True, timeout=60)
        assert receiver.stdout is not None
        assert receiver.stdout.readline().strip() == hashlib.sha256(data).hexdigest()


def test_networks_of_several_names_do_not_meet() -> None:
    with Wan(AB) as one, Wan(AB) as two, echo(one, "b"):
        assert one.addresses == two.addresses
        assert len(ask(one, "a", "b")) == 1
        assert ask(two, "a", "b", timeout_s=0.3) == []


def test_a_host_may_delete_its_device_and_the_others_go_on() -> None:
    hosts = WanSpec.uniform(["a", "b", "c"], rtt_s=0.0)
    delete = """
import fcntl, os, socket, struct
with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as route:
    body = struct.pack("BBHiII", 0, 0, 0, socket.if_nametoindex("wan0"), 0, 0)
    route.send(struct.pack("IHHII", 16 + len(body), 17, 5, 1, 0) + body)
    route.recv(4096)
"""
    with Wan(hosts) as wan, echo(wan, "b"), echo(wan, "c"):
        wan.run("c", [sys.executable, "-c", delete], check=True, timeout=60)
        assert [peer for peer, *_ in ask(wan, "a", "c", "b", timeout_s=2)] == [wan.addresses["b"]]
        assert wan.reset()["router_cpu_share"] < 0.9
