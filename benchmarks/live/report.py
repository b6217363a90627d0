"""A scenario's results for people: a Markdown table, and a figure where matplotlib is installed."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from live.scenario import LiveScenario
from live.summary import of_system, targets

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TITLES = {
    "one": "one session at a time",
    "half": "half the rate at which stock PETALS' simulated wait diverges",
    "over": "1.5 times that rate",
}
_COLUMNS = ("system", "TPOT ms", "to stock", "TTFT p90 ms", "to stock", "failed", "efficiency", "runs")
_COLORS = {
    "stock": "#d9822b",
    "stock+our-data-plane": "#e8b57c",
    "our-placement+stock-data-plane": "#a9c4e4",
    "geopetals": "#2a6fbb",
    "paper": "#777777",
}


def markdown(scenario: LiveScenario, summary: Mapping[str, float], runs: Sequence[Mapping[str, Any]]) -> str:
    """A table for each load: medians over the orders of joining, with (least to most)."""
    lines = [f"# {scenario.name}: {scenario.cluster.name or scenario.name}", ""]
    lines += [f"Medians over orders of joining (least to most). {_counted(runs)}", ""]
    systems = list(dict.fromkeys(run["system"] for run in runs))
    for load, count in scenario.sessions.items():
        if not any(run["load"] == load for run in runs):
            continue
        lines += [f"## {load}: {_TITLES[load]}, {count} sessions", "", _row(_COLUMNS), _row(["---"] * len(_COLUMNS))]
        lines += [_row(_cells(summary, system, load)) for system in systems if f"{load}_{system}_runs" in summary]
        lines.append("")
    lines += _targets(scenario, summary)
    return "\n".join(lines) + "\n"


def _counted(runs: Sequence[Mapping[str, Any]]) -> str:
    rejected = sum("verdict" in run and not run["verdict"]["accepted"] for run in runs)
    return f"{len(runs)} runs, {rejected} of them rejected by the rule and in no median."


def _cells(summary: Mapping[str, float], system: str, load: str) -> list[str]:
    name = f"{load}_{system}"

    def spread(figure: str, digits: int) -> str:
        values = [summary.get(f"{name}_{figure}{which}") for which in ("", "_min", "_max")]
        if values[0] is None:
            return "-"
        middle, least, most = (f"{value:.{digits}f}" for value in values)
        return f"{middle} ({least} to {most})"

    def ratio(figure: str) -> str:
        value = summary.get(f"{name}_{figure}_to_stock")
        return "-" if value is None else f"{value:.2f}"

    unserved = int(summary[f"{name}_unserved"])
    counts = f"{int(summary[f'{name}_runs'])}" + (f", {unserved} could not serve" if unserved else "")
    if rejected := int(summary[f"{name}_rejected"]):
        counts += f", {rejected} rejected"
    if not summary[f"{name}_right_tokens"]:
        counts += ", WRONG TOKENS"
    return [
        system,
        spread("tpot_ms", 0),
        ratio("tpot_ms"),
        spread("ttft_p90_ms", 0),
        ratio("ttft_p90_ms"),
        spread("failed", 0),
        spread("efficiency", 2),
        counts,
    ]


def _targets(scenario: LiveScenario, summary: Mapping[str, float]) -> list[str]:
    rows = targets(scenario, summary)
    if not rows:
        return []
    lines = ["## Targets", "", _row(["target", "", "measured", ""]), _row(["---"] * 4)]
    return lines + [
        _row([what, f"{limit:.2f}", f"{value:.2f}", "met" if met else "**missed**"]) for what, limit, value, met in rows
    ]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def draw(scenario: LiveScenario, runs: Sequence[Mapping[str, Any]], file: Path) -> bool:
    """Each run a point: time per token and p90 of the time to first token, by load. False without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    systems = list(dict.fromkeys(run["system"] for run in runs))
    loads = [load for load in scenario.sessions if any(run["load"] == load for run in runs)]
    if not loads:
        return False
    figure = Figure(figsize=(9, 1.2 + 0.45 * len(systems) * len(loads)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, name, label in zip(panels, ("tpot_ms", "ttft_p90_ms"), ("TPOT, ms", "TTFT p90, ms"), strict=True):
        _draw_panel(axes, runs, [(load, system) for load in loads for system in systems], name)
        axes.set(xlabel=label, xlim=(0, None))
    figure.suptitle(scenario.cluster.name or scenario.name)
    figure.savefig(file)
    return True


def _draw_panel(axes: "Axes", runs: Sequence[Mapping[str, Any]], rows: Sequence[tuple[str, str]], figure: str) -> None:
    for row, (load, system) in enumerate(rows):
        values = sorted(of_system(runs, system, load)[figure])
        if values:
            axes.scatter(values, [row] * len(values), color=_COLORS.get(system, "#000000"), s=18)
            middle = values[len(values) // 2]
            axes.vlines(middle, row - 0.35, row + 0.35, color=_COLORS.get(system, "#000000"))
    axes.set_yticks(range(len(rows)), [f"{load}: {system}" for load, system in rows])
    axes.invert_yaxis() if not axes.yaxis_inverted() else None
