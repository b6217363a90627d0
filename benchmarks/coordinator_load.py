"""How many tickets can a coordinator give out per second, messages, signatures and the disk included?

Method. The coordinator's own parts (control channels, desk, core, journal with a sync of the disk for each group of
events, Ed25519 tickets) run in a process of their own; 200 servers and 50 clients, all scripts in this process, speak
to it over control channels on loopback TCP (p2pd's hop is left out: benchmarks/hop_overhead.py has its cost). The
servers register, are assigned blocks of a model of 80, and report every 2 s. Clients ask for sessions until 2,000 are
in progress. Then sessions are closed and asked for at a fixed rate, each closing the oldest one: latency is from the
question to the ticket. `tickets_per_cpu_s` is what one core could do: tickets / processor time of the coordinator,
ticks, reports and pings included; it does not depend on what else the machine does, the latency does:
`coordinator_waited_share` is the part of the time in which the coordinator could have gone on and other processes had
the cores, the scripts of this benchmark included. Plans are made in a process of their own, as in a coordinator that
people run, and take what is left of the cores.
`coordinator_core.py` has the share of the core alone.

    python benchmarks/coordinator_load.py [--quick] [--out FILE]
"""

import argparse
import asyncio
import json
import math
import os
import random
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import psutil
from provenance import percentiles, write_results

from geopetals.client.runtime import new_event_loop
from geopetals.coordinator import messages as m
from geopetals.coordinator.admin import Admin, View
from geopetals.coordinator.core import Core, ModelFacts, Settings
from geopetals.coordinator.desk import Desk
from geopetals.coordinator.engine import Engine
from geopetals.coordinator.entrance import Entrance, SwarmFacts
from geopetals.coordinator.members import Members
from geopetals.coordinator.pace import keep_pace
from geopetals.coordinator.packed import unpack_answer
from geopetals.coordinator.service import Service
from geopetals.coordinator.store import Store
from geopetals.credentials import ledger
from geopetals.credentials.authority import Authority
from geopetals.credentials.certificate import Role
from geopetals.credentials.keys import SigningKey
from geopetals.credentials.peer_ids import peer_of_key
from geopetals.errors import GeoPetalsError
from geopetals.swarm.control import ControlChannel
from geopetals.swarm.identity import ModelIdentity

_SEED = 20251221
_CLIENTS = 50
_IDENTITY = ModelIdentity(model="model", config_hash="0" * 64, revision=None, fingerprint="1" * 64)
_MODEL = ModelFacts(
    name="model",
    num_blocks=80,
    hidden_size=8192,
    block_bytes=430_000_000,
    kv_bytes_per_token=4096,
    hidden_bytes_per_token=16384,
)
_SETTLE_TIMEOUT_S = 300.0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="20 servers, 200 sessions in progress, one run")
    parser.add_argument("--rate", type=float, default=500.0, help="tickets asked for per second (default: 500)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "coordinator_load.json")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(_serve(args.serve))
        return 0
    servers, sessions, asked = (20, 200, 1_000) if args.quick else (200, 2_000, 5_000)
    runs, latency_ms = [], []
    for number in range(1 if args.quick else 3):
        run, each_ms = asyncio.run(_measure(_SEED + number, servers, sessions, asked, args.rate))
        runs.append(run)
        latency_ms += each_ms
        print(run, flush=True)
    summary = {
        "tickets_per_cpu_s_min": min(run["tickets_per_cpu_s"] for run in runs),
        "tickets_per_s_min": min(run["tickets_per_s"] for run in runs),
        **percentiles("latency_ms", latency_ms),
    }
    write_results(args.out, summary=summary, runs=runs, seed=_SEED)
    return 0


async def _serve(folder: Path) -> None:
    """The coordinator: prints its port and the tokens, and serves until stdin ends."""
    authority = Authority(folder)
    authority.describe_swarm(
        ledger.SwarmFacts(
            swarm="swarm",
            model="model",
            identity=_IDENTITY.to_dict(),
            coordinator_peer_id=_peer(0),
            addresses=(f"/ip4/127.0.0.1/tcp/1/p2p/{_peer(0)}",),
        )
    )
    facts = SwarmFacts(swarm="swarm", model="model", identity=_IDENTITY, num_blocks=80, is_open=False)
    reader, journal = Store(folder / "coordinator.db"), Store(folder / "coordinator.db")
    engine = Engine(Core(_MODEL, Settings(plan_inline=False, queue_per_client=1000)), journal, clock=time.time)
    engine.recover()
    members, entrance = Members(), Entrance(authority, facts, clock=time.time)
    desk = Desk(engine, entrance, members)
    engine.perform = desk.perform
    view = View(engine, entrance, members, reader, _peer(0))
    service = Service(engine, entrance, members, desk, Admin(view, engine, entrance, desk.expel_revoked))

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer_id = (await reader.readline()).decode().strip()
        await service.serve(ControlChannel(reader, writer, peer_id, on_call=_nothing, on_notify=_ignore))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    tokens = {role: authority.create_token(Role(role)).encode() for role in ("server", "client", "admin")}
    keep_pace()
    ticking = asyncio.create_task(engine.run())  # kept: the loop does not
    print(json.dumps({"port": server.sockets[0].getsockname()[1], "tokens": tokens}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    assert not ticking.done()
    os._exit(0)  # nobody waits for the members' channels


class _Load:
    """All members of one run."""

    def __init__(self, port: int, tokens: dict[str, str], seed: int) -> None:
        self._port, self._tokens, self.random = port, tokens, random.Random(seed)
        self.clients: list[ControlChannel] = []
        self.open: deque[tuple[ControlChannel, str]] = deque()
        self.latency_ms: list[float] = []
        self.queued = self.refused = self._names = 0
        self._tasks: list[asyncio.Task[None]] = []

    async def join(self, number: int, role: m.Role, on_call: Any = None) -> ControlChannel:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        peer_id = _peer(number)
        writer.write(f"{peer_id}\n".encode())
        channel = ControlChannel(reader, writer, _peer(0), on_call=on_call or _nothing, on_notify=_ignore)
        channel.start()
        hello = m.Hello(version=m.VERSION, role=role, token=self._tokens[role])
        await channel.call("hello", hello.to_dict(), timeout_s=60)
        return channel

    async def add_server(self, number: int) -> None:
        server = _Server(self.random)
        channel = await self.join(number, "server", server.on_call)
        raw = await channel.call("register", server.register.to_dict(), timeout_s=60)
        registered = m.Registered.from_dict(raw)
        server.epoch, server.span = registered.epoch, registered.span
        self._tasks.append(asyncio.create_task(server.keep_reporting(channel)))

    async def ask(self) -> None:
        """One session more; its latency counts if it is admitted at once."""
        self._names += 1
        channel = self.clients[self._names % len(self.clients)]
        prompt, output = self.random.randint(16, 512), self.random.randint(16, 256)
        request = m.Open(
            session_id=f"n{self._names}",
            batch=1,
            max_length=prompt + output,
            prompt_tokens=prompt,
            output_tokens=output,
        )
        began = time.perf_counter()
        try:
            opened = m.Opened.from_dict(await channel.call("open", request.to_dict(), timeout_s=60))
        except GeoPetalsError:
            self.refused += 1
            return
        self.open.append((channel, request.session_id))
        if opened.status == "admitted":
            self.latency_ms.append(1000 * (time.perf_counter() - began))
        else:
            self.queued += 1

    def end(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def close_oldest(self) -> None:
        if self.open:
            channel, name = self.open.popleft()
            await channel.call("close", m.Close(session_id=name).to_dict(), timeout_s=60)

    async def replace(self) -> None:
        await self.close_oldest()
        await self.ask()


class _Server:
    """Loads what it is told in no time, and has cache for many sessions."""

    def __init__(self, rng: random.Random) -> None:
        self.epoch, self.span = 0, None
        speed, blocks = rng.choice([1.0, 2.0, 4.0]), rng.randint(6, 20)
        self._memory = int(blocks * _MODEL.block_bytes + rng.uniform(1.6e10, 3.2e10))
        profile = m.Profile(
            device="gpu",
            dtype="bfloat16",
            quantization=None,
            block_bytes=_MODEL.block_bytes,
            kv_bytes_per_token=_MODEL.kv_bytes_per_token,
            memory_bytes=self._memory,
            decode=(m.DecodeSample(1, 128, 0.001 * speed), m.DecodeSample(16, 128, 0.002 * speed)),
            prefill=(m.PrefillSample(16, 0.002 * speed), m.PrefillSample(512, 0.02 * speed)),
            overhead_s=0.001,
        )
        limits = m.Limits(memory_bytes=self._memory, max_blocks=blocks)
        self.register = m.Register(
            profile=profile, limits=limits, held=None, epoch=0, name="server", addresses=(), relayed=False, wire=1
        )

    async def on_call(self, method: str, body: dict[str, Any]) -> dict[str, Any]:
        assigned = m.Assign.from_dict(body)
        self.epoch, self.span = assigned.epoch, assigned.span
        return m.Assigned(accepted=True).to_dict()

    async def keep_reporting(self, channel: ControlChannel) -> None:
        while True:
            total = 0
            if self.span is not None:
                held = (self.span.end - self.span.start) * _MODEL.block_bytes
                total = (self._memory - held) // _MODEL.kv_bytes_per_token
            report = m.Report(
                epoch=self.epoch,
                state="joining" if self.span is None else "ready",
                span=self.span,
                cache=m.CacheUse(total=total, free=total, running=0, waiting=0),
            )
            await channel.call("report", report.to_dict(), timeout_s=120)
            await asyncio.sleep(m.REPORT_S)


async def _measure(
    seed: int, servers: int, sessions: int, asked: int, rate_per_s: float
) -> tuple[dict[str, Any], list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        command = (sys.executable, __file__, "--serve", folder)
        pipe = asyncio.subprocess.PIPE
        child = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            told = json.loads(await child.stdout.readline())
            load = _Load(told["port"], told["tokens"], seed)
            try:
                return await _run(load, psutil.Process(child.pid), servers, sessions, asked, rate_per_s)
            finally:
                load.end()
        finally:
            child.stdin.close()
            await child.wait()


async def _run(
    load: _Load, coordinator: psutil.Process, servers: int, sessions: int, asked: int, rate_per_s: float
) -> tuple[dict[str, Any], list[float]]:
    for number in range(servers):
        await load.add_server(1 + number)
    load.clients = [await load.join(10_000 + number, "client") for number in range(_CLIENTS)]
    admin = await load.join(20_000, "admin")
    await _until_settled(admin)
    for start in range(0, sessions, 20):
        await asyncio.gather(*(load.ask() for _ in range(min(20, sessions - start))))
    load.latency_ms.clear()
    load.queued = load.refused = 0
    before, waited_s, began = _cpu_s(coordinator), _waited_s(coordinator), time.perf_counter()
    tasks = []
    for number in range(asked):
        await asyncio.sleep(max(0.0, began + number / rate_per_s - time.perf_counter()))
        tasks.append(asyncio.create_task(load.replace()))
    await asyncio.gather(*tasks)
    wall_s, cpu_s = time.perf_counter() - began, _cpu_s(coordinator) - before
    waited_s = _waited_s(coordinator) - waited_s
    status = unpack_answer(await admin.call("status", {}, timeout_s=60))
    run = {
        "servers": servers,
        "in_progress": status["running"],
        "tickets": len(load.latency_ms),
        "queued": load.queued,
        "refused": load.refused,
        "tickets_per_s": len(load.latency_ms) / wall_s,
        "tickets_per_cpu_s": len(load.latency_ms) / cpu_s,
        "coordinator_cpu_share": cpu_s / wall_s,
        "coordinator_waited_share": waited_s / wall_s,
    }
    return run, load.latency_ms


async def _until_settled(admin: ControlChannel) -> None:
    """All blocks are served, and no plan is under way."""
    deadline = time.monotonic() + _SETTLE_TIMEOUT_S
    while time.monotonic() < deadline:
        status = unpack_answer(await admin.call("status", {}, timeout_s=120))
        if status["covered"] and not status["plan_due"] and status["plan"]:
            return
        await asyncio.sleep(1)
    raise TimeoutError("the swarm has not settled")


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _waited_s(process: psutil.Process) -> float:
    """How long its event loop has waited for a core that another process had; NaN where the system does not tell."""
    try:
        return int(Path(f"/proc/{process.pid}/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return math.nan


def _peer(number: int) -> str:
    return peer_of_key(SigningKey(number.to_bytes(32, "big")).public)


async def _nothing(method: str, body: dict[str, Any]) -> dict[str, Any]:
    raise ValueError(f"{method} is not answered here")


def _ignore(method: str, body: dict[str, Any]) -> None:
    """Notifications are not counted."""


if __name__ == "__main__":
    sys.exit(main())
