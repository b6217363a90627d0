"""`geopetals simulate`: how long people would wait for tokens under each of several policies, without a GPU."""

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from geopetals.cli import options

if TYPE_CHECKING:
    from geopetals.simulation.compare import Row
    from geopetals.simulation.scenario import Scenario

HELP = "simulate a scenario: what people would wait for tokens under stock PETALS, the paper's algorithms, and ours"
POLICIES = ("petals", "petals+order", "petals+number", "petals+routing", "paper", "geopetals")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `geopetals simulate`."""
    parser.add_argument(
        "scenario", metavar="SCENARIO", help="a scenario in YAML or JSON; docs/simulation.md describes it"
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--policy", choices=POLICIES, help="simulate this one instead of the scenario's")
    chosen.add_argument(
        "--compare", metavar="NAMES", type=_names, help="simulate these instead, for example petals,paper,geopetals"
    )
    parser.add_argument(
        "--seeds", metavar="N", type=options.positive_int, help="how often, with other random numbers each time"
    )
    parser.add_argument("--seed", metavar="N", type=options.seed, default=0, help="the first of them (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, in seconds")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw the comparison into a .png, .svg or .pdf file")


def run(args: argparse.Namespace) -> int:
    """Print the comparison; exit code 1 if no policy can serve the cluster."""
    from geopetals.planning.figure import check
    from geopetals.scenario_io import load_scenario
    from geopetals.simulation import figure
    from geopetals.simulation.compare import json_of

    if args.plot is not None:
        check(args.plot)
    scenario = load_scenario(args.scenario)
    names = [args.policy] if args.policy else args.compare or list(scenario.policies)
    seeds = range(args.seed, args.seed + (args.seeds or scenario.seeds))
    rows = _simulate(scenario, names, seeds)
    if args.plot is not None:
        figure.draw(rows, scenario.name or "simulation", args.plot)
    if args.json:
        print(json.dumps(json_of(rows, scenario, seeds), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        print("\n".join(_lines(scenario, rows, len(seeds))))
    return 1 if all(row.failed for row in rows) else 0


def _simulate(scenario: "Scenario", names: Sequence[str], seeds: Sequence[int]) -> "tuple[Row, ...]":
    from geopetals.progress import Console
    from geopetals.simulation.compare import compare

    assert scenario.cluster is not None, "load_scenario gives a cluster"
    total = len(names) * len(seeds) * (scenario.load.sessions or 1)
    with Console().task(f"simulated {', '.join(names)}", total=total, unit="sessions") as advance:
        return compare(scenario.cluster, scenario, names, seeds=seeds, advance=lambda name, arrived: advance(arrived))


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in POLICIES:
            raise argparse.ArgumentTypeError(f"{name!r} is no policy: choose among {', '.join(POLICIES)}.")
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} names a policy twice: keep one of them.")
    return names


def _lines(scenario: "Scenario", rows: "Sequence[Row]", seeds: int) -> Iterator[str]:
    work = scenario.load
    count = f"{work.sessions} sessions" if work.sessions is not None else f"sessions for {work.duration_s:g} s"
    times = "one seed" if seeds == 1 else f"means over {seeds} seeds"
    yield f"{scenario.name or 'scenario'}: {count} ({work.arrivals.kind}), {times}, {scenario.mode} mode"
    yield ""
    heads = ("policy", "TTFT p50", "p99", "TPOT p50", "p99", "ITL p99", "wait p50", "p99", "end-to-end p50", "p99")
    more = ("tokens/s", "cache", "compute", "refused", "failed over", "failed")
    yield from _table((*heads, *more), [_cells(row) for row in rows if row.failed is None])
    for row in rows:
        if row.failed is not None:
            yield f"{row.policy} cannot serve it: {row.failed}"
    yield ""
    yield from _notes(scenario)


def _cells(row: "Row") -> Sequence[str]:
    figures = row.figures
    pairs = [(name, q) for name in ("ttft", "tpot", "itl", "wait", "e2e") for q in (50, 99) if (name, q) != ("itl", 50)]
    return (
        row.policy,
        *(_time(figures[f"{name}_p{q}_s"]) for name, q in pairs),
        f"{figures['tokens_per_s']:.3g}",
        f"{figures['memory_use']:.0%}",
        f"{figures['compute_use']:.0%}",
        *(f"{figures[name]:.3g}" for name in ("refused", "failed_over", "failed")),
    )


def _notes(scenario: "Scenario") -> Iterator[str]:
    if any(dataclasses.astuple(scenario.constants)):
        yield "With the constants of the scenario, which the paper's figures add to every request."
    if scenario.mode == "paper":
        yield "Paper mode: PETALS' back-off and the accounting of the paper's simulator; no contention for compute."
    else:
        yield "Sessions of the warm-up are not measured. Use: from its end to the last arrival."


def _time(seconds: float) -> str:
    if seconds != seconds:
        return "-"
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s" if seconds < 100 else f"{seconds:.0f} s"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    lines = [heads, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    for line in lines:
        cells = (f"{cell:{'>' if i else '<'}{widths[i]}}" for i, cell in enumerate(line))
        yield "  ".join(cells).rstrip()
