"""A plan as a picture: the blocks of each server, and the time per token of each client."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from geopetals.errors import StackError, UnsupportedInput
from geopetals.planning.report import PlanReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".svg", ".pdf")
_CARRIES, _SPARE, _STOCK, _BOUND = "#2a6fbb", "#a9c4e4", "#d9822b", "#555555"


def check(file: Path) -> None:
    """Raises StackError without matplotlib, and UnsupportedInput for a file that could not be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise StackError("--plot needs matplotlib: run `pip install matplotlib`.")
    if file.suffix.lower() not in FORMATS:
        raise UnsupportedInput(f"--plot {file}: the name must end with one of {', '.join(FORMATS)}.")
    if not file.absolute().parent.is_dir():
        raise UnsupportedInput(f"--plot {file}: there is no directory {file.absolute().parent}, make it first.")


def draw(report: PlanReport, file: Path) -> None:
    """Write the figure. Raises UnsupportedInput if the file cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.8 + 0.28 * max(len(report.servers), 3 * len(report.clients))), layout="constrained")
    FigureCanvasAgg(figure)
    spans, times = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_spans(spans, report)
    _draw_times(times, report)
    figure.suptitle(report.cluster.name or report.cluster.model.name)
    try:
        figure.savefig(file)
    except OSError as error:
        raise UnsupportedInput(f"{file} cannot be written ({error.strerror}): choose another name.") from error


def _draw_spans(axes: "Axes", report: PlanReport) -> None:
    for row, server in enumerate(report.servers):
        if server.blocks is not None:
            color = _CARRIES if server.carries else _SPARE
            axes.barh(row, server.blocks.blocks, left=server.blocks.start, color=color)
    stock = report.petals.blocks or ()
    held = [(row, span) for row, span in enumerate(stock) if span is not None]
    axes.hlines(
        [row for row, _ in held],
        [span.start for _, span in held],
        [span.end for _, span in held],
        color=_STOCK,
        label="PETALS' rule (median order of joining)",
    )
    axes.bar(0, 0, color=_CARRIES, label="carries planned sessions")
    axes.bar(0, 0, color=_SPARE, label="spare")
    axes.set(xlabel="block", xlim=(0, report.cluster.model.num_blocks))
    axes.set_yticks(range(len(report.servers)), [str(server.server) for server in report.servers])
    axes.invert_yaxis()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False, fontsize="small")


def _draw_times(axes: "Axes", report: PlanReport) -> None:
    stock = report.petals.client_tpot_s or ()
    bars = [
        ("alone", _CARRIES, {row: client.alone.tpot_s for row, client in enumerate(report.clients)}),
        (
            f"{report.sessions} at once",
            _SPARE,
            {row: client.together.tpot_s for row, client in enumerate(report.clients) if client.together is not None},
        ),
        ("PETALS' rule, alone", _STOCK, dict(enumerate(stock))),
    ]
    for offset, (label, color, tpots_s) in zip((-0.27, 0.0, 0.27), bars, strict=True):
        values = [tpot_s * 1000 for tpot_s in tpots_s.values()]
        axes.barh([row + offset for row in tpots_s], values, 0.24, color=color, label=label)
    bounds, rows = [client.bound.decode_s * 1000 for client in report.clients], np.arange(len(report.clients))
    axes.vlines(bounds, rows - 0.42, rows + 0.42, color=_BOUND, label="bound")
    axes.set(xlabel="time per token, ms", xlim=(0, None))
    axes.set_yticks(range(len(report.clients)), [str(client.client) for client in report.clients])
    axes.invert_yaxis()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False, fontsize="small")
