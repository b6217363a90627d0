"""How much sooner do people get their tokens than from stock PETALS, on servers that are far apart?

Method. A scenario (examples/scenarios/live) has a cluster, what sessions look like, and loads. Its machines are hosts
of an emulated network with the cluster's round trips, its servers emulated devices with the cluster's times and as
much memory, in blocks and sessions, for a tiny Llama. Servers join in orders that the seed fixes beforehand. For each
order, one system after another is started on the same hosts and asked the same:

    stock                            stock PETALS 2.2.0.post1: its placement, client, routing, data plane
    stock+our-data-plane             our servers and client, with the blocks that those stock servers took
    our-placement+stock-data-plane   stock servers and client, with the blocks that our search places for relay
    geopetals                        coordinator, and servers that join it
    paper                            the paper's CG-BP placement and routing by waiting times, on our data plane

Loads: one session at a time; half of, and 1.5 times the rate at which stock's simulated wait diverges (Poisson
arrivals). Before each run the round trips are measured, and what the simulator predicts is written to
SCENARIO.predictions.jsonl with its hash, which stands in the result. Runs that the rule in geopetals/bench/rules.py
rejects are kept, marked, and in no median. Beside SCENARIO.json come the table (.md) and a figure (.svg).

    python benchmarks/bench_live.py [SCENARIO ...] [--orders N] [--loads one,half,over] [--systems A,B] [--quick]
        [--resume] [--topology DIR] [--out DIR]

Needs root, or user namespaces; .venv-stock (`make stock`) for stock PETALS, which is left out without it.
"""

import argparse
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from live import report
from live.placements import NEEDS_STOCK, SYSTEMS
from live.records import Records
from live.runner import Wanted, run_scenario
from live.scenario import LOADS, LiveScenario, load
from live.summary import summarize
from live.translation import Live

from geopetals.bench.systems import STOCK_PYTHON
from geopetals.errors import GeoPetalsError

RESULTS = Path(__file__).parent / "results" / "live"


def main() -> int:
    args = _parser().parse_args()
    systems = _chosen(args.systems, SYSTEMS)
    if not STOCK_PYTHON.exists():
        print("stock PETALS is not installed (`make stock`): it is left out", file=sys.stderr)
        systems = [system for system in systems if system not in NEEDS_STOCK]
    try:
        for name in args.scenarios:
            scenario = load(name, topologies=args.topology)
            scenario = scenario.quick() if args.quick else scenario
            scenario = replace(scenario, orders=args.orders or scenario.orders)
            wanted = Wanted(
                systems=systems, loads=[each for each in _chosen(args.loads, LOADS) if each in scenario.sessions]
            )
            _run(scenario, wanted, args.out, resume=args.resume)
    except GeoPetalsError as error:
        print(f"bench_live: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("scenarios", nargs="*", default=["a0"], metavar="SCENARIO", help="name or file (default: a0)")
    parser.add_argument("--orders", type=int, help="of joining (default: the scenario's)")
    parser.add_argument("--loads", help=f"of {','.join(LOADS)} (default: the scenario's)")
    parser.add_argument("--systems", help="separated by commas (default: all)")
    parser.add_argument("--quick", action="store_true", help="one order, few sessions")
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted run has ended")
    parser.add_argument(
        "--topology", type=Path, default=os.environ.get("GEOPETALS_TOPOLOGY"), metavar="DIR", help="of .graph files"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    return parser


def _chosen(text: str | None, known: tuple[str, ...]) -> list[str]:
    """In the usual order."""
    words = text.split(",") if text else list(known)
    if unknown := [word for word in words if word not in known]:
        raise SystemExit(f"{unknown[0]!r} is none of {', '.join(known)}")
    return [word for word in known if word in words]


def _run(scenario: LiveScenario, wanted: Wanted, out: Path, *, resume: bool) -> None:
    records = Records(out, scenario.name, seed=scenario.seed, resume=resume)
    with tempfile.TemporaryDirectory(prefix="gpl-") as folder:
        os.environ.setdefault("GEOPETALS_CACHE", str(Path(folder) / "cache"))
        run_scenario(Live(scenario), wanted, records, Path(folder))
    summary = summarize(scenario, records.runs)
    records.write(summary)
    text = report.markdown(scenario, summary, records.runs)
    (out / f"{scenario.name}.md").write_text(text)
    report.draw(scenario, records.runs, out / f"{scenario.name}.svg")
    print(text)


if __name__ == "__main__":
    sys.exit(main())
