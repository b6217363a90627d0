"""How true is the emulated network: are delays what was asked for, how fast is TCP, how soon is it up?

Method. Four questions, each in a network of its own; root is needed.
  rtt     Ten hosts, RTTs drawn evenly from 5 to 200 ms for each pair (seeded), nothing else in the network. From every
          host to every other one ICMP echo requests at random times (--pings per ordered pair, 20 a second from each
          host). Answers come from the kernel of the other host; their time is the kernel's time stamp at reception, so
          that no program's waking up is in it. Error = measured - asked for. The probing processes have real-time
          priority below the router's, so that a busy machine does not delay them between clock and packet.
  tcp     Two hosts at 0 ms, one TCP connection for three seconds, data of 256 KB per call; bits received per second.
  start   25 hosts: time from the request until the network is ready.
  cut     A host answers UDP; it is cut, and healed: how many of 20 requests it answers each time.
The router's own histogram of lateness is recorded with each run, and its share of a processor.

    python benchmarks/wan_accuracy.py [--quick] [--pings N] [--rounds N] [--seed N] [--out FILE]
"""

import argparse
import ctypes
import json
import os
import random
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

HOSTS = 10
START_HOSTS = 25
SHORTEST_MS, LONGEST_MS = 5.0, 200.0
_PING_RATE = 20.0
_TCP_S = 3.0
_CHUNK = 256 * 1024
_PORT = 4711
_SO_TIMESTAMPNS = 35
_PROBE_PRIORITY = 10
_Run = dict[str, Any]


def main() -> int:
    if sys.argv[1:2] == ["--probe"]:
        return _PROBES[sys.argv[2]](*sys.argv[3:])
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="one round, three pings per ordered pair")
    parser.add_argument("--pings", type=int, default=20, help="per ordered pair of hosts and round")
    parser.add_argument("--rounds", type=int, default=3, help="of each question, each with a seed of its own")
    parser.add_argument("--seed", type=int, default=1, help="of the RTTs and of the times of the pings")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "wan_accuracy.json")
    args = parser.parse_args()
    from provenance import write_results

    pings, rounds = (3, 1) if args.quick else (args.pings, args.rounds)
    runs: list[_Run] = []
    errors: list[float] = []
    for number in range(rounds):
        for run in _round(args.seed + number, pings, errors):
            runs.append({"round": number, **run})
            print(runs[-1], flush=True)
    write_results(args.out, summary=_summary(runs, errors), runs=runs, seed=args.seed)
    return 0


def _round(seed: int, pings: int, errors: list[float]) -> Iterator[_Run]:
    yield _start()
    run, found = _rtt(seed, pings)
    errors += found
    yield run
    yield _tcp()
    yield _cut()


def _start() -> _Run:
    from geopetals.wan import Wan, WanSpec

    began = time.monotonic()
    with Wan(WanSpec.uniform([f"h{number}" for number in range(START_HOSTS)], rtt_s=0.05)):
        return {"question": "start", "ready_s": time.monotonic() - began}


def _rtt(seed: int, pings: int) -> tuple[_Run, list[float]]:
    from geopetals.wan import HostSpec, LinkSpec, Wan, WanSpec

    rng = random.Random(seed)
    names = [f"h{number}" for number in range(HOSTS)]
    rtt_ms = {pair: rng.uniform(SHORTEST_MS, LONGEST_MS) for pair in combinations(names, 2)}
    rtt_ms |= {(end, start): value for (start, end), value in rtt_ms.items()}
    spec = WanSpec(
        hosts=tuple(HostSpec(name=name) for name in names),
        links={pair: LinkSpec(rtt_s=value / 1e3) for pair, value in rtt_ms.items()},
    )
    with Wan(spec) as wan:
        wan.reset()
        probes = [
            _probe(
                wan,
                name,
                "ping",
                pings,
                seed,
                *(f"{wan.addresses[to]}={rtt_ms[name, to]}" for to in names if to != name),
            )
            for name in names
        ]
        results = [json.loads(probe.communicate()[0]) for probe in probes]
        counts = wan.reset()
    errors = [error for result in results for error in result["errors_ms"]]
    run = {"question": "rtt", **_error_figures(errors), "lost": sum(result["lost"] for result in results)}
    return run | _router(counts), errors


def _tcp() -> _Run:
    from geopetals.wan import Wan, WanSpec

    with Wan(WanSpec.uniform(["a", "b"], rtt_s=0.0)) as wan:
        wan.reset()
        receiver = _probe(wan, "b", "receive")
        assert receiver.stdout is not None
        receiver.stdout.readline()
        sender = _probe(wan, "a", "send", wan.addresses["b"])
        sender.communicate()
        result = json.loads(receiver.communicate()[0])
        return {"question": "tcp", **result} | _router(wan.reset())


def _cut() -> _Run:
    from geopetals.wan import Wan, WanSpec

    answered = {}
    with Wan(WanSpec.uniform(["a", "b"], rtt_s=0.01)) as wan:
        echo = _probe(wan, "b", "echo")
        assert echo.stdout is not None
        echo.stdout.readline()
        for state in ("before", "cut", "healed"):
            if state == "cut":
                wan.cut("b")
            else:
                wan.heal()
            asking = _probe(wan, "a", "ask", wan.addresses["b"])
            answered[state] = int(asking.communicate()[0])
        echo.terminate()
        echo.communicate()
    return {"question": "cut", **{f"answers_{state}": count for state, count in answered.items()}}


def _probe(wan: Any, host: str, *arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, str(Path(__file__).absolute()), "--probe", *map(str, arguments)]
    found: subprocess.Popen[str] = wan.popen(host, command, stdout=subprocess.PIPE, text=True)
    return found


def _ping(count: str, seed: str, *targets: str) -> int:
    """Echo requests to ADDRESS=RTT_MS; prints errors in ms."""
    _take_priority()
    asked_ms = {address: float(rtt) for address, _, rtt in (target.partition("=") for target in targets)}
    rng = random.Random(int(seed) + os.getpid())
    todo = list(asked_ms) * int(count)
    rng.shuffle(todo)
    sent: dict[int, tuple[str, float]] = {}
    errors: list[float] = []
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as probe:
        probe.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        following = time.time() + rng.random()
        while todo or sent:
            wait_s = following - time.time()
            if todo and wait_s <= 0:
                number, address = len(todo), todo.pop()
                request = _echo_request(os.getpid() & 0xFFFF, number)
                sent[number] = (address, time.time())
                probe.sendto(request, (address, 0))
                following += rng.expovariate(_PING_RATE)
            elif select.select([probe], (), (), max(wait_s, 0) if todo else 2.0)[0]:
                _take_answer(probe, sent, asked_ms, errors)
            elif not todo:
                break
    print(json.dumps({"errors_ms": errors, "lost": len(sent)}))
    return 0


def _take_answer(
    probe: socket.socket, sent: dict[int, tuple[str, float]], asked_ms: dict[str, float], errors: list[float]
) -> None:
    packet, ancillary, _, _ = probe.recvmsg(2048, 256)
    kind, _, _, identifier, number = struct.unpack("!BBHHH", packet[20:28])
    if kind == 0 and identifier == os.getpid() & 0xFFFF and number in sent:
        address, sent_s = sent.pop(number)
        seconds, nanoseconds = struct.unpack("qq", ancillary[0][2][:16])
        errors.append((seconds - sent_s + nanoseconds / 1e9) * 1e3 - asked_ms[address])


def _echo_request(identifier: int, number: int) -> bytes:
    packet = struct.pack("!BBHHH", 8, 0, 0, identifier, number) + bytes(56)
    total = sum(struct.unpack(f"!{len(packet) // 2}H", packet))
    total = (total >> 16) + (total & 0xFFFF)
    checksum = ~(total + (total >> 16)) & 0xFFFF
    return packet[:2] + checksum.to_bytes(2) + packet[4:]


def _receive() -> int:
    with socket.create_server(("0.0.0.0", _PORT)) as server:
        print("ready", flush=True)
        connection, _ = server.accept()
        buffer, received, began = bytearray(_CHUNK), 0, time.monotonic()
        while count := connection.recv_into(buffer):
            received += count
        seconds = time.monotonic() - began
        connection.close()
    print(json.dumps({"mbit_per_s": received * 8 / seconds / 1e6}))
    return 0


def _send(address: str) -> int:
    data, end = bytes(_CHUNK), time.monotonic() + _TCP_S
    with socket.create_connection((address, _PORT)) as connection:
        while time.monotonic() < end:
            connection.sendall(data)
    return 0


def _echo() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("0.0.0.0", _PORT))
        print("ready", flush=True)
        while True:
            data, peer = server.recvfrom(2048)
            server.sendto(data, peer)


def _ask(address: str) -> int:
    answers = 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(0.1)
        for number in range(20):
            client.sendto(str(number).encode(), (address, _PORT))
            with suppress(TimeoutError):
                answers += client.recv(2048) == str(number).encode()
    print(answers)
    return 0


_PROBES: dict[str, Any] = {"ping": _ping, "receive": _receive, "send": _send, "echo": _echo, "ask": _ask}


def _take_priority() -> None:
    ctypes.CDLL(None).prctl(29, 1, 0, 0, 0)  # PR_SET_TIMERSLACK
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(_PROBE_PRIORITY))


def _error_figures(errors_ms: list[float]) -> dict[str, float]:
    off = np.abs(errors_ms)
    return {
        "rtt_error_ms_mean": float(np.mean(off)),
        "rtt_error_ms_mean_signed": float(np.mean(errors_ms)),
        **{f"rtt_error_ms_p{q}": float(np.percentile(off, q)) for q in (50, 90, 99)},
        "rtt_error_ms_max": float(off.max()),
        "pings": len(errors_ms),
    }


def _router(counts: dict[str, Any]) -> _Run:
    return {"router_cpu_share": counts["router_cpu_share"], "lateness": counts["lateness"]}


def _summary(runs: list[_Run], errors_ms: list[float]) -> dict[str, float]:
    def values(question: str, figure: str) -> list[float]:
        return [run[figure] for run in runs if run["question"] == question]

    return {
        **_error_figures(errors_ms),
        "pings_lost": sum(values("rtt", "lost")),
        "tcp_mbit_per_s_min": min(values("tcp", "mbit_per_s")),
        "tcp_mbit_per_s_median": float(np.median(values("tcp", "mbit_per_s"))),
        "start_25_hosts_s_max": max(values("start", "ready_s")),
        "answers_before_min": min(values("cut", "answers_before")),
        "answers_cut_max": max(values("cut", "answers_cut")),
        "answers_healed_min": min(values("cut", "answers_healed")),
    }


if __name__ == "__main__":
    sys.exit(main())
