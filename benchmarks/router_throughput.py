"""How many sessions can one core route per second at 2,000 servers with 10,000 sessions in progress?

Method. A random swarm (large_swarm.py) placed by CG-BP for 50 sessions at once; ten clients. Sessions are opened until
10,000 are in progress. Then each step closes the session that ends first and routes and opens a new one at that
instant, so that 10,000 stay in progress: one decision is route + open + close. Three seeds, 3 s each. The time is that
of the processor, because other processes may share it; the wall-clock rate is given too.

The baseline, on the same states in the same run, is Dijkstra's algorithm on the graph whose nodes are servers, with the
waits given: it has to find the same cost, which is checked, and neither opens nor closes.

    python benchmarks/router_throughput.py [--quick] [--out FILE]
"""

import argparse
import heapq
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from large_swarm import large_swarm
from provenance import percentiles, write_results

from geopetals.placement.cg_bp import cg_bp
from geopetals.plan import Reservation
from geopetals.routing.state import RouterState

_CLIENTS, _SERVERS, _IN_PROGRESS, _SESSIONS = 10, 2_000, 10_000, 50
_SEED = 20251221


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="one seed, 1 s")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "router_throughput.json")
    args = parser.parse_args()
    runs, decision_ms = [], []
    for number in range(1 if args.quick else 3):
        run, each_ms = _measure(_SEED + number, seconds=1.0 if args.quick else 3.0)
        decision_ms += each_ms
        runs.append(run)
        print(run, flush=True)
    summary = {
        "decisions_per_s_median": float(np.median([run["decisions_per_s"] for run in runs])),
        "decisions_per_s_min": min(run["decisions_per_s"] for run in runs),
        "dijkstra_per_s_median": float(np.median([run["dijkstra_per_s"] for run in runs])),
        **percentiles("decision_wall_ms", decision_ms),
    }
    write_results(args.out, summary=summary, runs=runs, seed=_SEED)
    return 0


class _Swarm:
    """A state with sessions in progress, and when they end."""

    def __init__(self, seed: int) -> None:
        problem = large_swarm(_SERVERS, clients=_CLIENTS, seed=seed)
        self.state = RouterState(problem, cg_bp(problem, _SESSIONS).placement)
        self.ends: list[tuple[float, int, Reservation]] = []
        self.clients = np.random.default_rng(seed).integers(0, _CLIENTS, 1_000_000).tolist()
        self.now = 0.0

    def open(self) -> None:
        reservation = self.state.open(self.state.route(self.clients.pop(), self.now), self.now)
        heapq.heappush(self.ends, (reservation.end_s, reservation.number, reservation))

    def close(self) -> None:
        self.now, _, reservation = heapq.heappop(self.ends)
        self.state.close(reservation, self.now)


def _measure(seed: int, *, seconds: float) -> tuple[dict[str, Any], list[float]]:
    swarm = _Swarm(seed)
    session_s = swarm.state.route(0, 0.0).end_s
    while len(swarm.ends) < _IN_PROGRESS:
        swarm.open()
        swarm.now += session_s / _IN_PROGRESS
        while swarm.ends[0][0] <= swarm.now:
            swarm.close()
    each_ms: list[float] = []
    cpu, wall = time.process_time(), time.perf_counter()
    while time.process_time() - cpu < seconds:
        start = time.perf_counter()
        swarm.close()
        swarm.open()
        each_ms.append((time.perf_counter() - start) * 1000)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    held = list(swarm.state.reservations.values())
    run = {
        "seed": seed,
        "decisions_per_s": len(each_ms) / cpu,
        "decisions_per_wall_s": len(each_ms) / wall,
        "arcs": len(swarm.state.graph.arcs),
        "in_progress": len(held),
        "waiting": sum(reservation.held_from_s > swarm.now for reservation in held),
        "mean_hops": float(np.mean([len(reservation.route.chain) for reservation in held])),
        "dijkstra_per_s": _dijkstra_rate(swarm),
    }
    return run, each_ms


def _dijkstra_rate(swarm: _Swarm, decisions: int = 3) -> float:
    """Decisions per second of the baseline."""
    start = time.process_time()
    found = [_dijkstra(swarm.state, client, swarm.now) for client in range(decisions)]
    rate = decisions / (time.process_time() - start)
    for client, cost_s in enumerate(found):
        assert np.isclose(cost_s, swarm.state.route(client, swarm.now).cost_s)
    return rate


def _dijkstra(state: RouterState, client: int, now: float) -> float:
    waits_s, arcs = state.arc_waits_s(now), state.graph.arcs
    hop_s = state.graph.arc_costs(client) + waits_s
    starts, ends = state.placement.starts, state.placement.ends
    best_s = np.full(starts.size, np.inf)
    heap = [(float(hop_s[arcs.of_server[s][-1]]), int(s)) for s in np.flatnonzero((starts == 0) & (ends > 0))]
    for cost_s, server in heap:
        best_s[server] = cost_s
    heapq.heapify(heap)
    while heap:
        cost_s, server = heapq.heappop(heap)
        if cost_s > best_s[server]:
            continue
        block = int(ends[server])
        if block == arcs.num_blocks:
            return cost_s
        for following in np.flatnonzero((starts <= block) & (block < ends)).tolist():
            reached_s = cost_s + float(hop_s[arcs.of_server[following][int(ends[following]) - block - 1]])
            if reached_s < best_s[following]:
                best_s[following] = reached_s
                heapq.heappush(heap, (reached_s, following))
    return float("inf")


if __name__ == "__main__":
    sys.exit(main())
