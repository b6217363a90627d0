"""How many sessions per second does the simulator get through on one core, with 200 servers?

Method. A random swarm of 200 servers (large_swarm.py) and ten clients, 128 tokens to generate; a decode step of b
sessions takes 70 % + 30 % b of a single one's. Servers are placed once, for each policy by its own rule (GeoPETALS with
one step of its search: placing is another benchmark's subject), and not timed. Sessions come by Poisson's law at a rate
that keeps `IN_PROGRESS` of them in service if nothing slows them down. Timed is simulate() with the placement given:
drawing the sessions, every event, all figures. Without contention for compute, with it, and with it and prompts and
answers of lognormal lengths. Three seeds. The time is that of the processor, because other processes may share it.

The baseline in the same run is WS-RR by relay on an empty swarm of the same size: route + open + close and no more.
The goal is 3,000 sessions/s.

    python benchmarks/simulator_speed.py [--quick] [--out FILE]
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from large_swarm import large_swarm
from provenance import write_results

from geopetals.placement.petals import PetalsServers
from geopetals.plan import Placement
from geopetals.problem import Contention, OneWayDelays, Problem, PushDelays
from geopetals.routing.petals import PingTimes
from geopetals.routing.state import RouterState
from geopetals.simulation import Load, Scenario, World, policy, simulate
from geopetals.simulation.lengths import Lengths
from geopetals.simulation.policies import Planned, Policy
from geopetals.simulation.world import StockFacts, Tokens

_SERVERS, _CLIENTS, _SEED, IN_PROGRESS = 200, 10, 20251221, 50
_PROMPT, _OUTPUT = 220, 128
_POLICIES = ("petals", "paper", "geopetals")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="one seed, 1,000 sessions")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "simulator_speed.json")
    args = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for number in range(1 if args.quick else 3):
        runs += _runs(_SEED + number, sessions=1_000 if args.quick else 4_000)
    summary = {}
    for kind in dict.fromkeys(run["kind"] for run in runs):
        rates = [run["sessions_per_s"] for run in runs if run["kind"] == kind]
        summary[f"{kind}_sessions_per_s_median"] = float(np.median(rates))
        summary[f"{kind}_sessions_per_s_min"] = min(rates)
    write_results(args.out, summary=summary, runs=runs, seed=_SEED)
    return 0


def _runs(seed: int, *, sessions: int) -> list[dict[str, Any]]:
    world = _world(seed)
    runs = [{"kind": "route_open_close", "seed": seed, "sessions_per_s": _baseline(world, sessions // 4)}]
    lognormal = {
        "prompt": Lengths(kind="lognormal", median=_PROMPT // 2, sigma=0.8, most=4 * _PROMPT),
        "output": Lengths(kind="lognormal", median=_OUTPUT // 2, sigma=0.8, most=4 * _OUTPUT),
    }
    for name in _POLICIES:
        chosen = policy(name)
        chosen = replace(chosen, steps=1) if isinstance(chosen, Planned) else chosen
        placed = _Placed(chosen, chosen.place(world, seed))
        load = Load(sessions=sessions)
        for kind, each, contention in (
            ("alone", load, False),
            ("contended", load, True),
            ("contended_lognormal", replace(load, **lognormal), True),
        ):
            run = _timed(world, Scenario(load=each, contention=contention), placed, seed)
            runs.append({"kind": f"{name}_{kind}", "seed": seed, **run})
            print(runs[-1], flush=True)
    return runs


class _Placed:
    """A policy whose servers are placed already."""

    def __init__(self, chosen: Policy, placement: Placement) -> None:
        self._placement = placement
        self.name, self.slots, self.desk, self.join = chosen.name, chosen.slots, chosen.desk, chosen.join

    def place(self, world: World, seed: int) -> Placement:
        del world, seed
        return self._placement


def _timed(world: World, scenario: Scenario, placed: _Placed, seed: int) -> dict[str, Any]:
    start = time.process_time()
    result = simulate(world, scenario, placed, seed)
    summary = result.summary()
    cpu_s = time.process_time() - start
    return {
        "sessions_per_s": result.log.arrival_s.size / cpu_s,
        "max_concurrent": result.max_concurrent,
        "completed": result.counted["completed"],
        **{name: summary[name] for name in ("ttft_p50_s", "tpot_p50_s", "wait_p99_s", "compute_use_max")},
    }


def _baseline(world: World, sessions: int) -> float:
    state = RouterState(world.problem, policy("paper").place(world, 0))
    start = time.process_time()
    for number in range(sessions):
        state.close(state.open(state.route(number % _CLIENTS, float(number)), float(number)), float(number))
    return sessions / (time.process_time() - start)


def _world(seed: int) -> World:
    rng = np.random.default_rng(seed)
    plain = large_swarm(_SERVERS, clients=_CLIENTS, seed=seed)
    between_s = rng.uniform(0.01, 0.05, (_SERVERS, _SERVERS))
    delays = OneWayDelays(
        from_client_s=plain.relay_decode_s / 2, between_s=between_s, to_client_s=plain.relay_decode_s.T / 2
    )
    problem = replace(
        plain,
        prefill_block_s=4 * plain.decode_block_s,
        push=PushDelays(decode=delays, prefill=delays),
        contention=Contention(floor_s=0.7 * plain.decode_block_s, session_s=0.3 * plain.decode_block_s),
        demand_per_s=np.full(_CLIENTS, IN_PROGRESS / 45 / _CLIENTS),
    )
    stock = StockFacts(
        servers=PetalsServers(
            hidden_size=14336, forward_rps=1 / plain.decode_block_s, network_rps=np.full(_SERVERS, 500.0)
        ),
        pings=PingTimes(client_s=plain.relay_decode_s, between_s=2 * between_s),
    )
    one_token: Problem = replace(problem, prefill_block_s=problem.decode_block_s)
    tokens = Tokens(prompt=_PROMPT, output=_OUTPUT, other_prompt=1, other=one_token)
    return World(problem=problem, stock=stock, tokens=tokens)


if __name__ == "__main__":
    sys.exit(main())
