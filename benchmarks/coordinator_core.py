"""How many sessions can the coordinator's decision core admit per second, with 200 servers and 2,000 in progress?

Method. 200 servers with random speed and memory on a random map, for a model of 80 blocks; 200 clients that have
measured 16 servers each; all else is estimated. The core plans, all servers report that they are ready, and sessions of
random sizes are asked for until 2,000 are in progress. Then each step closes one of the oldest and asks for a new one:
the time of both events is one decision. `full` does the same with memory for fewer sessions, so that some hundred wait.
Servers report every 2 s of simulated time, ticks come every 0.5 s; both are in the rate, not in the percentiles.
Nothing is sent anywhere: what messages, signatures and the disk cost is measured by coordinator_load.py. Rates are of
processor time, because other processes may share it; percentiles are by the wall clock.

    python benchmarks/coordinator_core.py [--quick] [--out FILE]
"""

import argparse
import random
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from provenance import percentiles, write_results

from geopetals.coordinator.core import Core, ModelFacts, Settings
from geopetals.coordinator.core import actions as act
from geopetals.coordinator.core import events as ev
from geopetals.coordinator.messages import (
    CacheUse,
    DecodeSample,
    Limits,
    LinkSample,
    Measured,
    Open,
    PrefillSample,
    Profile,
    Register,
    Report,
    SessionUse,
)

_SERVERS, _CLIENTS, _IN_PROGRESS, _SEED = 200, 200, 2_000, 20251221
_RATE_PER_S = 500.0
_MODEL = ModelFacts(
    name="model",
    num_blocks=80,
    hidden_size=8192,
    block_bytes=430_000_000,
    kv_bytes_per_token=4096,
    hidden_bytes_per_token=16384,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="one seed, 500 decisions")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "coordinator_core.json")
    args = parser.parse_args()
    runs, times_ms = [], {"free": [], "full": []}
    for kind, each_ms in times_ms.items():
        for number in range(1 if args.quick else 3):
            run, found_ms = _measure(kind, _SEED + number, 500 if args.quick else 5_000)
            each_ms += found_ms
            runs.append(run)
            print(run, flush=True)
    summary: dict[str, float] = {}
    for kind, each_ms in times_ms.items():
        rates = [run["decisions_per_s"] for run in runs if run["kind"] == kind]
        summary[f"{kind}_decisions_per_s_min"] = min(rates)
        summary |= percentiles(f"{kind}_decision_wall_ms", each_ms)
    write_results(args.out, summary=summary, runs=runs, seed=_SEED)
    return 0


class _Swarm:
    """Members that do what they are told at once."""

    def __init__(self, kind: str, seed: int) -> None:
        self.rng = random.Random(seed)
        self.core = Core(
            _MODEL, Settings(queue_length=2_000, queue_per_client=200, queue_wait_s=1e6, arrivals_per_s=40)
        )
        self.now = 1e6
        self.used: dict[str, dict[str, int]] = {}
        self.spans: dict[str, Any] = {}
        self.memory: dict[str, int] = {}
        self.open: deque[str] = deque()
        self.admitted: deque[tuple[str, str]] = deque()
        self.chains: dict[str, act.Admitted] = {}
        self.count, self.queued = 0, 0
        self.place = {
            f"{role}{n}": (self.rng.random(), self.rng.random())
            for role, m in (("s", _SERVERS), ("c", _CLIENTS))
            for n in range(m)
        }
        roomy = 1.0 if kind == "free" else 0.35
        for number in range(_SERVERS):
            self._join(f"s{number}", roomy)
        self.now += 20
        self.tell(ev.Tick())
        for number in range(_CLIENTS):
            name = f"c{number}"
            near = self.rng.sample(range(_SERVERS), 16)
            self.tell(ev.ClientSeen(client=name, links=tuple(self._link(name, f"s{other}") for other in near)))
        self.now += 2
        self.tell(ev.Tick())

    def tell(self, event: ev.Event) -> tuple[act.Action, ...]:
        actions = self.core.apply(event, self.now)
        for action in actions:
            if isinstance(action, act.Admitted):
                self.admitted.append((action.client, action.session_id))
            elif isinstance(action, act.Assign):
                self.spans[action.peer] = action
                self.report(action.peer)
        return actions

    def ask(self) -> None:
        self.count += 1
        prompt, output = self.rng.randint(16, 512), self.rng.randint(16, 256)
        asked = Open(
            session_id=f"n{self.count}", batch=1, max_length=prompt + output, prompt_tokens=prompt, output_tokens=output
        )
        self.tell(ev.SessionAsked(client=f"c{self.rng.randrange(_CLIENTS)}", open=asked))

    def close(self) -> None:
        client, session_id = self.admitted.popleft()
        self.tell(ev.SessionClosed(client=client, session_id=session_id, measured=Measured(tokens=64)))

    def report(self, peer: str) -> None:
        action = self.spans.get(peer)
        if action is None or action.span is None:
            return
        blocks = action.span.end - action.span.start
        total = (self.memory[peer] - blocks * _MODEL.block_bytes) // _MODEL.kv_bytes_per_token
        report = Report(
            epoch=action.epoch,
            state="ready",
            span=action.span,
            cache=CacheUse(total=total, free=total, running=0, waiting=0),
            sessions=tuple(SessionUse(name, tokens, 1) for name, tokens in self.used.get(peer, {}).items()),
        )
        self.core.apply(ev.ServerReported(peer=peer, report=report), self.now)

    def _join(self, peer: str, roomy: float) -> None:
        speed = self.rng.choice([1.0, 2.0, 4.0])
        blocks = self.rng.randint(6, 20)
        self.memory[peer] = int(blocks * _MODEL.block_bytes + roomy * self.rng.uniform(8e9, 16e9))
        profile = Profile(
            device="gpu",
            dtype="bfloat16",
            quantization=None,
            block_bytes=_MODEL.block_bytes,
            kv_bytes_per_token=_MODEL.kv_bytes_per_token,
            memory_bytes=self.memory[peer],
            decode=(DecodeSample(1, 128, 0.001 * speed), DecodeSample(16, 128, 0.002 * speed)),
            prefill=(PrefillSample(16, 0.002 * speed), PrefillSample(512, 0.02 * speed)),
            overhead_s=0.001,
        )
        limits = Limits(memory_bytes=self.memory[peer], max_blocks=blocks)
        register = Register(
            profile=profile, limits=limits, held=None, epoch=0, name=peer, addresses=(), relayed=False, wire=1
        )
        self.tell(ev.ServerRegistered(peer=peer, register=register))
        known = [other for other in self.place if other[0] == "s" and other in self.memory and other != peer]
        near = self.rng.sample(known, min(16, len(known)))
        self.tell(ev.LinksMeasured(peer=peer, links=tuple(self._link(peer, other) for other in near)))

    def _link(self, one: str, other: str) -> LinkSample:
        here, there = self.place[one], self.place[other]
        return LinkSample(other, 0.005 + 0.15 * float(np.hypot(here[0] - there[0], here[1] - there[1])), False)


def _measure(kind: str, seed: int, decisions: int) -> tuple[dict[str, Any], list[float]]:
    start = time.process_time()
    swarm = _Swarm(kind, seed)
    setup_s = time.process_time() - start
    while len(swarm.admitted) < _IN_PROGRESS and swarm.count < 3 * _IN_PROGRESS:
        if kind == "full" and len(swarm.core.desk.waiting) >= 300:
            break
        swarm.ask()
        swarm.now += 1 / _RATE_PER_S
    each_ms: list[float] = []
    began, began_s = time.process_time(), swarm.now
    spent_other = 0.0
    next_tick, next_report, report_number = swarm.now, swarm.now, 0
    for _ in range(decisions):
        wall = time.perf_counter()
        swarm.close()
        swarm.ask()
        each_ms.append((time.perf_counter() - wall) * 1000)
        swarm.now += 1 / _RATE_PER_S
        other = time.process_time()
        while swarm.now >= next_report:
            swarm.report(f"s{report_number % _SERVERS}")
            report_number, next_report = report_number + 1, next_report + 2 / _SERVERS
        if swarm.now >= next_tick:
            swarm.tell(ev.Tick())
            next_tick += 0.5
        spent_other += time.process_time() - other
    cpu_s = time.process_time() - began
    desk = swarm.core.desk
    run = {
        "kind": kind,
        "seed": seed,
        "decisions_per_s": decisions / cpu_s,
        "cpu_share_of_reports_and_ticks": spent_other / cpu_s,
        "simulated_s": swarm.now - began_s,
        "in_progress": sum(session.admitted for session in desk.sessions.values()),
        "waiting": len(desk.waiting),
        "counts": dict(desk.notices.counts),
        "setup_cpu_s": setup_s,
    }
    return run, each_ms


if __name__ == "__main__":
    sys.exit(main())
