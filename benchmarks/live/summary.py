"""What runs come to: medians over the orders of joining, ratios to stock PETALS, efficiency, targets. Pure.

A run that a rule of geopetals/bench/rules.py rejects is counted, and in no median. One in which a system could not
serve at all, or answered nobody, is in no median of times either, but in `unserved`.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from live.placements import OURS, PAPER, STOCK
from live.scenario import LiveScenario

Run = Mapping[str, Any]
FIGURES = ("tpot_ms", "ttft_p90_ms", "e2e_ms", "wait_p90_ms", "failed", "efficiency")
EFFICIENCY, OVER_TTFT, OVER_PAPER = 0.85, 0.2, 0.9


def figures(run: Run) -> dict[str, float] | None:
    """Of one run; None if it does not count."""
    if "failed" in run or not run["verdict"]["accepted"] or not run["summary"]["completed"]:
        return None
    summary = run["summary"]
    shares = [run["bound_s"][each["host"]] / each["tpot_s"] for each in run["sessions"] if each["tpot_s"]]
    return {
        "tpot_ms": summary["mean_tpot_ms"],
        "ttft_p90_ms": summary["p90_ttft_ms"],
        "e2e_ms": summary["mean_e2el_ms"],
        "wait_p90_ms": summary["p90_wait_ms"],
        "failed": float(summary["failed"]),
        "efficiency": statistics.mean(shares),
    }


def of_system(runs: Iterable[Run], system: str, load: str) -> dict[str, list[float]]:
    """Each figure of each run that counts."""
    found = [figures(run) for run in runs if run["system"] == system and run["load"] == load]
    counted = [each for each in found if each is not None]
    return {name: [each[name] for each in counted] for name in FIGURES}


def summarize(scenario: LiveScenario, runs: Sequence[Run]) -> dict[str, float]:
    """Flat: LOAD_SYSTEM_FIGURE, its least and most, counts of runs, ratios to stock."""
    summary: dict[str, float] = {}
    for load in scenario.sessions:
        for system in dict.fromkeys(run["system"] for run in runs):
            name, here = f"{load}_{system}", [run for run in runs if (run["system"], run["load"]) == (system, load)]
            if not here:
                continue
            for figure, values in of_system(here, system, load).items():
                if values:
                    middle = statistics.median(values)
                    summary |= {f"{name}_{figure}": middle, f"{name}_{figure}_min": min(values)}
                    summary[f"{name}_{figure}_max"] = max(values)
            summary[f"{name}_runs"] = len(here)
            summary[f"{name}_rejected"] = sum("verdict" in run and not run["verdict"]["accepted"] for run in here)
            summary[f"{name}_unserved"] = sum("failed" in run or not run["summary"]["completed"] for run in here)
            summary[f"{name}_right_tokens"] = float(all(run.get("right_tokens", True) for run in here))
        summary |= _ratios(summary, load)
    return summary


def _ratios(summary: Mapping[str, float], load: str) -> dict[str, float]:
    """Of each system's medians to stock's."""
    found = {}
    for key, value in summary.items():
        for figure in ("tpot_ms", "ttft_p90_ms", "e2e_ms"):
            base = summary.get(f"{load}_{STOCK}_{figure}")
            if base and key.startswith(f"{load}_") and key.endswith(f"_{figure}"):
                found[f"{key}_to_stock"] = value / base
    return found


def targets(scenario: LiveScenario, summary: Mapping[str, float]) -> list[tuple[str, float, float, bool]]:
    """(what, at most or, for efficiency, at least; measured; whether it is met), for what was measured."""
    found: list[tuple[str, float, float, bool]] = []

    def at_most(what: str, limit: float, value: float | None) -> None:
        if value is not None:
            found.append((f"{what} at most", limit, value, value <= limit))

    for load, limit in scenario.targets.items():
        at_most(f"{load}: TPOT / stock's", limit, summary.get(f"{load}_{OURS}_tpot_ms_to_stock"))
    at_most("over: TTFT p90 / stock's", OVER_TTFT, summary.get(f"over_{OURS}_ttft_p90_ms_to_stock"))
    if "one" in scenario.targets and (efficiency := summary.get(f"one_{OURS}_efficiency")) is not None:
        found.append(("one: efficiency at least", EFFICIENCY, efficiency, efficiency >= EFFICIENCY))
    for load in scenario.sessions:
        ours, paper = (summary.get(f"{load}_{system}_tpot_ms") for system in (OURS, PAPER))
        if ours is not None and paper:
            limit = OVER_PAPER if load == "over" else 1.0
            at_most(f"{load}: TPOT / paper's on our data plane", limit, ours / paper)
    return found
