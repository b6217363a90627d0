"""How well does the simulator predict live runs?

Method. benchmarks/bench_live.py writes, before each run, what the simulator predicts for each of its sessions: from the
blocks that servers hold, the times that they measured themselves (or the emulated devices', where nobody asked them),
the round trips as just measured, and software's times as measured beforehand on another network. Nothing is fitted.
Here the hashes are checked, and predictions compared with what was measured: errors of the time to first token, time
per token and end-to-end time of each session, and whether systems are in the predicted order.

    python benchmarks/bench_fidelity.py [SCENARIO ...] [--results DIR]

Writes SCENARIO.fidelity.json and .md beside the results. Leaves with 1 if a hash is wrong.
"""

import argparse
import json
import sys
from pathlib import Path

from provenance import write_results

sys.path.append(str(Path(__file__).parents[1]))

from live import fidelity
from live.records import read_predictions

RESULTS = Path(__file__).parent / "results" / "live"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help="default: all that have results")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    args = parser.parse_args()
    names = args.scenarios or [path.name.split(".")[0] for path in sorted(args.results.glob("*.predictions.jsonl"))]
    return max([_report(args.results, name) for name in names], default=0)


def _report(folder: Path, name: str) -> int:
    found = json.loads((folder / f"{name}.json").read_text())
    predictions = read_predictions(folder / f"{name}.predictions.jsonl")
    wrong = fidelity.check_hashes(found["runs"], predictions)
    for each in wrong:
        print(each, file=sys.stderr)
    if wrong:
        return 1
    summary = fidelity.summarize(found["runs"], predictions)
    runs = [
        {key: run[key] for key in ("order", "system", "load", "prediction_sha256")}
        | {"errors": fidelity.errors(run, predictions[run["order"], run["system"], run["load"]]["prediction"])}
        for run in found["runs"]
        if "failed" not in run
    ]
    write_results(folder / f"{name}.fidelity.json", summary=summary, runs=runs, seed=found["provenance"]["seed"])
    text = fidelity.markdown(name, summary)
    (folder / f"{name}.fidelity.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
