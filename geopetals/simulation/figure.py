"""Policies as a picture: what share of the sessions has had its first token, or each token, within which time."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from geopetals.errors import UnsupportedInput
from geopetals.simulation.compare import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = {
    "petals": "#d9822b",
    "petals+order": "#b5651d",
    "petals+number": "#8c564b",
    "petals+routing": "#e3b23c",
    "paper": "#7f7f7f",
    "geopetals": "#2a6fbb",
}


def draw(rows: Sequence[Row], title: str, file: Path) -> None:
    """Write the figure. Raises UnsupportedInput if the file cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    first, each = figure.subplots(1, 2, sharey=True)
    _draw_shares(first, [(row.policy, row.ttft_s) for row in rows], "time to first token, s")
    _draw_shares(each, [(row.policy, row.tpot_s) for row in rows], "time per token after the first, s")
    first.set_ylabel("share of sessions")
    handles, labels = first.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(rows), frameon=False)
    figure.suptitle(title)
    try:
        figure.savefig(file)
    except OSError as error:
        raise UnsupportedInput(f"{file} cannot be written ({error.strerror}): choose another name.") from error


def _draw_shares(axes: "Axes", series: Sequence[tuple[str, tuple[float, ...]]], label: str) -> None:
    for policy, values in series:
        if values:
            shares = np.arange(1, len(values) + 1) / len(values)
            axes.step(np.array(values), shares, where="post", label=policy, color=_COLORS[policy])
    axes.set(xlabel=label, xscale="log", ylim=(0, 1))
    axes.grid(alpha=0.3)
