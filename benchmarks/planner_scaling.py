"""How long does CG-BP take for swarms of 100 to 10,000 servers, against PETALS' own placement rule?

Method. Random swarms (large_swarm.py), 70 blocks, design load 50 sessions, three seeds for each size. Both rules place
the same servers, one after the other, on one core; the time is that of the processor, because others may share it.
The goals are 0.2 s at 1,000 servers and 2 s at 10,000.

    python benchmarks/planner_scaling.py [--quick] [--out FILE]
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from large_swarm import large_swarm
from provenance import write_results

from geopetals.placement.cg_bp import cg_bp
from geopetals.placement.petals import PetalsServers, blocks_to_hold, petals_placement
from geopetals.problem import Problem

T = TypeVar("T")
_SESSIONS = 50
_SEED = 20251221


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="up to 1,000 servers, one seed")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "planner_scaling.json")
    args = parser.parse_args()
    sizes = (100, 1_000) if args.quick else (100, 300, 1_000, 3_000, 10_000)
    runs = []
    for servers in sizes:
        for number in range(1 if args.quick else 3):
            runs.append({"servers": servers, "seed": _SEED + number, **_measure(servers, _SEED + number)})
            print(runs[-1], flush=True)
    summary = {}
    for servers in sizes:
        of_size = [run for run in runs if run["servers"] == servers]
        for method in ("cg_bp", "petals"):
            summary[f"{method}_{servers}_servers_s_median"] = float(np.median([run[f"{method}_s"] for run in of_size]))
    write_results(args.out, summary=summary, runs=runs, seed=_SEED)
    return 0


def _measure(servers: int, seed: int) -> dict[str, Any]:
    problem = large_swarm(servers, clients=10, seed=seed)
    plan, cg_bp_s = _timed(lambda: cg_bp(problem, _SESSIONS))
    _, petals_s = _timed(lambda: _petals(problem, seed))
    return {"cg_bp_s": cg_bp_s, "petals_s": petals_s, "servers_used_until_covered": plan.servers_used}


def _petals(problem: Problem, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rps = 1 / problem.decode_block_s
    stock = PetalsServers(hidden_size=14336, forward_rps=rps, network_rps=np.full(rps.size, 500.0))
    held = blocks_to_hold(problem, stock)
    petals_placement(problem, held, stock.announced_rps(held), rng.permutation(rps.size).tolist())


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    start = time.process_time()
    result = work()
    return result, time.process_time() - start


if __name__ == "__main__":
    sys.exit(main())
