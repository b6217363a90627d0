"""How do stock PETALS, the paper's algorithms and GeoPETALS compare in the paper's own simulations (arXiv 2512.21884)?

Method. BLOOM-176B on slices of A100s and whole A100s at the nodes of AboveNet, BellCanada and GTS-CE, and in the
clustered setting of seven slow and two fast servers. Varied: number of servers, arrival rate, share of fast servers,
output length, in the clustered setting the client's site (paper/cells.py; constants in paper/swarm.py). Each cell is
simulated for 100 sessions, all to their end, without a warm-up, as in the paper; all methods under all assumptions
(paper/methods.py) have the same places, arrivals and order of joining in a seed. Figures are means over sessions, then
over seeds; differences are paired by seed.

The bound is the time of a session alone on the best chain of any placement, exact or a proven lower bound, by push: it
is below relay's. It knows no load, so efficiency (bound / time per token) can be 1 in an idle swarm only.

Networks are read from --topology DIR (or GEOPETALS_TOPOLOGY), where Abvt.graph, Bellcanada.graph and GtsCe.graph of the
paper's simulator are; without them from the package topohub, whose delays are three times as long and which has no
GTS-CE: that is left out then.

    python benchmarks/paper_tables.py [--quick] [--seeds N] [--jobs N] [--topology DIR] [--out FILE]

Beside FILE it writes the tables (.md) and a figure for each assumption (-SETTING.svg).
"""

import argparse
import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

from paper.cells import NETWORKS, Cell, all_cells, quick_cells, source
from paper.figure import draw
from paper.markdown import markdown
from paper.methods import SETTINGS, Round, run_round
from paper.statistics import Row, as_json, rows_of, summary_of
from provenance import write_results

from geopetals.progress import Console

_SEED = 20251221
_SEEDS, _QUICK_SEEDS = 20, 2
_OUT = Path(__file__).parent / "results" / "paper_tables.json"
_Task = tuple[Cell, int, Path | None]


def main() -> int:
    args = _arguments()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    seeds = args.seeds or (_QUICK_SEEDS if args.quick else _SEEDS)
    topologies = Path(args.topology) if args.topology else None
    sources = {name: found for name in NETWORKS if (found := source(name, topologies)) is not None}
    cells = [each for each in (quick_cells() if args.quick else all_cells()) if _found(each.network, sources)]
    for name in sorted(set(NETWORKS) - set(sources)):
        print(f"{name} is left out: give --topology, the folder of {NETWORKS[name]}.graph", file=sys.stderr)
    tasks = [(cell, seed, topologies) for seed, cell in product(range(_SEED, _SEED + seeds), cells)]
    rows = rows_of(measure(tasks, jobs=args.jobs))
    write_results(args.out, summary=summary_of(rows), runs=[as_json(row) for row in rows], seed=_SEED)
    args.out.with_suffix(".md").write_text(markdown(rows, seeds=seeds, sources=sources), encoding="utf-8")
    for setting in SETTINGS:
        name = setting.replace(", ", "-").replace(" ", "-")
        _draw([row for row in rows if row.setting == setting], args.out.with_name(f"{args.out.stem}-{name}.svg"))
    return 0


def measure(tasks: Sequence[_Task], *, jobs: int) -> list[Round]:
    """In the order of the tasks, whatever the number of processes."""
    label = f"{len(tasks)} rounds of {len(SETTINGS)} settings"
    rounds = []
    # Spawned, so that the number of threads is set before numpy is imported.
    with (
        multiprocessing.get_context("spawn").Pool(jobs) as pool,
        Console().task(label, total=len(tasks), unit="") as done,
    ):
        for number, each in enumerate(pool.imap(_round, tasks), 1):
            rounds.append(each)
            done(1)
            if not sys.stderr.isatty() and number % 20 == 0:
                print(f"{number} of {len(tasks)}: {each.cell.name}", file=sys.stderr, flush=True)
    return rounds


def _found(network: str, sources: Mapping[str, str]) -> bool:
    return network not in NETWORKS or network in sources


def _round(task: _Task) -> Round:
    return run_round(*task)


def _draw(rows: Sequence[Row], file: Path) -> None:
    draw(rows, file, title=f"time per token; {rows[0].setting}; {len(rows[0].by_seed_s['paper'])} seeds")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="the usual cells of the smaller networks, two seeds")
    parser.add_argument("--seeds", type=int, help=f"default {_SEEDS}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--topology", default=os.environ.get("GEOPETALS_TOPOLOGY"), help="directory of .graph files")
    parser.add_argument("--out", type=Path, default=_OUT)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
