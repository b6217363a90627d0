"""Time per token of all methods over what is varied: a row for each network, a column for each question."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from paper.cells import Cell
from paper.methods import METHODS
from paper.statistics import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = ("#d9822b", "#b5651d", "#8c564b", "#e3b23c", "#7f7f7f", "#2a6fbb")
_QUESTIONS = ("servers", "rate", "fast", "length")
_LABELS = {"servers": "servers", "rate": "sessions per second", "fast": "share of fast servers", "length": "tokens"}
_CLIENT = "client's site"


def draw(rows: Sequence[Row], file: Path, *, title: str) -> None:
    """rows: of one setting."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    networks = list(dict.fromkeys(row.cell.network for row in rows))
    figure = Figure(figsize=(13, 2.6 * len(networks) + 1), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(networks), len(_QUESTIONS), squeeze=False)
    for network, line in zip(networks, grid, strict=True):
        mine = [row for row in rows if row.cell.network == network]
        for question, axes in zip(_QUESTIONS, line, strict=True):
            asked = "client" if question == "fast" and network == "clustered" else question
            _draw(axes, mine, asked)
        line[0].set_ylabel(f"{network}\ns per token")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(METHODS) + 1, frameon=False)
    figure.suptitle(title)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})


def _draw(axes: "Axes", rows: Sequence[Row], question: str) -> None:
    shown = sorted(
        (row for row in rows if row.cell.question in (question, "usual")), key=lambda r: _at(r.cell, question)
    )
    ticks = [_tick(row.cell, question) for row in shown]
    places = list(range(len(shown)))
    for method, color in zip(METHODS, _COLORS, strict=True):
        means = [row.per_token_s[method] for row in shown]
        spread = [[m.value - m.low for m in means], [m.high - m.value for m in means]]
        axes.errorbar(places, [m.value for m in means], yerr=spread, color=color, marker="o", ms=3, lw=1, label=method)
    axes.plot(places, [row.lone_s for row in shown], color="black", ls=":", lw=1, label="bound")
    axes.set(xlabel=_LABELS.get(question, _CLIENT), yscale="log", xticks=places, xticklabels=ticks)
    axes.grid(alpha=0.3)


def _at(cell: Cell, question: str) -> float | str:
    values: dict[str, float | str] = {
        "servers": cell.servers,
        "rate": cell.rate_per_s,
        "fast": cell.fast_share,
        "length": cell.output_tokens,
        "client": cell.client,
    }
    return values[question]


def _tick(cell: Cell, question: str) -> str:
    value = _at(cell, question)
    return value if isinstance(value, str) else f"{value:g}"
