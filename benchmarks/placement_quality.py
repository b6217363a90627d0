"""How good are placements: stock PETALS' rule, CG-BP, the portfolio, and search, against each other and a proven bound?

Method. The instances of placement_instances.py, each with all of its sessions at once, without compute contention. A
placement costs the sum of all sessions' times, routed by the search's own rule (greedy, batch by batch), which is the
same for all methods. `portfolio` is search without a step; `search` has one second of the processor for up to 50
servers and ten for 200, its start included: the clock is that of the processor, because others may share it. `petals`
is the cheapest of five random orders of joining, routed by our rule too, so that only the placement differs.

* `few`: the gap of each method to the lower bound of the decomposition (relay_cost_bound), which may itself lie below
  the optimum. Goal: search within 0.5 % on 90 % of the instances.
* `loaded`: the cost of CG-BP over that of search. Goals: 1 - search / CG-BP of at least 8 % at half and 18 % at three
  quarters of capacity, in the mean over instances that CG-BP can place.
* `huge`: the same. Goal: CG-BP at least 2.5 times as dear. What no placement can exceed is `cg_bp_over_bound`: CG-BP's
  cost over what memory allows at least (capacity_cost_bound), or over what the sessions would cost alone on an empty
  swarm, whichever is more.
* `push`: the instances of `few` by push, CG-BP over search.

    python benchmarks/placement_quality.py [--quick] [--workers N] [--out FILE] [--plot FILE]
"""

import argparse
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from placement_instances import FAMILIES, Spec, few, huge, loaded, make
from provenance import write_results

from geopetals.placement.bounds import capacity_cost_bound, relay_cost_bound
from geopetals.placement.petals import PetalsServers, blocks_to_hold, petals_placement
from geopetals.placement.search import search_placement, sessions_by_client
from geopetals.placement.search.instance import make_instance
from geopetals.placement.search.search import carrier_of
from geopetals.problem import Problem
from geopetals.timing import Objective

SEED = 1
_CLOSE = 0.005


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="every fifth instance of one seed, a tenth of the time")
    parser.add_argument("--workers", type=int, default=1, help="processes; each has its own clock of the processor")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "placement_quality.json")
    parser.add_argument("--plot", type=Path, help="draw gaps and ratios into this file")
    args = parser.parse_args()
    tasks = [
        (group, spec, budget_s, objective)
        for group, specs, budget_s, objective in _groups(args.quick)
        for spec in specs
    ]
    runs = []
    with ProcessPoolExecutor(args.workers) as pool:
        for run in pool.map(_measure, *zip(*tasks, strict=True)):
            runs.append(run)
            print({key: value for key, value in run.items() if key != "family"}, flush=True)
    write_results(args.out, summary=_summary(runs), runs=runs, seed=SEED)
    if args.plot is not None:
        _draw(runs, args.plot)
    return 0


def _groups(quick: bool) -> list[tuple[str, Iterable[Spec], float, Objective]]:
    if quick:
        return [
            ("few", list(few())[::5], 0.1, "relay"),
            ("loaded", list(loaded())[::5], 0.1, "relay"),
            ("huge", list(huge())[::5], 1.0, "relay"),
            ("push", list(few())[::5], 0.1, "push"),
        ]
    return [
        ("huge", huge(), 10.0, "relay"),
        ("few", few(seeds=3), 1.0, "relay"),
        ("loaded", loaded(seeds=3), 1.0, "relay"),
        ("push", few(), 1.0, "push"),
    ]


def _measure(group: str, spec: Spec, budget_s: float, objective: Objective) -> dict[str, Any]:
    problem, total = make(spec)
    sessions = sessions_by_client(problem, total)
    start = time.process_time()
    portfolio = search_placement(problem, sessions, objective=objective, steps=0)
    portfolio_s = time.process_time() - start
    found = search_placement(
        problem, sessions, objective=objective, budget_s=budget_s, clock=time.process_time, seed=SEED
    )
    floor_s = make_instance(problem, sessions, objective).floor_s
    run = {
        "group": group,
        "instance": spec.name,
        "family": spec.family,
        "load": spec.load,
        "sessions": total,
        "search_s": found.cost_s,
        "left_over": found.left_over,
        "portfolio_s": portfolio.cost_s,
        "portfolio_cpu_s": portfolio_s,
        "cg_bp_s": found.cg_bp_cost_s,
        "petals_s": _petals_s(problem, total, objective),
        "floor_s": floor_s,
        "steps": found.steps,
        "cg_bp_ratio": None if found.cg_bp_cost_s is None else found.cg_bp_cost_s / found.cost_s,
        "cg_bp_over_floor": None if found.cg_bp_cost_s is None else found.cg_bp_cost_s / floor_s,
    }
    if group == "few":
        bound_s = relay_cost_bound(problem, sessions)
        run["bound_s"], run["gap"] = bound_s, found.cost_s / bound_s - 1
        run["cg_bp_gap"] = None if found.cg_bp_cost_s is None else found.cg_bp_cost_s / bound_s - 1
    if group == "huge":
        bound_s = max(capacity_cost_bound(problem, sessions), floor_s)
        run["bound_s"], run["gap"] = bound_s, found.cost_s / bound_s - 1
        run["cg_bp_over_bound"] = None if found.cg_bp_cost_s is None else found.cg_bp_cost_s / bound_s
    return run


def _petals_s(problem: Problem, sessions: int, objective: Objective) -> float | None:
    """None if not all sessions find room in any of five orders."""
    rng = np.random.default_rng(SEED)
    rps = 1 / problem.decode_block_s
    stock = PetalsServers(hidden_size=14336, forward_rps=rps, network_rps=np.full(rps.size, 500.0))
    held = blocks_to_hold(problem, stock)
    carrier = carrier_of(make_instance(problem, sessions_by_client(problem, sessions), objective))
    costs = []
    for _ in range(5):
        placement = petals_placement(problem, held, stock.announced_rps(held), rng.permutation(rps.size).tolist())
        batches = carrier.routed(placement.starts.tolist(), placement.ends.tolist())
        if sum(batch.sessions for batch in batches) == sessions:
            costs.append(sum(batch.sessions * batch.cost_s for batch in batches))
    return min(costs, default=None)


def _summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    summary: dict[str, float] = {}
    gaps = [run for run in runs if run["group"] == "few"]
    for family in (None, *FAMILIES):
        chosen = [run["gap"] for run in gaps if family in (None, run["family"])]
        name = family or "all"
        summary[f"few_{name}_within_half_percent"] = float(np.mean([gap <= _CLOSE for gap in chosen]))
        summary[f"few_{name}_gap_p50"] = float(np.percentile(chosen, 50))
        summary[f"few_{name}_gap_max"] = float(max(chosen))
    for group in ("loaded", "huge", "push"):
        of_group = [run for run in runs if run["group"] == group]
        for load in sorted({run["load"] for run in of_group}, key=lambda load: load or 0):
            _add_ratios(summary, f"{group}_{round((load or 0) * 100)}", [r for r in of_group if r["load"] == load])
        for family in FAMILIES:
            _add_ratios(summary, f"{group}_{family}", [run for run in of_group if run["family"] == family])
    huge_runs = [run for run in runs if run["group"] == "huge"]
    summary["huge_gap_max"] = float(max(run["gap"] for run in huge_runs))
    over_bound = [run["cg_bp_over_bound"] for run in huge_runs if run["cg_bp_over_bound"] is not None]
    summary["huge_cg_bp_ratio_at_most"] = float(np.mean(over_bound))
    summary["sessions_left_over"] = float(sum(run["left_over"] for run in runs))
    return summary


def _add_ratios(summary: dict[str, float], name: str, runs: list[dict[str, Any]]) -> None:
    ratios = [run["cg_bp_ratio"] for run in runs if run["cg_bp_ratio"] is not None]
    summary[f"{name}_cg_bp_infeasible"] = float(len(runs) - len(ratios))
    if ratios:
        summary[f"{name}_cg_bp_ratio_mean"] = float(np.mean(ratios))
        summary[f"{name}_cg_bp_ratio_min"] = float(min(ratios))
        summary[f"{name}_cg_bp_ratio_max"] = float(max(ratios))
        summary[f"{name}_below_cg_bp_mean"] = float(np.mean([1 - 1 / ratio for ratio in ratios]))


def _draw(runs: list[dict[str, Any]], file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for family in FAMILIES:
        gaps = sorted(100 * run["gap"] for run in runs if run["group"] == "few" and run["family"] == family)
        left.step(gaps, (np.arange(len(gaps)) + 1) / len(gaps), where="post", label=family)
        ratios = [run for run in runs if run["family"] == family and run["group"] in ("loaded", "huge")]
        placed = [run for run in ratios if run["cg_bp_ratio"] is not None]
        right.scatter([run["sessions"] for run in placed], [run["cg_bp_ratio"] for run in placed], s=14, label=family)
    left.axvline(100 * _CLOSE, color="#555555", linewidth=1)
    left.set(xlabel="gap of search to the bound, %", ylabel="share of instances", title="10 and 40 sessions")
    right.set(xlabel="sessions at once", ylabel="cost of CG-BP / cost of search", xscale="log", title="under load")
    left.legend()
    right.legend()
    figure.savefig(file)


if __name__ == "__main__":
    sys.exit(main())
